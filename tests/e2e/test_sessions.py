"""The story behind the ceiling, replayed with seconds for minutes: a session that outlasts twelve fires."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from bide_agent.agent import Agent
from tests.conftest import until
from tests.e2e.conftest import Caller, Fleet
from tests.e2e.operated import Operated, lines, operated
from tests.integration.calendar_kit import free, said

PERIOD_S = 3
FIRES = 12
QUICK = {
    "BIDE_QUEUE_SNAPSHOT_S": "0.5",
    "BIDE_SCHEDULER_SESSION_NOTE_S": "0.2",
    "BIDE_SCHEDULER_SESSION_REPEAT_S": "2",
    "BIDE_SCHEDULER_GATE_REPEAT_S": "1",
}
"""What is said every few seconds is said within one."""


@pytest.fixture(scope="module")
def ring() -> Iterator[Operated]:
    with operated(**QUICK) as ready:
        yield ready


async def in_a_long_session(lead: Caller, fleet: Fleet, **behaviour: Any) -> tuple[Agent, asyncio.Task[Any]]:
    """An agent that works on one message until somebody ends that."""
    agent = await fleet.start(f"w-{uuid4().hex[:8]}", work_s=120.0, heartbeat_s=1.0, behaviour=behaviour)
    first = asyncio.create_task(lead.send(agent.workspace, "six hours"))
    await agent.until(lambda: agent.active == 1)
    agent.behave(work_s=0.1)  # the turns after this one
    return agent, first


async def planned(lead: Caller, name: str, prompt: str, every_s: int = PERIOD_S) -> tuple[str, datetime]:
    """A schedule's path, and when it fires first."""
    body = {"name": "half-hourly", "every_s": every_s, "prompt": prompt}
    made = await lead.call("POST", f"/workspaces/{name}/schedules", body)
    assert made.status == 201, made.body
    path = f"/workspaces/{name}/schedules/{made.json['schedule_id']}"
    return path, datetime.fromisoformat(made.json["next_fire_at"])


async def edit(lead: Caller, schedule: str, **changes: Any) -> None:
    """Change it until the queue has it within the second that the answer waits for that."""

    async def is_applied() -> bool:
        edited = await lead.call("PATCH", schedule, changes)
        assert (edited.status, edited.json["applied"]) in {(200, True), (202, False)}, edited.body
        return edited.status == 200

    await until(is_applied)


async def seen(lead: Caller, path: str) -> dict[str, Any]:
    reply = await lead.call("GET", path)
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json
    return found


async def test_twelve_fires_without_a_ceiling_are_one_run_with_the_newest_prompt(lead: Caller, fleet: Fleet) -> None:
    """A-S-14, C-B1: nothing is lost, all is seen, and what was edited meanwhile is what runs."""
    agent, first = await in_a_long_session(lead, fleet)
    name = agent.workspace
    assert (await lead.call("PATCH", f"/workspaces/{name}", {"session_ceiling_s": 0})).status == 200
    schedule, first_at = await planned(lead, name, "before")
    await edit(lead, schedule, ends_at=(first_at + timedelta(seconds=(FIRES - 1) * PERIOD_S)).isoformat())
    shown: dict[str, Any] = {}

    async def all_bounced() -> bool:
        nonlocal shown
        shown = await seen(lead, f"/workspaces/{name}")
        return bool(shown["schedules"]) and shown["schedules"][0]["bounces"] == FIRES and shown["session"] is not None

    await until(all_bounced, within_s=60)
    print(f"{name}: {shown['session']['summary']}")
    assert (shown["session"]["state"], shown["session"]["ceiling_s"]) == ("running", 0)
    waiting = (await seen(lead, f"/workspaces/{name}/queue"))["items"]
    assert [(item["kind"], item["merged_count"]) for item in waiting] == [("tick", FIRES)]
    await edit(lead, schedule, prompt="after")
    free(agent)

    async def ran() -> bool:
        return bool((await seen(lead, schedule))["run_count"] == 1)

    await until(ran)
    assert (await first).status in {200, 202}, "the very first message of a stack may be kept"
    assert [each.text for each in agent.received] == ["six hours", "after"]
    assert said(agent.received[1])["merged_count"] == FIRES
    counts = (await seen(lead, schedule))["counts"]
    print(f"{name}: {FIRES} fires, {counts}")
    assert (counts["delivered"], counts["coalesced"]) == (1, FIRES - 1)


