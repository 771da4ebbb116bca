"""The scheduler's steps on its rows, a child process that only fires, and the proxy's side of the bus, for tests."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.scheduler import store
from services.scheduler.__main__ import main
from services.scheduler.answers import Answers
from services.scheduler.handlers import Handlers
from services.scheduler.settings import Settings
from services.scheduler.ticking import Ticking
from shared.batches import decode_batch
from shared.broker import Publisher
from shared.database import Connection, Pool, transact
from shared.facts import Fact, FactT, QueryAnswered, ScheduleChanged, ScheduleQuery, ScheduleTick, TickSettled
from shared.intake import Tell
from tests.conftest import Stack

TABLES = "schedules, fires, audit, workspaces, outbox, inbox, dead_letters"
T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def scheduler_settings(stack: Stack, **changes: object) -> Settings:
    values = {**stack.settings("scheduler").model_dump(), "log_level": "warning", **changes}
    if "replica_id" not in changes:
        values.pop("replica_id")
    return Settings.model_validate(values)


@asynccontextmanager
async def scheduler_service(stack: Stack, **changes: object) -> AsyncIterator[asyncio.Task[None]]:
    """The service itself, in this process; at the end it is told to stop as by SIGTERM."""
    task = asyncio.create_task(main(scheduler_settings(stack, **{"drain_s": 5.0, **changes})))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Calendar:
    """One replica's handlers and loop, called directly; the outbox is read instead of the bus."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.pool = pool
        self.woken = 0
        self.ticking = Ticking(settings, pool, told=lambda: None)
        self.handlers = Handlers(self._wake)
        self._said: list[QueryAnswered] = []
        self._answers = Answers(settings, self, self._wake)  # type: ignore[arg-type]

    def _wake(self) -> None:
        self.woken += 1

    def post(self, fact: Fact, *, to: str | None = None) -> None:
        """What the answers call of a publisher."""
        assert isinstance(fact, QueryAnswered), to
        self._said.append(fact)

    async def ask(self, *queries: ScheduleQuery) -> list[tuple[int, dict[str, Any]]]:
        """What is answered to these questions, asked in one batch."""
        self._said = []

        async def work(connection: Connection) -> Tell:
            return await self._answers.query(connection, queries)

        (await transact(self.pool, work))()
        by_id = {said.query_id: said for said in self._said}
        return [(by_id[each.query_id].status, Fact_body(by_id[each.query_id])) for each in queries]

    async def do(self, verb: str, schedule_id: UUID | None, **about: Any) -> tuple[int, dict[str, Any]]:
        (answer,) = await self.ask(query(verb, schedule_id, **about))
        return answer

    async def create(self, **body: Any) -> UUID:
        """A schedule that is there now; every half hour, if nothing else is said."""
        schedule_id = uuid7()
        status, said = await self.do("create", schedule_id, body={**_DEFAULT(body), **body})
        assert status == 201, said
        return schedule_id

    async def fire(self, now: datetime | None = None) -> None:
        """Turn until nothing is due."""
        while await self.ticking.run_once(now) == 0.0:
            pass

    async def settle(self, *facts: TickSettled) -> None:
        async def work(connection: Connection) -> Tell:
            return await self.handlers.settled(connection, facts)

        (await transact(self.pool, work))()

    async def row(self, schedule_id: UUID) -> asyncpg.Record:
        row = await self.pool.fetchrow("SELECT * FROM schedules WHERE schedule_id = $1", schedule_id)
        assert row is not None
        return row

    async def due_at(self, schedule_id: UUID, moment: datetime) -> None:
        """Let its next moment be this one."""
        await self.pool.execute(
            "UPDATE schedules SET next_fire_at = $2, due_at = $2 WHERE schedule_id = $1", schedule_id, moment
        )

    async def fires(self, schedule_id: UUID) -> list[asyncpg.Record]:
        return await self.pool.fetch("SELECT * FROM fires WHERE schedule_id = $1 ORDER BY fire_at", schedule_id)

    async def told(self, kind: type[FactT]) -> list[FactT]:
        rows = await self.pool.fetch("SELECT fact FROM outbox WHERE fact_type = $1 ORDER BY id", kind.__name__)
        return [kind.model_validate_json(row["fact"]) for row in rows]

    async def ticks(self) -> list[ScheduleTick]:
        return await self.told(ScheduleTick)

    async def changes(self) -> list[ScheduleChanged]:
        return await self.told(ScheduleChanged)


def Fact_body(said: QueryAnswered) -> dict[str, Any]:  # noqa: N802
    import json  # noqa: PLC0415

    body: dict[str, Any] = json.loads(said.body)
    return body
