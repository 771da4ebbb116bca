"""Services that are killed, stopped and replaced under a storm: what was promised is delivered or visibly ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from bide_agent.agent import Agent
from tests.chaos.conftest import away_s
from tests.chaos.kit.account import Sent
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack, until
from tests.e2e.conftest import BUSY_S
from tests.integration.calendar_kit import free

QUICK = {"BIDE_QUEUE_OWNER_SILENT_S": "6", "BIDE_QUEUE_OWNER_BEAT_S": "1"}
"""A dead owner is noticed after 6 s instead of 20: the same rule on a shorter clock."""


async def test_a_queue_service_killed_three_times_loses_nothing_and_poisons_nothing(faulty: Stack) -> None:
    """A-Q-12, A-Q-18: with a message that is under way through all three deaths."""
    async with ring(faulty, **QUICK) as services, storm(services) as load:
        long = await load.agent(work_s=BUSY_S, heartbeat_s=5.0)
        load.begin(load.agents[:-1])
        first = await load.send(long, "under way", prefer="wait=0")
        assert first.promised
        for death in range(1, 4):
            await long.until(lambda death=death: len(long.received) >= death, within_s=60)  # type: ignore[misc]
            await load.more(20)
            await services["queue-1"].kill()
            if death == 3:
                long.behave(work_s=0.1)
            free(long)
            await load.more(20)
            await services["queue-1"].start()
        account = await load.account(within_s=240)
        account.check()
        assert first.item is not None
        assert first.item["status"] == "completed", first.item
        assert account.out_of_order() == []


async def test_while_a_proxy_is_dead_callers_go_on_with_the_other(faulty: Stack) -> None:
    """B-30: each of two proxies is killed in turn; also the one that the agents beat to."""
    async with ring(faulty, "proxy-1", "proxy-2", "queue-1", **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        for name in ("proxy-2", "proxy-1"):
            await load.more(15)
            await services[name].kill()
            goal = load.runs() + 30  # most are answered: who tries the dead proxy first comes later, to an idle agent
            await until(lambda goal=goal: _has_run(load, goal), within_s=60)  # type: ignore[misc]
            await services[name].start()
            await services[name].ready()
        await load.more(15)
        account = await load.account()
        account.check()
        assert account.out_of_order() == []


async def test_all_four_services_killed_at_once_come_back_with_everything(faulty: Stack) -> None:
    """A-Q-12, B-30: nothing that was promised lived in a process."""
    names = ("proxy-1", "queue-1", "scheduler-1", "liveness-1")
    async with ring(faulty, *names, **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        await load.more(60)
        await asyncio.gather(*(services[name].kill() for name in names))
        await asyncio.gather(*(services[name].start() for name in names))
        await asyncio.gather(*(services[name].ready() for name in names))
        await load.more(60)
        account = await load.account()
        account.check()
        assert account.out_of_order() == []


@pytest.mark.timeout(600)
async def test_without_a_queue_service_idle_agents_answer_and_the_broker_keeps(faulty: Stack) -> None:
    """B-25: past the age at which a copy of the backlog is stale; what was kept meanwhile comes in its order."""
    async with ring(faulty, **QUICK) as services, storm(services) as load:
        quiet = [await load.agent(work_s=0.1) for _ in range(2)]
        hurt = await load.agent(work_s=1.0)
        await load.warm()
        load.begin(load.agents[:-3])
        await load.more(30)
        under_way = await load.send(hurt, "under way when its owner dies", prefer="wait=0")
        await hurt.until(lambda: any(each.message_id == under_way.message_id for each in hurt.received))
        await services["queue-1"].kill()
        before = load.promised()
        live = await _ask_each_second(load, quiet, away_s(30))
        meanwhile = load.promised() - before
        # By now the copy that calls it busy is stale, and its own beats call it idle.
        live.append(await load.send(hurt, "idle again"))
        await services["queue-1"].start()
        await services["queue-1"].ready()
        await load.more(20)
        account = await load.account(within_s=240)
        print(f"queue service away {away_s(30):g} s: {len(live)} answered live, {meanwhile} kept by the broker")
        account.check()
        assert [each for each in live if not each.answered or each.promised] == []
        assert meanwhile > 30
        assert account.out_of_order() == []
        assert account.passed_a_backlog() == []


async def _has_run(load: Storm, messages: int) -> bool:
    return load.runs() >= messages


async def _ask_each_second(load: Storm, agents: Sequence[Agent], for_s: float) -> list[Sent]:
    """Send to idle agents for the length of an outage."""
    ends_at = time.monotonic() + for_s
    sent: list[Sent] = []
    while time.monotonic() < ends_at:
        sent += await asyncio.gather(*(load.send(agent, "are you there", caller="anybody") for agent in agents))
        await asyncio.sleep(1)  # the outage itself
    return sent
