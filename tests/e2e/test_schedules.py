"""A schedule from outside: what its owner sets up is what an agent gets, at the minute of a real clock."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta

from tests.conftest import until
from tests.e2e.conftest import Caller, Fleet

FIRE_MAX_S = 90.0


async def test_a_schedule_of_every_minute_fires_at_the_next_one(lead: Caller, fleet: Fleet) -> None:
    """`* * * * *`: the real fire of the next full minute is delivered, and said to have been."""
    agent = await fleet.start(work_s=0.01)
    body = {"name": "smoke", "cron": "* * * * *", "prompt": "look at it"}
    asked_at = datetime.now(UTC)
    made = await lead.call("POST", f"/workspaces/{agent.workspace}/schedules", body)
    made_at = datetime.now(UTC)
    assert made.status == 201, made.body
    path = f"/workspaces/{agent.workspace}/schedules/{made.json['schedule_id']}"
    due_at = datetime.fromisoformat(made.json["next_fire_at"])
    assert (due_at.second, due_at.microsecond) == (0, 0)
    assert asked_at < due_at <= made_at + timedelta(minutes=1)

    await agent.until(lambda: bool(agent.received), within_s=FIRE_MAX_S)
    late_s = time.time() - due_at.timestamp()
    received = agent.received[0]
    assert received.text == "look at it"
    told = json.loads(received.body)["params"]["message"]["metadata"]["urn:bide:queue:1"]
    assert (told["fire_at"], told["merged_count"]) == (made.json["next_fire_at"], 1)
    assert late_s >= 0

    async def counted() -> bool:
        seen = (await lead.call("GET", path)).json
        return bool(seen["counts"]["delivered"] >= 1)

    await until(counted)
    assert (await lead.call("DELETE", path)).status == 200
    print(f"from the full minute to the agent: {late_s * 1000:.0f} ms")
