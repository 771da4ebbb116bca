"""The second story: a cron meets a session that does not end.

Twelve fires vanished once, and the session never saw the prompt that was edited meanwhile. Here they wait as one, the
session is asked to save at its ceiling, and what runs then is the newest prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bide_agent import Options, running
from bide_agent.agent import Agent
from deploy.demo.operator import Operator
from shared.addresses import AddressRules
from shared.agents import AgentError, Agents

PERIOD_S = 2
CEILING_S = 12.0
LIMIT_S = 40.0
_GLANCE_S = 2.0
_AGENT = "researcher"


async def tell(proxy: str, admin_token: str) -> bool:
    """Tell the story; True when no fire was lost and the newest prompt ran."""
    print(f"\nA schedule fires every {PERIOD_S} s. Its agent has begun a session that would last for hours; its "
          f"ceiling is {CEILING_S:g} s.\n")  # fmt: skip
    client = Agents(AddressRules(allow_loopback=True))
    bide = Operator(client, proxy, admin_token)
    try:
        async with running(
            Options(workspace=_AGENT, bide=proxy, token=admin_token, work_s=3600.0, heartbeat_s=1.0)
        ) as agent:
            await agent.until(lambda: agent.beats > 0)
            await bide.call(
                "PATCH", f"/workspaces/{_AGENT}", {"session_ceiling_s": CEILING_S, "checkpoint_grace_s": 10}
            )
            session = asyncio.create_task(bide.send(_AGENT, "the-long-one", "find out everything"))
            await agent.until(lambda: agent.active == 1)
            agent.behave(work_s=0.3)  # the turns after this one
            held = await _watch(bide, agent)
            with suppress(AgentError):
                await session
    finally:
        await client.close()
    return held


async def _watch(bide: Operator, agent: Agent) -> bool:
    """Print what an operator sees, until a tick has run."""
    plan = {"name": "half-hourly", "every_s": PERIOD_S, "prompt": "the old prompt"}
    made = await bide.call("POST", f"/workspaces/{_AGENT}/schedules", plan)
    path = f"/workspaces/{_AGENT}/schedules/{made['schedule_id']}"
    begun, edited, schedule = time.monotonic(), False, made
    print("  seconds  what GET /workspaces/researcher says")
    while time.monotonic() - begun < LIMIT_S:
        shown, schedule = await bide.call("GET", f"/workspaces/{_AGENT}"), await bide.call("GET", path)
        session = shown.get("session")
        print(f"  {time.monotonic() - begun:7.1f}  {session['summary'] if session else 'no session'}", flush=True)
        if schedule["run_count"] >= 2:  # noqa: PLR2004 - the one that waited, and one after it
            break
        if not edited and schedule["bounces"] >= 3:  # noqa: PLR2004 - some way into the session
            edited = True
            await bide.call("PATCH", path, {"prompt": "the new prompt"})
            print("           the prompt is edited")
        await asyncio.sleep(_GLANCE_S)  # the table's pace
    await bide.call("POST", f"{path}/pause")
    await asyncio.sleep(_GLANCE_S)  # what was on its way
    return _print_accounts(await bide.call("GET", path), agent)


def _print_accounts(schedule: Mapping[str, Any], agent: Agent) -> bool:
    counts = {name: count for name, count in schedule["counts"].items() if count}
    texts = [each.text for each in agent.received[1:]]
    asked = [each["reason"] for each in agent.directives if each["kind"] == "checkpoint"]
    print(f"\n  The agent was asked to save: {', '.join(asked)}. It ended its turn, and then ran: {', '.join(texts)}.")
    print(f"  {schedule['fires']} fires: {', '.join(f'{count} {name}' for name, count in counts.items())}; "
          f"{schedule['fires'] - sum(schedule['counts'].values())} lost.\n", flush=True)  # fmt: skip
    return bool(texts) and "the old prompt" not in texts and sum(schedule["counts"].values()) == schedule["fires"]
