"""The scheduler's side of the bus, for tests of the queue: says what fires and changes, hears what became of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aio_pika
import asyncpg
import pytest
from uuid_utils.compat import uuid7

from bide_agent.agent import Agent
from shared.broker import Publisher
from shared.database import Connection, Pool
from shared.facts import ScheduleApplied, ScheduleChanged, ScheduleTick, TickSettled, WorkspaceRemoved
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.queue_kit import Door, door, queue_service

LONG = 60.0
"""A turn that ends when the test says so."""
TIMING = {"sweep_s": 0.3, "reconcile_s": 0.3, "busy_cap_s": 0.2, "follow_min_s": 0.1, "follow_max_s": 0.2,
          "checkpoint_grace_s": 0.0, "stop_grace_s": 0.0}  # fmt: skip
NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
TABLES = (
    "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, schedules, "
    "inbox, outbox, dead_letters"
)


class Calendar:
    """Schedules of one or more workspaces; a proxy's door to the queue besides."""

    def __init__(self, front: Door) -> None:
        self.front = front
        self.settled: list[TickSettled] = []

    @property
    def publisher(self) -> Publisher:
        return self.front.publisher

    @property
    def rows(self) -> Pool:
        return self.front.side.pool

    async def say(self, name: str, schedule: UUID, rev: int, prompt: str = "", **changes: Any) -> ScheduleApplied:
        """Say what a schedule says now, and wait until the queue holds it."""
        heard = len(self.front.applied)
        fact = ScheduleChanged(workspace_id=name, rev=rev, schedule_id=schedule, prompt=prompt, **changes)
        await self.publisher.publish(fact)

        async def holds() -> bool:
            return any(each.schedule_id == schedule and each.rev >= rev for each in self.front.applied[heard:])

        await until(holds)
        return next(each for each in self.front.applied[heard:] if each.schedule_id == schedule and each.rev >= rev)

    async def fire(self, name: str, schedule: UUID, minute: int, rev: int = 1, **changes: Any) -> UUID:
        """Publish the fire of this minute; the item that it becomes, if it becomes one."""
        fact = tick(name, schedule, minute, rev, **changes)
        await self.publisher.publish(fact)
        return fact.queue_id

    async def row(self, queue_id: UUID) -> asyncpg.Record | None:
        return await self.rows.fetchrow("SELECT * FROM a2a_queue WHERE queue_id = $1", queue_id)

    async def waiting(self, queue_id: UUID, merged_count: int = 1) -> None:
        """Come back when it waits and stands for so many."""

        async def stands() -> bool:
            row = await self.row(queue_id)
            return row is not None and (row["status"], row["merged_count"]) == ("queued", merged_count)

        await until(stands)

    async def outcomes(self, schedule: UUID, fires: int) -> dict[int, tuple[str, str | None]]:
        """Wait until so many fires are settled; what they came to, by minute. None is settled twice."""

        async def all_settled() -> bool:
            return len(self.of(schedule)) >= fires

        await until(all_settled)
        found = self.of(schedule)
        assert max(Counter(each.fire_at for each in found).values()) == 1, "a fire is settled once"
        return {_minute(each.fire_at): (each.outcome, each.reason) for each in found}

    def of(self, schedule: UUID) -> list[TickSettled]:
        return [each for each in self.settled if each.schedule_id == schedule]

    def told(self, schedule: UUID, minute: int) -> TickSettled:
        return next(each for each in self.of(schedule) if _minute(each.fire_at) == minute)

    async def remove(self, name: str) -> None:
        await self.publisher.publish(WorkspaceRemoved(workspace_id=name, rev=uuid7().int >> 80))

        async def removed() -> bool:
            return bool(await self.rows.fetchval("SELECT removed FROM workspaces WHERE workspace_id = $1", name))

        await until(removed)


def tick(name: str, schedule: UUID, minute: int, rev: int = 1, **changes: Any) -> ScheduleTick:
    return ScheduleTick(
        workspace_id=name, rev=rev, schedule_id=schedule, fire_at=at(minute), **{"queue_id": uuid7(), **changes}
    )


def at(minute: int) -> datetime:
    return NOON + timedelta(minutes=minute)


def _minute(moment: datetime) -> int:
    return int((moment - NOON).total_seconds() // 60)


def said(received: Any) -> dict[str, Any]:
    """What an agent was told of the fires that a message stands for."""
    told: dict[str, Any] = json.loads(received.body)["params"]["message"]["metadata"]["urn:bide:queue:1"]
    return told


def free(worker: Agent) -> None:
    """Let the agent's turns end now, as if their work were done."""
    for turn in [*worker._state.turns._running]:
        turn._asked.set()


@asynccontextmanager
async def calendar(stack: Stack) -> AsyncIterator[Calendar]:
    """Of an empty queue, whose service the test starts."""
    async with replica(stack, "scheduler") as side, door(stack) as front:
        await front.side.pool.execute(f"TRUNCATE {TABLES}")
        await _purge(stack)
        opened = Calendar(front)

        async def settled(_: Connection, facts: Sequence[TickSettled]) -> None:
            opened.settled += facts

        side.reader.store(TickSettled, settled)
        await side.reader.start()
        yield opened


@pytest.fixture
async def days(stack: Stack) -> AsyncIterator[Calendar]:
    """A calendar, and the queue service."""
    async with calendar(stack) as opened, queue_service(stack, **TIMING):
        yield opened
        counters = "SELECT workspace_id, waiting, running FROM workspaces WHERE waiting < 0 OR running < 0"
        assert not await opened.rows.fetch(counters)


def fresh() -> tuple[str, UUID]:
    """A workspace and a schedule of it."""
    return f"w-{uuid7().hex[-8:]}", uuid7()


async def counted(days: Calendar, name: str) -> tuple[int, int]:
    row = await days.rows.fetchrow("SELECT waiting, running FROM workspaces WHERE workspace_id = $1", name)
    return (row["waiting"], row["running"]) if row else (0, 0)


async def _purge(stack: Stack) -> None:
    async with await aio_pika.connect(stack.amqp_url) as connection:
        channel = await connection.channel()
        for name in ("scheduler.tick.settled", "queue.schedule.tick", "queue.schedule.changed"):
            await (await channel.get_queue(name)).purge()
