"""Alive or dead, decided once: the rules of the original fix, its story, and what follows a death, on a real stack.

An engine that says what is not so stands behind the webhook driver; what really crashes is run by the process driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from bide_agent.agent import Agent
from deploy.demo.plane import SECRET, Plane, plane
from shared.addresses import AddressRules
from shared.agents import Agents
from tests.conftest import until
from tests.e2e.conftest import Caller, Fleet, Ready
from tests.e2e.operated import Operated, lines, operated

QUICK = {
    "BIDE_LIVENESS_SWEEP_S": "1",
    "BIDE_LIVENESS_LOOK_S": "1",
    "BIDE_LIVENESS_BOOT_S": "6",
    "BIDE_LIVENESS_NOTICE_S": "6",
    "BIDE_LIVENESS_BACKOFF_S": "0.5",
    "BIDE_LIVENESS_WEBHOOK_SECRET": SECRET,
    "BIDE_QUEUE_SNAPSHOT_S": "0.5",
}
"""Seconds for minutes. What the rules say of flakes (how far apart, within how long) is waited for."""
SILENT_S = 17.0
"""Beyond every window of an agent that beats each second: the least is 15 s."""


@pytest.fixture(scope="module")
def ring() -> Iterator[Operated]:
    with operated(**QUICK) as ready:
        yield ready


@pytest.fixture(scope="module")
def engine() -> Iterator[Plane]:
    with plane(lambda name: f"{name}-{uuid4().hex[:4]}") as made:
        yield made


async def life(lead: Caller, name: str) -> dict[str, Any]:
    """What liveness has seen and done, the newest first."""
    reply = await lead.call("GET", f"/workspaces/{name}/life")
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json
    return found


async def suspicions(lead: Caller, name: str) -> list[str]:
    """The sentence of each suspicion, the oldest first."""
    found = (await life(lead, name))["evidence"]
    return [each["sentence"] for each in reversed(found) if each["verdict"] == "suspect"]


async def show(lead: Caller, name: str) -> dict[str, Any]:
    reply = await lead.call("GET", f"/workspaces/{name}")
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json
    return found


async def change(lead: Caller, name: str, **settings: Any) -> None:
    reply = await lead.call("PATCH", f"/workspaces/{name}", settings)
    assert reply.status == 200, reply.body


@asynccontextmanager
async def seen(lead: Caller, fleet: Fleet, engine: Plane, **options: Any) -> AsyncIterator[Agent]:
    """An agent that the engine runs, that beats, and that liveness has seen; at the end nobody looks at it any more."""
    name = f"w-{uuid4().hex[:8]}"
    engine.running[name] = "c1"
    agent = await fleet.start(name, **{"heartbeat_s": 1.0, "work_s": 0.1, **options})
    await agent.until(lambda: agent.beats >= 4)
    await change(lead, name, runtime=engine.runtime(name))
    await more_looks(engine, name)
    try:
        yield agent
    finally:
        await lead.call("POST", f"/workspaces/{name}/remove")


async def more_looks(engine: Plane, name: str, *, within_s: float = 60.0) -> None:
    """Come back when all that the engine claims has been told, and the truth after it."""
    before = engine.looks[name]

    async def is_told() -> bool:
        return not engine.claims[name] and engine.looks[name] > before + 1

    await until(is_told, within_s)


async def test_a_recent_heartbeat_debounces(lead: Caller, fleet: Fleet, engine: Plane) -> None:
    """D-S4, A-L-03: the first rule of the original fix. One flaky look at an agent that was just heard."""
    async with seen(lead, fleet, engine) as agent:
        engine.claims[agent.workspace].append("stopped")
        await more_looks(engine, agent.workspace)
        told = await suspicions(lead, agent.workspace)
        print(told)
        assert len(told) == 1
        assert told[0].startswith("1 of 2 within 30 s, heard ")
        assert engine.starts(agent.workspace) == []
        await until(lambda: _is_online(lead, agent.workspace))


async def test_an_inspect_error_is_alive(lead: Caller, fleet: Fleet, engine: Plane) -> None:
    """A-L-01: the second rule. Nobody hears it, and the engine cannot look; when it can, it is dead at once."""
    async with seen(lead, fleet, engine) as agent:
        name = agent.workspace
        agent.behave(deaf=True)
        engine.claims[name].extend(["error"] * 1000)
        engine.crash(name)
        await asyncio.sleep(SILENT_S)  # the silence itself
        assert engine.looks[name] > SILENT_S / 3, "it was looked at all the time"
        assert engine.starts(name) == []
        engine.claims[name].clear()
        await until(lambda: _is(bool(engine.starts(name))))
        evidence = (await life(lead, name))["evidence"]
        assert [(each["seen"], each["verdict"]) for each in reversed(evidence)][-2:] == [
            ("unknown", "blind"), ("stopped", "dead"),
        ]  # fmt: skip


async def test_running_resets_the_suspicion(lead: Caller, fleet: Fleet, engine: Plane) -> None:
    """A-L-16: the third rule. Two flakes within 30 s, but it was seen running between them."""
    async with seen(lead, fleet, engine) as agent:
        engine.claims[agent.workspace].extend(["stopped", "running", "stopped", "running"])
        await more_looks(engine, agent.workspace)
        told = await suspicions(lead, agent.workspace)
        print(told)
        assert [each[:19] for each in told] == ["1 of 2 within 30 s,"] * 2
        assert engine.starts(agent.workspace) == []


async def test_the_story_of_08_33_46(lead: Caller, fleet: Fleet, engine: Plane) -> None:
    """D-S3, D-S9: it answered PONG; one A2A 503 and one flaky look later it was recycled in the middle of its boot."""
    name = f"w-{uuid4().hex[:8]}"
    assert (await lead.call("POST", "/registry/register", {"id": name, "url": ""})).status == 200
    await change(lead, name, runtime=engine.runtime(name))
    await until(lambda: _is(bool(engine.started(name))))
    agent = await fleet.start(name, heartbeat_s=30.0, work_s=0.1)
    await pong(lead, name)
    agent.behave(bare_503=1)
    engine.claims[name].append("stopped")
    kept = await lead.send(name, "and one more", prefer="wait=0")
    assert kept.status == 202, kept.body
    await more_looks(engine, name)
    told = await suspicions(lead, name)
    print(told)
    assert len(told) == 1
    assert len(engine.starts(name)) == 1, "its first start, and no other"
    assert (await lead.ended(kept.json["queue_id"]))["status"] == "completed"
    assert [each.text for each in agent.received][-2:] == ["PING", "and one more"]
    await lead.call("POST", f"/workspaces/{name}/remove")


async def test_an_agent_killed_in_mid_delivery_is_restarted_and_its_message_delivered(
    lead: Caller, ring: Operated
) -> None:
    """D-S6, A-Q-18: noticed by its exit, although it was heard a moment ago; it counts as an attempt and a death."""
    name = f"w-{uuid4().hex[:8]}"
    record = ring.let_run(name)
    await run(lead, name, admission="queue_first")
    kept = await lead.send(name, "synthesis")
    assert kept.status == 202, kept.body
    await until(lambda: _is(any(each["event"] == "begin" for each in lines(record))))
    ring.let_run(name, work_s=0.1)  # its next life
    killed_at = datetime.now(UTC)
    ring.end(name)
    item = await lead.ended(kept.json["queue_id"], within_s=90)
    restart = (await life(lead, name))["restarts"][0]
    noticed_s, restarted_s = (_seconds(killed_at, restart[moment]) for moment in ("decided_at", "ended_at"))
    print(f"{name}: killed -9 in mid-delivery, noticed after {noticed_s:.1f} s, restarted after {restarted_s:.1f} s")
    assert (item["status"], item["attempts"]) == ("completed", 1)
    begun = [each for each in lines(record) if each["event"] == "begin"]
    assert [each["message_id"] for each in begun] == [begun[0]["message_id"]] * 2
    first, again = (each["delivery"] for each in begun)
    assert first < again, "one that found nobody there counts as a delivery, and not as an attempt"
    assert (restart["reason"], restart["result"]) == ("exited", "started")
    assert restarted_s < 25
    await let_go(lead, ring, name)


def _seconds(since: datetime, moment: str) -> float:
    return (datetime.fromisoformat(moment) - since).total_seconds()


async def test_an_operators_restart_tells_the_agent_first(lead: Caller, ring: Operated) -> None:
    """A-L-19: what it works on is saved and answered before its container ends."""
    name = f"w-{uuid4().hex[:8]}"
    record = ring.let_run(name)
    before = await run(lead, name)
    session = asyncio.create_task(lead.send(name, "six hours"))
    await until(lambda: _is(any(each["event"] == "begin" for each in lines(record))))
    asked = await lead.call("POST", f"/workspaces/{name}/restart", {"reason": "a new secret"})
    assert asked.status == 200, asked.body
    answer = await session
    # The very first message of a stack may be kept.
    said = answer.json if answer.status == 200 else (await lead.ended(answer.json["queue_id"]))["answer"]
    mark = said["result"]["metadata"]["urn:bide:queue:1"]
    assert (mark["checkpointed"], mark["reason"]) == (True, "restart"), "it was told before it was ended"
    told = [(each["kind"], each["reason"], each["result"]) for each in lines(record) if each["event"] == "directive"]
    assert told == [("checkpoint", "restart", "saving")]
    await until(lambda: _is_up(lead, name, after=before))
    restart = (await life(lead, name))["restarts"][0]
    assert (restart["reason"], restart["result"]) == ("operator", "started")
    assert "a new secret" in restart["evidence"]
    await let_go(lead, ring, name)


async def test_what_is_held_back_is_never_restarted(lead: Caller, ring: Operated) -> None:
    """A-L-18, D-S17: it dies while it is held, and nobody starts it, not even by hand; let go, it is back."""
    ways: list[dict[str, Any]] = [{"paused": True}, {"desired": "stopped"}, {"cordoned": True}]
    await asyncio.gather(*(_held_back(lead, ring, held) for held in ways))


async def _held_back(lead: Caller, ring: Operated, held: dict[str, Any]) -> None:
    name = f"w-{uuid4().hex[:8]}"
    ring.let_run(name)
    before = await run(lead, name)
    first = ring.pid(name)
    await change(lead, name, **held)
    await until(lambda: _has_heard(ring, name))
    by_hand = await lead.call("POST", f"/workspaces/{name}/restart")
    assert by_hand.status == 409, by_hand.body
    ring.end(name)
    await asyncio.sleep(4)  # four sweeps
    assert ring.pid(name) == first
    assert [each["reason"] for each in (await life(lead, name))["restarts"]] == ["first_start"]
    await change(lead, name, paused=False, desired="running", cordoned=False)
    await until(lambda: _is_up(lead, name, after=before))
    await let_go(lead, ring, name)


async def _has_heard(ring: Operated, name: str) -> bool:
    """Whether the operator's word has come to liveness."""
    connection = await asyncpg.connect(ring.database_url)
    try:
        query = "SELECT paused OR cordoned OR desired = 'stopped' FROM liveness.agents WHERE workspace_id = $1"
        return bool(await connection.fetchval(query, name))
    finally:
        await connection.close()


