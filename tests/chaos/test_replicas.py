"""Two of each: one that freezes and comes back, and all of them replaced one after the other under long turns."""

from __future__ import annotations

import asyncio
import json

import pytest

from bide_agent.agent import Agent
from tests.chaos.conftest import away_s
from tests.chaos.kit.account import Sent
from tests.chaos.kit.looking import change, ended, holder, status
from tests.chaos.kit.processes import Process, ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack, until
from tests.e2e.conftest import BUSY_S
from tests.integration.calendar_kit import free

QUICK = {"BIDE_QUEUE_OWNER_SILENT_S": "6", "BIDE_QUEUE_OWNER_BEAT_S": "1"}


@pytest.mark.timeout(600)
async def test_a_queue_replica_that_was_frozen_completes_at_most_what_waits_again(faulty: Stack) -> None:
    """A-Q-22, B-03: its answers came while it stood still; the other replica has long taken its deliveries."""
    async with ring(faulty, "proxy-1", "queue-1", "queue-2", **QUICK) as services, storm(services) as load:
        # A beat that the frozen replica has taken is lost with it: what it would have told is told by the next one.
        waits, again = [await load.agent(work_s=BUSY_S, heartbeat_s=5.0) for _ in range(2)]
        await services["queue-2"].stop()
        one = await _under_way(load, waits)
        two = await _under_way(load, again)
        await services["queue-2"].start()
        await services["queue-2"].ready()
        for item in (one, two):
            assert await holder(services, item) is services["queue-1"]
        # Paused, so that its row is still waiting when the late answer is read.
        await change(services, waits, "paused", value=True, paused=True)
        load.begin(load.agents[:-2])
        await load.more(20)
        await services["queue-1"].freeze()
        waits.behave(work_s=0.1)
        for agent in (waits, again):
            free(agent)
        await asyncio.sleep(away_s(30))  # the fault itself
        for agent in (waits, again):
            await agent.until(lambda agent=agent: _has_ended(agent, 0), within_s=60)  # type: ignore[misc]
        await again.until(lambda: len(again.received) == 2, within_s=60)
        await status(services, one, "queued")
        services["queue-1"].thaw()
        for item in (one, two):
            await _delivery_ended(services["queue-1"], item)
        await ended(load, one)
        await status(services, two, "dispatched")
        assert len(waits.received) == 1, "the late answer was enough"
        free(again)
        account = await load.account(within_s=240)
        account.check()
        assert {each.cause.whom for each in account.duplicates if each.cause} <= {"queue-1"}
        assert _answered_delivery(one) == 1
        assert _answered_delivery(two) == 2, "a row that is delivered again belongs to the new delivery"
        assert account.out_of_order() == []


@pytest.mark.timeout(600)
async def test_a_rolling_restart_hands_back_what_outlasts_the_drain(faulty: Stack) -> None:
    """B-05, B-30: turns longer than a drain of 3 s; written back without an attempt, and delivered again."""
    names = ("queue-1", "queue-2", "proxy-1", "proxy-2")
    async with ring(faulty, *names, BIDE_DRAIN_S="3", **QUICK) as services, storm(services, agents=6) as load:
        load.begin(load.agents)
        long: list[Sent] = []
        for name in ("queue-1", "queue-2"):
            agents: list[Agent] = []
            holders: set[Process] = set()
            while len(agents) < 3 or services[name] not in holders:  # whichever replica comes first takes an item
                agents.append(await load.agent(work_s=BUSY_S, heartbeat_s=5.0))
                long.append(await _under_way(load, agents[-1]))
                holders.add(await holder(services, long[-1]))
            await load.more(10)
            await _replace(services[name])
            for agent in agents:
                agent.behave(work_s=0.1)
                free(agent)
        live_at = [await load.agent(work_s=20.0, heartbeat_s=5.0) for _ in range(2)]
        live = [asyncio.create_task(load.send(agent, "live", proxy=n)) for n, agent in enumerate(live_at)]
        for agent in live_at:
            await agent.until(lambda agent=agent: len(agent.received) == 1)  # type: ignore[misc]
        for name in ("proxy-1", "proxy-2"):
            await load.more(10)
            await _replace(services[name])
        await load.more(10)
        account = await load.account(within_s=240)
        account.check()
        assert account.out_of_order() == []
        print("live forwards under the restart:", [task.result().fate for task in live])
        assert [(each.item or {}).get("status") for each in long] == ["completed"] * len(long)
        assert [(each.item or {}).get("attempts") for each in long] == [0] * len(long)
        handed_back = [each for each in long if len(account.runs[each.message_id]) > 1]
        assert handed_back, "no turn outlasted the drain of its owner"
        assert {each.cause.what for each in account.duplicates if each.cause} <= {"stopped"}
        assert account.overlaps() == 0
        assert all(process.logged("counters_corrected") == 0 for process in services.of("queue"))


async def _under_way(load: Storm, agent: Agent) -> Sent:
    """Send a message that is kept; come back when its agent has it."""
    sent = await load.send(agent, "long", prefer="wait=0")
    assert sent.promised
    await agent.until(lambda: any(each.message_id == sent.message_id for each in agent.received), within_s=60)
    return sent


async def _replace(process: Process) -> None:
    await process.stop()
    await process.start()
    await process.ready()


async def _delivery_ended(process: Process, sent: Sent) -> None:
    """Come back when this replica has heard the end of its delivery."""

    async def heard() -> bool:
        lines = process.log.read_text().splitlines()
        return any('"event": "delivery_ended"' in line and str(sent.queue_id) in line for line in lines)

    await until(heard)


def _has_ended(agent: Agent, turn: int) -> bool:
    return len(agent.received) > turn and agent.received[turn].outcome == "answered"


def _answered_delivery(sent: Sent) -> int:
    """Which delivery's answer the caller got; the agent says it in its metadata."""
    assert sent.item is not None
    answer = json.dumps(sent.item["answer"])
    found = [number for number in range(10) if f'"delivery": {number}}}' in answer]
    assert len(found) == 1, answer
    return found[0]
