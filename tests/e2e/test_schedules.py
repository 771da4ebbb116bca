"""A schedule from outside: what its owner sets up is what an agent gets, at the minute of a real clock."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

from tests.conftest import until
from tests.e2e.conftest import Caller, Fleet

MINUTE_S = 60
FIRE_MAX_S = 65.0


async def test_a_schedule_of_every_minute_fires_at_the_next_one(lead: Caller, fleet: Fleet) -> None:
    """`* * * * *`: the real fire of the next full minute is delivered, and said to have been."""
    agent = await fleet.start(work_s=0.01)
    body = {"name": "smoke", "cron": "* * * * *", "prompt": "look at it"}
    made = await lead.call("POST", f"/workspaces/{agent.workspace}/schedules", body)
    assert made.status == 201, made.body
    path = f"/workspaces/{agent.workspace}/schedules/{made.json['schedule_id']}"
    due_at = datetime.fromisoformat(made.json["next_fire_at"])
    assert (due_at.second, due_at.microsecond) == (0, 0)
    assert 0 < (due_at - datetime.now(UTC)).total_seconds() <= MINUTE_S

    await agent.until(lambda: bool(agent.received), within_s=FIRE_MAX_S)
    late_s = time.time() - due_at.timestamp()
    (received,) = agent.received
    assert received.text == "look at it"
    told = json.loads(received.body)["params"]["message"]["metadata"]["urn:bide:queue:1"]
    assert (told["fire_at"], told["merged_count"]) == (made.json["next_fire_at"], 1)
    assert 0 <= late_s <= FIRE_MAX_S - MINUTE_S

    async def counted() -> bool:
        seen = (await lead.call("GET", path)).json
        return bool(seen["counts"]["delivered"] == 1)

    await until(counted)
    assert (await lead.call("DELETE", path)).status == 200
    print(f"from the full minute to the agent: {late_s * 1000:.0f} ms")