async def test_a_crash_loop_is_given_up_and_comes_back_by_the_operator(lead: Caller, ring: Operated) -> None:
    """D-S10, A-L-17: five starts, and no sixth; what was sent meanwhile is kept and delivered when it is mended."""
    name = f"w-{uuid4().hex[:8]}"
    ring.let_run_line(name, ["false"])
    assert (await lead.call("POST", "/registry/register", {"id": name, "url": ""})).status == 200
    await change(lead, name, runtime={"driver": "process"})
    begun = time.monotonic()
    kept = await lead.send(name, "for when it is mended")
    assert kept.status == 202, kept.body

    async def is_given_up() -> bool:
        return bool((await show(lead, name))["status"] == "gave_up")

    await until(is_given_up, within_s=90)
    last = ring.pid(name)
    print(f"{name}: given up after {time.monotonic() - begun:.1f} s: {(await show(lead, name))['status_reason']}")
    assert len((await life(lead, name))["restarts"]) == 5
    await asyncio.sleep(3)  # sweeps in which nothing may happen
    assert ring.pid(name) == last
    record = ring.let_run(name, work_s=0.1)
    asked = await lead.call("POST", f"/workspaces/{name}/resume", {"note": "mended"})
    assert asked.status == 200, asked.body
    await until(lambda: _is_up(lead, name))
    assert (await lead.ended(kept.json["queue_id"]))["status"] == "completed"
    assert [each["text"] for each in lines(record) if each["event"] == "begin"] == ["for when it is mended"]
    await let_go(lead, ring, name)