async def test_at_its_ceiling_a_session_is_asked_to_save_and_every_tick_runs(lead: Caller, fleet: Fleet) -> None:
    """C-K1: the agent obeys; nothing is stopped, and what waited goes on."""
    agent, first = await in_a_long_session(lead, fleet)
    name = agent.workspace
    every_s = 2 * PERIOD_S  # it is asked twice, a quarter of the ceiling apart: longer than a machine stands still
    rules = {"session_ceiling_s": 2 * every_s, "checkpoint_grace_s": 20, "stop_grace_s": 5}
    assert (await lead.call("PATCH", f"/workspaces/{name}", rules)).status == 200
    schedule, _ = await planned(lead, name, "look", every_s)

    async def four_ran() -> bool:
        return bool((await seen(lead, schedule))["run_count"] >= 4)

    await until(four_ran, within_s=90)
    answer = await first
    reasons = [each["reason"] for each in agent.directives if each["kind"] == "checkpoint"]
    assert reasons == ["ceiling_near", "ceiling"]
    assert not [each for each in agent.directives if each["kind"] == "stop"]
    said_last = answer.json if answer.status == 200 else (await lead.ended(answer.json["queue_id"]))["answer"]
    mark = said_last["result"]["metadata"]["urn:bide:queue:1"]
    assert (mark["checkpointed"], mark["reason"]) == (True, "ceiling"), "its partial work is in the answer"
    paused = await lead.call("POST", f"{schedule}/pause")
    assert paused.status in {200, 202}

    async def settled() -> bool:
        row = await seen(lead, schedule)
        return bool(sum(row["counts"].values()) == row["fires"])

    await until(settled)
    row = await seen(lead, schedule)
    assert row["counts"]["ceiling"] == row["counts"]["failed"] == row["counts"]["missed"] == 0
    print(f"{name}: asked at its ceiling, {row['fires']} fires: {row['counts']}")


@pytest.mark.parametrize(
    ("behaviour", "is_killed"),
    [
        (("checkpoint=ignore",), False),
        (("checkpoint=ignore", "stop=ignore"), True),
        (("checkpoint=ignore", "stop=ignore", "sigterm=ignore"), True),
    ],
    ids=["ignores the checkpoint", "ignores the stop too", "ignores SIGTERM too"],
)
async def test_what_ignores_its_checkpoint_is_stopped_and_what_ignores_the_stop_is_killed(
    lead: Caller, ring: Operated, behaviour: tuple[str, ...], is_killed: bool
) -> None:
    """C-K1, C-K14: the ticks run however little the agent hears; the bounds of I6 are printed beside what was seen."""
    name = f"w-{uuid4().hex[:8]}"
    record = ring.let_run(name, *behaviour)
    ceiling_s, grace_s, stop_grace_s = 2 * PERIOD_S, 2, 2 if is_killed else 30
    assert (await lead.call("POST", "/registry/register", {"id": name, "url": ""})).status == 200
    rules = {"session_ceiling_s": ceiling_s, "checkpoint_grace_s": grace_s, "stop_grace_s": stop_grace_s}
    reply = await lead.call("PATCH", f"/workspaces/{name}", {**rules, "runtime": {"driver": "process"}})
    assert reply.status == 200, reply.body

    async def is_up() -> bool:
        return bool((await seen(lead, f"/workspaces/{name}"))["heartbeat_age_s"] is not None)

    await until(is_up)
    begun = time.monotonic()
    first = asyncio.create_task(lead.send(name, "six hours"))
    schedule, _ = await planned(lead, name, "look")
    noted: dict[str, float] = {}

    async def ticks() -> bool:
        shown = await seen(lead, f"/workspaces/{name}")
        session = shown["session"]
        is_first = session is not None and session["schedule_id"] is None
        if is_first and session["state"] != "running":
            noted.setdefault(session["state"], time.monotonic() - begun)
        if noted and not is_first:
            noted.setdefault("gone", time.monotonic() - begun)
        return any(line["event"] == "begin" and line["text"] == "look" for line in lines(record))

    try:
        await until(ticks, within_s=90)
        noted["next tick"] = time.monotonic() - begun
        await first
        asked = [each["kind"] for each in lines(record) if each["event"] == "directive" and each["reason"] == "ceiling"]
        assert list(dict.fromkeys(asked)) == ["checkpoint", "stop"]
        restarts = (await seen(lead, f"/workspaces/{name}/life"))["restarts"]
        assert ("ceiling" in {each["reason"] for each in restarts}) is is_killed, restarts
        print(f"{name}: after " + ", ".join(f"{what} {at:.1f} s" for what, at in noted.items()) + f"; bounds: stop "
              f"{ceiling_s + grace_s + 1} s (ceiling, grace, a sweep), gone {stop_grace_s} s, the stop timeout of 1 s "
              "and the next heartbeat after it")  # fmt: skip
    finally:
        await lead.call("PATCH", f"/workspaces/{name}", {"desired": "stopped"})
        await lead.call("POST", f"{schedule}/pause")
        ring.end(name)
