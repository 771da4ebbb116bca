"""Postgres restarts, is away, read-only, full or frozen: nothing is lost, set aside, or delivered twice.

The faults are not noted in the books on purpose: an outage of the database explains no duplicate.
"""

from __future__ import annotations

import asyncio

import pytest

from bide_agent.agent import Agent
from deploy.local.servers import Servers
from tests.chaos.conftest import away_s
from tests.chaos.kit import database
from tests.chaos.kit.database import close_books
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)
QUICK = {"BIDE_QUEUE_OWNER_SILENT_S": "8", "BIDE_QUEUE_OWNER_BEAT_S": "1"}
"""Deliveries of a silent owner are taken after 8 s: an outage that is longer would take everybody's."""
RING = ("proxy-1", "queue-1", "queue-2")


async def test_postgres_restarted_three_times_at_once_loses_nothing_and_repeats_nothing(
    faulty: Stack, own_servers: Servers
) -> None:
    """B-18: `immediate` each time, so that it recovers from its log under load."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        for _ in range(3):
            await load.more(30)
            await asyncio.to_thread(own_servers.postgres.stop, "immediate")
            await asyncio.to_thread(own_servers.postgres.start)
        await load.more(30)
        await close_books(faulty, services, load)


async def outage(load: Storm, idle: Agent, length_s: float) -> None:
    """What must go on meanwhile: promises by the broker's confirm alone, live forwards, heartbeats."""
    beats = {agent.workspace: agent.beats for agent in load.agents}
    promises = asyncio.create_task(load.more(30))
    over = asyncio.create_task(asyncio.sleep(length_s))
    while not over.done():
        forward = await load.send(idle, "forwarded")
        assert forward.answered, forward
        await asyncio.wait([over], timeout=2)
    await promises
    for agent in load.agents:
        await agent.until(lambda agent=agent: agent.beats >= beats[agent.workspace] + 2)  # type: ignore[misc]


async def test_while_postgres_is_away_the_door_stays_open_and_what_was_answered_is_written_afterwards(
    faulty: Stack, own_servers: Servers
) -> None:
    """B-18, B-22: two replicas of the queue come back seconds apart; neither takes the other for dead."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        idle = await load.agent(heartbeat_s=5.0, work_s=0.1)
        long = await load.agent(heartbeat_s=5.0, work_s=0.1)
        await load.warm()
        long.behave(work_s=12.0)
        load.begin(load.agents[:-2])
        under_way = [await load.send(long, f"under way {number}", prefer="wait=0") for number in range(2)]
        await long.until(lambda: long.received[-1].ended_at is None, within_s=60)
        had = len(long.received)
        await load.more(20)
        with services["queue-2"].postgres.refusing():
            await asyncio.to_thread(own_servers.postgres.stop, "immediate")
            await outage(load, idle, away_s(30.0))
            assert long.received[-1].ended_at is not None  # it answered meanwhile
            await asyncio.to_thread(own_servers.postgres.start)
            await database.beaten(faulty, 1)
            await asyncio.sleep(5)  # the length of the fault: how much later the other replica is back
        await load.more(20)
        await close_books(faulty, services, load)
        assert [each.item["status"] for each in under_way if each.item] == ["completed", "completed"]
        assert len(long.received) == had + 1


async def test_a_primary_that_became_read_only_is_left_for_one_that_writes(faulty: Stack) -> None:
    """B-18: sessions that were opened meanwhile stay read-only (25006), and nobody but the services ends them."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        idle = await load.agent(heartbeat_s=5.0, work_s=0.1)
        await load.warm()
        load.begin(load.agents[:-1])
        await load.more(20)
        async with database.read_only(faulty):
            await outage(load, idle, away_s(15.0))
        await load.more(20)
        await close_books(faulty, services, load)


async def test_a_full_postgres_is_waited_for(faulty: Stack) -> None:
    """B-22: 53300 for every new connection, and no old one is left."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        idle = await load.agent(heartbeat_s=5.0, work_s=0.1)
        await load.warm()
        load.begin(load.agents[:-1])
        await load.more(20)
        async with database.no_room(faulty):
            await outage(load, idle, away_s(12.0))
        await load.more(20)
        await close_books(faulty, services, load)


async def test_a_frozen_postgres_is_waited_for(faulty: Stack, own_servers: Servers) -> None:
    """B-25: connections stay open and nothing answers, longer than an owner may be silent."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        idle = await load.agent(heartbeat_s=5.0, work_s=0.1)
        await load.warm()
        load.begin(load.agents[:-1])
        await load.more(20)
        await asyncio.to_thread(own_servers.postgres.pause)
        try:
            await outage(load, idle, away_s(20.0))
        finally:
            await asyncio.to_thread(own_servers.postgres.resume)
        await load.more(20)
        await close_books(faulty, services, load)
