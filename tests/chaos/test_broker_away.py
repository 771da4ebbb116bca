"""RabbitMQ stops, dies, freezes and blocks under a storm: no message is delivered twice, and what is kept goes on.

What is in Postgres needs no broker, and an agent that is idle needs neither: only new promises do.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from deploy.local.servers import Servers
from shared.broker import NotPublished, Publisher, PublishUnknown
from shared.database import Connection
from shared.facts import SessionStop
from tests.chaos.conftest import away_s
from tests.chaos.kit.broker import Watch, depth, fill, outage, unready, watch, well
from tests.chaos.kit.processes import Ring, ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack, until
from tests.integration.conftest import make_clean, replica, stop, write_effects

RING = ("proxy-1", "proxy-2", "queue-1", "queue-2")
_WORK_S = 0.5
Trouble = Callable[[], object]


async def _survive(faulty: Stack, what: str, begin: Trouble, end: Trouble, for_s: float) -> Watch:
    """Run the storm through one outage, look on, let everything come back, and close the books."""
    async with ring(faulty, *RING) as services, storm(services, agents=6) as load:
        idle = await load.agent()
        busy = await load.agent(work_s=_WORK_S)
        await load.warm()
        await fill(load, busy, 10 + math.ceil(for_s / _WORK_S))
        load.begin(load.agents[:6])
        await load.more(20)
        async with outage(services, what, begin, end):
            # Before the watcher, who does not come back: whoever is first at a proxy waits for the confirm.
            first = asyncio.gather(
                *(load.send(busy, f"first {n}", caller=f"first-{n}", proxy=n, prefer="wait=0") for n in range(2))
            )
            seen = await watch(load, busy=busy, idle=idle, for_s=for_s)
            print(f"/readyz: {await unready(load)}")
        await first
        await _flows_again(services, load)
        seen.told = sum((each.told for each in load.sent), Counter())
    print(f"{what} {for_s:g} s: {seen}")
    assert seen.delivered > 0
    assert seen.idle_answered > 0
    return seen


async def _flows_again(services: Ring, load: Storm) -> None:
    await load.more(20)
    await well(services)
    account = await load.account(within_s=240)
    account.check()
    assert account.out_of_order() == []
    assert account.duplicates == []
    assert account.overlaps() == 0


@pytest.mark.timeout(600)
async def test_a_broker_that_stops_for_ten_seconds_duplicates_nothing(faulty: Stack, own_servers: Servers) -> None:
    """B-25: an orderly stop and start; new messages for busy agents are told that nothing was promised."""
    broker = own_servers.rabbitmq
    seen = await _survive(faulty, "stopped", broker.stop, broker.start, away_s(10))
    assert set(seen.refusals) == {"not_kept"}


@pytest.mark.timeout(600)
async def test_a_killed_broker_duplicates_nothing(faulty: Stack, own_servers: Servers) -> None:
    """B-25, B-30: kill -9; batches that were under way and not acknowledged come again and have no second effect."""
    broker = own_servers.rabbitmq
    seen = await _survive(faulty, "killed", broker.kill, broker.start, away_s(10))
    assert "not_kept" in seen.refusals


@pytest.mark.timeout(600)
async def test_a_broker_away_for_thirty_seconds_duplicates_nothing(faulty: Stack, own_servers: Servers) -> None:
    """B-25: longer than a copy of the backlog is believed; idle agents stay reachable all the while."""
    broker = own_servers.rabbitmq
    seen = await _survive(faulty, "away", broker.stop, broker.start, away_s(30))
    assert set(seen.refusals) == {"not_kept"}


@pytest.mark.timeout(600)
async def test_a_frozen_broker_leaves_nobody_hanging(faulty: Stack, own_servers: Servers) -> None:
    """B-25, B-28: SIGSTOP for 20 s; connections stay open, no confirm comes, and every caller is told so in time."""
    broker = own_servers.rabbitmq
    seen = await _survive(faulty, "frozen", broker.pause, broker.resume, away_s(20))
    assert seen.told["keep_unknown"]


@pytest.mark.timeout(600)
async def test_a_memory_alarm_blocks_promises_and_nothing_else(faulty: Stack, own_servers: Servers) -> None:
    """B-28: RabbitMQ reads no publisher's connection; whoever was told `keep_unknown` comes back, and is kept once."""
    broker = own_servers.rabbitmq
    seen = await _survive(faulty, "blocked", lambda: broker.limit_memory(0), broker.limit_memory, away_s(10))
    assert seen.told["keep_unknown"]


async def test_readers_acknowledge_under_a_memory_alarm(faulty: Stack, own_servers: Servers) -> None:
    """B-28: a blocked publisher's neighbour reads on; what it acknowledged meanwhile does not come again."""
    broker = own_servers.rabbitmq
    go = asyncio.Event()

    async def write_slowly(connection: Connection, facts: Sequence[SessionStop]) -> None:
        await go.wait()
        await write_effects(connection, facts)

    await make_clean(faulty)
    async with replica(faulty, confirm_timeout_s=1.0) as one:
        one.reader.store(SessionStop, write_slowly)
        await one.reader.start()
        for number in range(20):  # one by one: more batches than are prefetched
            await one.publisher.publish(stop(str(number)))
        await asyncio.to_thread(broker.limit_memory, 0)
        try:
            await until(lambda: _is_blocked(one.publisher))
            go.set()

            async def all_written_and_acknowledged() -> bool:
                return len(await one.effects()) >= 20 and await depth(faulty, "queue.session.stop") == 0

            await until(all_written_and_acknowledged)
            await one.reader.stop()
            assert await depth(faulty, "queue.session.stop") == 0  # what was not acknowledged would be back by now
        finally:
            await asyncio.to_thread(broker.limit_memory)
        await until(lambda: _is_published(one.publisher))
        assert len([name for name in await one.effects() if name.isdigit()]) == 20


async def _is_published(publisher: Publisher) -> bool:
    try:
        await publisher.publish(stop("probe"))
    except (NotPublished, PublishUnknown):
        return False
    return True


async def _is_blocked(publisher: Publisher) -> bool:
    return not await _is_published(publisher)