async def test_what_is_run_is_never_an_agents_to_say(lead: Caller, ring: Operated) -> None:
    """It asks for a driver in every way there is, with its own token; its name even stands in the operator's file."""
    name = f"w-{uuid4().hex[:8]}"
    ring.let_run(name)
    wish: dict[str, Any] = {"runtime": {"driver": "process"}, "driver": "process", "command": ["sh"]}
    enrolled = await lead.call("POST", "/registry/register", {"id": name, "url": "", "boot_id": "b1", **wish})
    client = Agents(AddressRules(allow_loopback=True))
    itself = Caller(Ready(ring.proxies, enrolled.json["auth_token"], {}, ""), client, name)
    beat = {"workspace_id": name, "active_tasks": 0, "boot_id": "b1", "settings": wish, **wish}
    card = {"workspace_id": name, "agent_card": {"name": "x", **wish}, **wish}
    tries = {
        "registers": await itself.call("POST", "/registry/register", {"id": name, "url": "", "boot_id": "b1", **wish}),
        "beats": await itself.call("POST", "/registry/heartbeat", beat),
        "tells its card": await itself.call("POST", "/registry/update-card", card),
        "patches": await itself.call("PATCH", f"/workspaces/{name}", {"runtime": wish["runtime"]}),
        "restarts": await itself.call("POST", f"/workspaces/{name}/restart"),
    }
    await client.close()
    assert {what: reply.status for what, reply in tries.items()} == {
        "registers": 200, "beats": 200, "tells its card": 200, "patches": 404, "restarts": 403,
    }  # fmt: skip
    by_hand = await lead.call("POST", f"/workspaces/{name}/restart")
    assert (by_hand.status, by_hand.json["code"]) == (409, "external"), "liveness knows of no driver"
    assert ring.pid(name) is None, "nothing was ever started"


