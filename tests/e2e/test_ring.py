"""The ring, from outside: what a caller and an agent see of the whole stack."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import pairwise
from uuid import uuid4

import pytest

from bide_agent.agent import Agent
from tests.conftest import until
from tests.e2e.conftest import BUSY_S, Caller, Fleet, Ready, busy, free, up
from tests.integration.calendar_kit import free as end_turns


async def test_a_storm_is_accepted_delivered_once_in_order_and_never_two_at_a_time(lead: Caller, fleet: Fleet) -> None:
    """A-D-01, A-D-02, A-D-03, B-01: 200 messages at 20 workspaces of capacity 1 that work 0.3 s each."""
    names = [f"storm-{number:02}-{uuid4().hex[:4]}" for number in range(20)]
    agents = await asyncio.gather(*(fleet.start(name, work_s=0.3) for name in names))

    async def burst(agent: Agent) -> list[tuple[int, dict[str, object]]]:
        """One caller's ten messages to one workspace: the first finds it idle, the others find it working."""
        first = asyncio.create_task(lead.send(agent.workspace, "00"))
        await agent.until(lambda: len(agent.received) == 1)
        others = [await lead.send(agent.workspace, f"{number:02}") for number in range(1, 10)]
        return [(reply.status, reply.json) for reply in (await first, *others)]

    begun = time.monotonic()
    answers = [answer for burst_of in await asyncio.gather(*map(burst, agents)) for answer in burst_of]
    promised = [str(body["queue_id"]) for status, body in answers if status == 202]
    at_once = sum(1 for status, body in answers if status == 200 and "result" in body)
    ended = await asyncio.gather(*(lead.ended(queue_id, within_s=120) for queue_id in promised))
    completed = sum(item["status"] == "completed" for item in ended)
    print(f"storm: 200 sent, {at_once} answered at once, {len(promised)} kept, {completed} delivered, "
          f"lost {200 - at_once - completed}, {time.monotonic() - begun:.1f} s")  # fmt: skip
    assert (at_once + len(promised), completed) == (200, len(promised))
    for agent in agents:
        assert [each.text for each in agent.received] == [f"{number:02}" for number in range(10)]
        assert_one_at_a_time(agent)


def assert_one_at_a_time(agent: Agent) -> None:
    turns = sorted((each.started_at or 0.0, each.ended_at or 0.0) for each in agent.received)
    assert all(ended <= begun for (_, ended), (begun, _) in pairwise(turns))


async def test_sixty_messages_of_one_caller_to_one_workspace_are_all_taken(lead: Caller, fleet: Fleet) -> None:
    agent = await fleet.start(work_s=0.01)
    agent.busy_for(1.0)
    agent.beat_now()
    name = agent_name(agent)
    replies = await asyncio.gather(*(lead.send(name, str(number)) for number in range(60)))
    assert {reply.status for reply in replies} <= {200, 202}
    items = await asyncio.gather(*(lead.ended(reply.json["queue_id"]) for reply in replies if reply.status == 202))
    assert {item["status"] for item in items} <= {"completed"}
    assert len(agent.received) == 60


async def test_twenty_concurrent_sends_of_one_message_are_one_item_for_everybody(lead: Caller, fleet: Fleet) -> None:
    """B-15."""
    agent = await fleet.start()
    await busy(agent)
    key = str(uuid4())
    replies = await asyncio.gather(*(lead.send(agent_name(agent), "same", key=key) for _ in range(20)))
    assert {reply.status for reply in replies} == {202}
    assert len({reply.json["queue_id"] for reply in replies}) == 1
    free(agent)
    await lead.ended(replies[0].json["queue_id"])
    assert len(agent.received) == 1


async def test_an_accepted_task_holds_its_slot_through_half_a_minute_of_failing_polls(
    lead: Caller, fleet: Fleet
) -> None:
    """A poll that fails says nothing: the slot is the task's until the task says it has ended."""
    agent = await fleet.start(behaviour={"asynchronous": True, "work_s": 31.0, "polls_fail_s": 30.0})
    await busy(agent)
    first = await lead.send(agent.workspace, "long")
    second = await lead.send(agent.workspace, "after")
    assert (first.status, second.status) == (202, 202)
    free(agent)
    item = await lead.ended(first.json["queue_id"], within_s=90)
    assert (item["status"], item["attempts"]) == ("completed", 0)
    agent.behave(asynchronous=False, work_s=0.05)
    await lead.ended(second.json["queue_id"], within_s=60)
    assert [each.text for each in agent.received] == ["long", "after"]
    assert_one_at_a_time(agent)


