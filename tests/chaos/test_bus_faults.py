"""Servers that stop, die and freeze under load: nothing is lost, nothing is set aside, everything comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from deploy.local.servers import Servers
from shared.broker import NotPublished, Publisher, PublishUnknown, open_publisher
from shared.facts import ItemChanged, ItemStatus, SessionStop
from tests.conftest import TEMPLATE, Stack, until
from tests.integration.conftest import make_clean, replica, stop, write_effects

AWAY_S = float(os.environ.get("BIDE_TEST_AWAY_S", "30"))


@pytest.fixture
async def own(own_servers: Servers) -> AsyncIterator[Stack]:
    url = await asyncio.to_thread(own_servers.postgres.create_database, "faults", TEMPLATE)
    stack = Stack(url, own_servers.rabbitmq.url)
    await make_clean(stack)
    yield stack
    await asyncio.to_thread(own_servers.postgres.drop_database, "faults")


async def test_postgres_away_under_load_costs_time_and_nothing_else(own: Stack, own_servers: Servers) -> None:
    """B-18, B-22, rule 4: 30 s without Postgres, 0 dead letters, every fact applied once."""
    published: list[str] = []
    async with replica(own) as one, replica(own) as two:
        for each in (one, two):
            each.reader.store(SessionStop, write_effects)
            await each.reader.start()
        enough = asyncio.Event()
        load = asyncio.create_task(_publish_until(enough, one.publisher, published))
        await until(lambda: _at_least(published, 50), within_s=60)
        await asyncio.to_thread(own_servers.postgres.stop, "immediate")
        before = len(published)
        await asyncio.sleep(AWAY_S)  # the outage itself
        during = len(published) - before
        await asyncio.to_thread(own_servers.postgres.start)
        await until(lambda: _at_least(published, before + during + 50), within_s=150)
        enough.set()
        await load

        async def applied() -> bool:
            return len(await one.effects()) >= len(published)

        await until(applied, within_s=150)
        assert await one.effects() == sorted(published)
        assert await one.dead_letters() == []
    print(f"postgres away {AWAY_S:g} s: {during} facts published meanwhile, {len(published)} applied once, 0 set aside")
    assert during > 50, "publishing must not depend on Postgres"


async def test_a_killed_broker_keeps_what_it_confirmed_and_readers_come_back(own: Stack, own_servers: Servers) -> None:
    """B-25, B-26: kill -9 of RabbitMQ; durable facts survive, consumers and each replica's own queues are back."""
    heard: asyncio.Queue[int] = asyncio.Queue()

    async def hear(facts: Sequence[ItemChanged]) -> None:
        for fact in facts:
            heard.put_nowait(fact.rev)

    async with open_publisher(own.settings()) as publisher:
        await asyncio.gather(*(publisher.publish(stop(str(i))) for i in range(500)))
    async with replica(own) as queue, replica(own, "proxy") as proxy:
        proxy.reader.hear(ItemChanged, hear)
        await proxy.reader.start()
        killed_at = time.monotonic()
        await asyncio.to_thread(own_servers.rabbitmq.kill)
        with pytest.raises((NotPublished, PublishUnknown)):
            await queue.publisher.publish(stop("lost"))
        await asyncio.to_thread(own_servers.rabbitmq.start)
        queue.reader.store(SessionStop, write_effects)
        await queue.reader.start()

        async def all_there() -> bool:
            return len(await queue.effects()) >= 500

        await until(all_there)
        assert [name for name in await queue.effects() if name != "lost"] == sorted(map(str, range(500)))
        rev = 0
        while True:
            rev += 1
            changed = ItemChanged(workspace_id="w", rev=rev, queue_id=stop("x").fact_id, status=ItemStatus.QUEUED)
            with contextlib.suppress(NotPublished, PublishUnknown):
                await queue.publisher.publish(changed)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.get(), 0.5)
                break
            assert time.monotonic() - killed_at < 60
        print(f"broker killed: all back {time.monotonic() - killed_at:.1f} s after the kill")


async def test_consumers_survive_a_broker_that_is_killed_under_load(own: Stack, own_servers: Servers) -> None:
    """Confirmed is kept, and each took effect once; what was told unknown may be there or not, but never twice."""
    confirmed: list[str] = []
    unknown: list[str] = []
    async with replica(own, confirm_timeout_s=2.0) as one:
        one.reader.store(SessionStop, write_effects)
        await one.reader.start()
        enough = asyncio.Event()
        load = asyncio.create_task(_publish_until(enough, one.publisher, confirmed, unknown))
        for _ in range(2):
            goal = len(confirmed) + 50
            await until(lambda goal=goal: _at_least(confirmed, goal), within_s=60)  # type: ignore[misc]
            await asyncio.to_thread(own_servers.rabbitmq.kill)
            await asyncio.to_thread(own_servers.rabbitmq.start)
        goal = len(confirmed) + 50
        await until(lambda: _at_least(confirmed, goal), within_s=60)
        enough.set()
        await load

        async def applied() -> bool:
            return set(confirmed) <= set(await one.effects())

        await until(applied, within_s=60)
        effects = await one.effects()
        assert len(effects) == len(set(effects))
        assert set(effects) <= set(confirmed) | set(unknown)
        assert await one.dead_letters() == []
    print(f"broker killed twice: {len(confirmed)} confirmed and applied once, {len(unknown)} unknown")


async def test_a_frozen_broker_is_unknown_within_the_timeout_and_not_ready(own: Stack, own_servers: Servers) -> None:
    """B-28: no confirm comes; whoever waited behind is told at once that nothing was promised."""
    async with replica(own, confirm_timeout_s=0.5) as one:
        await one.publisher.publish(stop("before"))
        await asyncio.to_thread(own_servers.rabbitmq.pause)
        try:
            first = one.publisher.post(stop("first"))
            await asyncio.sleep(0)  # let it leave: the second must wait behind it
            second = one.publisher.post(stop("second"))
            outcomes = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 10)
            assert [type(outcome) for outcome in outcomes] == [PublishUnknown, NotPublished]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await one.publisher.probe()
        finally:
            await asyncio.to_thread(own_servers.rabbitmq.resume)
        await until(lambda: _published(one.publisher))


async def _published(publisher: Publisher) -> bool:
    try:
        await publisher.publish(stop("after"))
    except (NotPublished, PublishUnknown):
        return False
    return True


async def _publish_until(
    enough: asyncio.Event, publisher: Publisher, confirmed: list[str], unknown: list[str] | None = None
) -> None:
    """Publish one fact after the other, about 200 a second; a refused one is tried again under a new id."""
    number = 0
    while not enough.is_set():
        number += 1
        name = f"{number:06}"
        try:
            await publisher.publish(stop(name))
            confirmed.append(name)
        except PublishUnknown:
            if unknown is not None:
                unknown.append(name)
        except NotPublished:
            pass
        await asyncio.sleep(0.005)


async def _at_least(published: list[str], count: int) -> bool:
    return len(published) >= count