async def run(lead: Caller, name: str, **settings: Any) -> int:
    """Let liveness run what stands in the operator's file; return the incarnation that is up."""
    assert (await lead.call("POST", "/registry/register", {"id": name, "url": ""})).status == 200
    await change(lead, name, runtime={"driver": "process"}, **settings)
    try:
        await until(lambda: _is_up(lead, name))
    except TimeoutError:
        raise AssertionError(f"it does not come up: {await show(lead, name)} {await life(lead, name)}") from None
    return int((await show(lead, name))["incarnation"])


async def pong(lead: Caller, name: str) -> None:
    """Send until it answers at once: a proxy that has just come up keeps, and so it does while the agent boots."""
    while (reply := await lead.send(name, "PING")).status != 200:
        await lead.ended(reply.json["queue_id"])


async def let_go(lead: Caller, ring: Operated, name: str) -> None:
    await lead.call("POST", f"/workspaces/{name}/remove")
    ring.end(name)


async def _is(value: bool) -> bool:
    return value


async def _is_online(lead: Caller, name: str) -> bool:
    return bool((await show(lead, name))["status"] == "online")


async def _is_up(lead: Caller, name: str, *, after: int = 0) -> bool:
    shown = await show(lead, name)
    return bool(shown["status"] == "online" and shown["url"] and shown["incarnation"] > after)