async def test_a_slow_agent_and_a_limited_wait(lead: Caller, fleet: Fleet) -> None:
    """`Prefer: wait=1`: 202, and the answer is there later."""
    agent = await fleet.start(work_s=BUSY_S)
    reply = await lead.send(agent_name(agent), "slow", prefer="wait=1")
    assert reply.status == 202
    end_turns(agent)
    item = await lead.ended(reply.headers["x-queue-id"])
    assert item["status"] == "completed"
    assert "slow" in str(item["answer"])


async def test_an_explicit_key_is_executed_once_idle_busy_and_after_its_end(lead: Caller, fleet: Fleet) -> None:
    """A-Q-20, A-Q-21: one execution, the same answer."""
    agent = await fleet.start(work_s=0.2)
    name = agent_name(agent)
    first = await lead.send(name, "once", key="m1", idempotency_key="k", prefer="wait=10")
    agent.busy_for(1.0)
    agent.beat_now()
    second = await lead.send(name, "once", key="m1", idempotency_key="k", prefer="wait=10")
    third = await lead.send(name, "once", key="m1", idempotency_key="k", prefer="wait=10")
    assert [reply.status for reply in (first, second, third)] == [200, 200, 200]
    assert first.json["result"] == second.json["result"] == third.json["result"]
    assert second.headers["idempotent-replayed"] == "true"
    assert len(agent.received) == 1
    other = await lead.send(name, "other", key="m1", idempotency_key="k")
    assert other.status == 422


@pytest.mark.usefixtures("open_ring")
async def test_a_message_kept_behind_a_live_forward_follows_it_at_once(lead: Caller, fleet: Fleet) -> None:
    """A-Q-23: capacity 1, a forward runs, a message kept meanwhile is delivered after its end, and then soon."""
    agent = await fleet.start(work_s=BUSY_S)
    name = agent_name(agent)
    live = asyncio.create_task(lead.send(name, "live"))
    await agent.until(lambda: len(agent.received) == 1)
    agent.behave(work_s=0.05)
    kept = await lead.send(name, "kept")
    end_turns(agent)
    assert (await live).status == 200
    assert kept.status == 202
    await lead.ended(kept.json["queue_id"])
    first, second = agent.received
    gap_ms = ((second.started_at or 0.0) - (first.ended_at or 0.0)) * 1000
    print(f"live forward ended to the kept message at the agent: {gap_ms:.0f} ms")
    assert gap_ms >= 0


async def test_the_same_with_its_proxy_killed() -> None:
    """The forward dies with its proxy; 15 s and a beat later the kept message is delivered, after the turn's end."""
    with up("--replicas", "proxy=2") as ready:
        from contextlib import AsyncExitStack  # noqa: PLC0415

        from shared.addresses import AddressRules  # noqa: PLC0415
        from shared.agents import AgentError, Agents  # noqa: PLC0415

        client = Agents(AddressRules(allow_loopback=True))
        lead = Caller(ready, client, "lead")
        async with AsyncExitStack() as exits:
            agent = await Fleet(ready, exits).start(work_s=0.1)
            name = agent_name(agent)

            # A proxy that never had a backlog's copy keeps what it could forward: warm the second one up.
            while (warm := await lead.send(name, "warm", proxy=1)).status != 200:
                await lead.ended(warm.json["queue_id"])
            before = len(agent.received)

            async def in_use(expected: int) -> bool:
                """What the first proxy knows; at a cadence of 30 s it hears of the second one's forward by its beat."""
                seen = await lead.call("GET", f"/workspaces/{name}")
                return bool(seen.json["in_use"] == expected)

            await until(lambda: in_use(0))  # the warm-up is over, and told
            agent.behave(work_s=10.0)

            async def forward() -> int:
                try:
                    return (await lead.send(name, "live", proxy=1)).status
                except AgentError:
                    return 0

            live = asyncio.create_task(forward())
            await agent.until(lambda: len(agent.received) > before)

            await until(lambda: in_use(1))
            kept = await lead.send(name, "kept", proxy=0)
            os.kill(proxy_pid(ready), signal.SIGKILL)
            killed_at = time.monotonic()
            assert await live == 0
            assert kept.status == 202
            agent.behave(work_s=0.1)
            item = await lead.ended(kept.json["queue_id"], within_s=90)
            assert item["status"] == "completed"
            assert_one_at_a_time(agent)
            assert [each.text for each in agent.received][before:] == ["live", "kept"]
            print(f"proxy killed to the kept message delivered: {time.monotonic() - killed_at:.1f} s")
        await client.close()


def proxy_pid(ready: Ready) -> int:
    return ready.pids["proxy"][1]


def agent_name(agent: Agent) -> str:
    return agent.workspace
