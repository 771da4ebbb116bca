"""What has gone wrong on buses elsewhere, on a real broker: each test names its scenario."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from prometheus_client import REGISTRY

from services.queue.handlers import Handlers
from shared import database
from shared.broker import reconnect_interval_s
from shared.database import Connection, Pool, open_pool
from shared.facts import SessionStop, WorkspaceHeartbeat
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica, stop, write_effects

STORM = 10_000


async def _has(one: Replica, *effects: str) -> bool:
    return await one.effects() == sorted(effects)


async def test_a_channel_that_the_broker_closed_comes_back_and_nothing_takes_effect_twice(clean: Stack) -> None:
    """B-27: 406 while a handler works, as `consumer_timeout` does it: delivered again, in effect once, read on."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    calls: list[list[str]] = []

    async def handle(connection: Connection, facts: Sequence[SessionStop]) -> None:
        calls.append([fact.session_id for fact in facts])
        await write_effects(connection, facts)
        begun.set()
        await go_on.wait()

    async with replica(clean) as one:
        one.reader.store(SessionStop, handle)
        await one.reader.start()
        await one.publisher.publish(stop("a"))
        await begun.wait()
        (subscriber,) = one.reader.broker.subscribers
        consumed: Any = subscriber._queue_obj  # type: ignore[attr-defined]
        channel = await consumed.channel.get_underlay_channel()
        await channel.basic_ack(4711)  # no such delivery: the server closes the channel with 406
        await asyncio.wait_for(asyncio.wait([channel.closing]), 10)
        go_on.set()
        await one.publisher.publish(stop("b"))
        await until(lambda: _has(one, "a", "b"))
        await one.reader.stop()
        assert await one.dead_letters() == []
    duplicates = REGISTRY.get_sample_value("bide_facts_read_total", {"fact": "SessionStop", "outcome": "duplicate"})
    print(f"channel closed under a handler: {len(calls)} calls, {duplicates:g} duplicates met since the start")


def waits() -> float:
    return REGISTRY.get_sample_value("bide_infrastructure_waits_total", {"fact": "SessionStop"}) or 0.0


async def test_a_pool_without_a_free_connection_is_waited_for(clean: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """B-22: more batches than connections, and none is free for longer than one waits for it: all of them come."""
    monkeypatch.setattr(database, "ACQUIRE_TIMEOUT_S", 0.2)
    before = waits()
    async with replica(clean, database_pool_max=2) as one:
        one.reader.store(SessionStop, write_effects)
        await one.publisher.publish(stop("first"))  # its partition of the inbox is there by then
        await one.reader.start()
        await until(lambda: _has(one, "first"))
        async with one.pool.acquire(), one.pool.acquire():
            for number in range(20):
                await one.publisher.publish(stop(f"{number:02}"))

            async def waited() -> bool:
                return waits() >= before + 8

            await until(waited)
        await until(lambda: _has(one, "first", *(f"{number:02}" for number in range(20))))
        await one.reader.probe()
        await one.reader.stop()
        assert await one.dead_letters() == []


def test_two_hundred_processes_do_not_come_back_in_one_moment() -> None:
    """B-31: the pause before a new connection is each process's own; the driver's is the same for all."""
    pauses = [reconnect_interval_s() for _ in range(200)]
    assert len(set(pauses)) > 190
    assert min(pauses) < 0.7
    assert max(pauses) > 1.3


@pytest.fixture
async def workspaces(stack: Stack) -> AsyncIterator[Pool]:
    async with open_pool(stack.settings()) as pool:
        await pool.execute("TRUNCATE workspaces, workspace_ids, a2a_queue")
        yield pool


def storm(count: int) -> list[WorkspaceHeartbeat]:
    """Beats of 50 workspaces as they pile up in an outage, in no order."""
    now = datetime.now(UTC)
    beats = [
        WorkspaceHeartbeat(
            workspace_id=f"w{number % 50:02}",
            rev=number,
            occurred_at=now + timedelta(milliseconds=number),
            incarnation=1,
            active_tasks=number % 3,
        )
        for number in range(1, count + 1)
    ]
    random.Random(7).shuffle(beats)
    return beats


class Woken:
    """Stands where the drain stands, and counts what it is asked for."""

    def __init__(self) -> None:
        self.looks = 0

    def alive(self, _workspace_id: str) -> None: ...

    def wake(self, workspace_ids: Any) -> None:
        self.looks += len(list(workspace_ids))


async def test_beats_that_piled_up_in_an_outage_are_merged_before_any_row_is_written(
    clean: Stack, workspaces: Pool
) -> None:
    """B-31: 10,000 beats of 50 workspaces, shuffled: the newest of each holds, and a batch writes each row once."""
    await workspaces.execute(
        "INSERT INTO workspaces (workspace_id, waiting) "
        "SELECT 'w' || to_char(n, 'FM00'), 1 FROM generate_series(0, 49) n"
    )
    woken: Any = Woken()
    silent: Any = None
    async with replica(clean) as one:
        handlers = Handlers(silent, silent, woken)
        await asyncio.gather(*(one.publisher.post(beat) for beat in storm(STORM)))
        one.reader.store(WorkspaceHeartbeat, handlers.heartbeats)
        await one.reader.start()

        async def newest() -> bool:
            found = await workspaces.fetch("SELECT workspace_id, beat_rev FROM workspaces")
            return all(row["beat_rev"] == STORM - (STORM - int(row["workspace_id"][1:])) % 50 for row in found)

        await until(newest)
        await one.reader.stop()
    written = await workspaces.fetchval("SELECT sum(rev) FROM workspaces")
    batches = -(-STORM // 256)
    print(f"{STORM} beats of 50 workspaces: {written} row writes, {woken.looks} looks of the drain")
    assert written <= 50 * (batches + 1)
    assert woken.looks <= 50 * (batches + 1)


async def test_a_batch_of_beats_costs_as_many_statements_as_one_beat(workspaces: Pool) -> None:
    """B-32: 500 workspaces that beat are two batches, a handful of statements, and one row write each."""
    silent: Any = Woken()
    handlers = Handlers(silent, silent, silent)
    now = datetime.now(UTC)

    def beats(first: int, count: int, rev: int) -> list[WorkspaceHeartbeat]:
        return [
            WorkspaceHeartbeat(workspace_id=f"w{n}", rev=rev, occurred_at=now, incarnation=1, active_tasks=0)
            for n in range(first, first + count)
        ]

    async def statements(facts: list[WorkspaceHeartbeat]) -> int:
        seen: list[str] = []

        def note(record: asyncpg.connection.LoggedQuery) -> None:
            seen.append(record.query)

        async with workspaces.acquire() as connection, connection.transaction():
            connection.add_query_logger(note)
            await handlers.heartbeats(connection, facts)
            connection.remove_query_logger(note)
        return len(seen)

    for first in (0, 250):
        await statements(beats(first, 250, 1))
    one = await statements(beats(0, 1, 2))
    fleet = [await statements(beats(first, 250, 3)) for first in (0, 250)]
    print(f"statements per batch: {one} for 1 beat, {fleet} for 2 x 250")
    assert fleet == [one, one]
    assert one <= 3
    assert await workspaces.fetchval("SELECT sum(rev) FROM workspaces") == 1001
