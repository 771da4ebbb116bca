"""The scheduler's steps on its rows, a child process that only fires, and the proxy's side of the bus, for tests."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.scheduler.__main__ import main
from services.scheduler.answers import Answers
from services.scheduler.handlers import Handlers
from services.scheduler.settings import Settings
from services.scheduler.ticking import Ticking
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import Fact, FactT, QueryAnswered, ScheduleChanged, ScheduleQuery, ScheduleTick, TickSettled
from shared.intake import Tell
from tests.conftest import Stack

TABLES = "schedules, fires, audit, workspaces, sessions, activities, outbox, inbox, dead_letters"
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


def whole(**body: Any) -> dict[str, Any]:
    """A schedule as its caller writes it: every half hour, if nothing else is said."""
    rule = {} if body.keys() & {"cron", "every_s", "at"} else {"cron": "*/30 * * * *"}
    return {"name": str(uuid7()), "prompt": "look", **rule, **body}


def query(verb: str, schedule_id: UUID | None, **about: Any) -> ScheduleQuery:
    body = about.pop("body", {})
    values = {
        "workspace_id": "w", "rev": 1, "query_id": uuid7(), "verb": verb, "schedule_id": schedule_id, "by": "anna",
        "body": body if isinstance(body, bytes) else json.dumps(body).encode(),
        "expires_at": datetime.now(UTC) + timedelta(minutes=1), "reply_to": "r", **about,
    }  # fmt: skip
    return ScheduleQuery.model_validate(values)


def settled(tick: ScheduleTick, outcome: str, **about: Any) -> TickSettled:
    return TickSettled.model_validate(
        {
            "workspace_id": tick.workspace_id,
            "rev": tick.rev,
            "schedule_id": tick.schedule_id,
            "fire_at": tick.fire_at,
            "outcome": outcome,
            "queue_id": tick.queue_id,
            **about,
        }
    )


class Calendar:
    """One replica's handlers and loop, called directly; the outbox is read instead of the bus."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.pool = pool
        self.woken = 0
        self.ticking = Ticking(settings, pool, told=lambda: None)
        self.handlers = Handlers(self._wake, self._wake)
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
        return [(by_id[each.query_id].status, json.loads(by_id[each.query_id].body)) for each in queries]

    async def do(self, verb: str, schedule_id: UUID | None, **about: Any) -> tuple[int, dict[str, Any]]:
        (answer,) = await self.ask(query(verb, schedule_id, **about))
        return answer

    async def create(self, **body: Any) -> UUID:
        """A schedule that is there now; every half hour, if nothing else is said."""
        schedule_id = uuid7()
        status, said = await self.do("create", schedule_id, body=whole(**body))
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


_MANY = """
INSERT INTO schedules (schedule_id, workspace_id, name, cron, timezone, anchor_at, prompt, context, overlap, priority,
                       jitter_s, next_fire_at, due_at)
SELECT gen_random_uuid(), 'w' || n % 100, gen_random_uuid()::text, $2, 'UTC', now(), 'p', 'fresh', 'queue_one',
       'TASK', 0, $3, $3
FROM generate_series(1, $1) AS n"""


async def many(pool: Pool, count: int, moment: datetime, *, cron: str = "0 0 1 1 *") -> None:
    """So many schedules with this moment; once a year, unless the expression says otherwise."""
    await pool.execute(_MANY, count, cron, moment)
    await pool.execute("ANALYZE schedules")


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.integration.scheduler_kit"])


def child(settings: Settings, now: datetime | None, *, dies_after: int | None = None) -> ForkServerProcess:
    """A process that only fires, until nothing is due; `dies_after` so many statements it kills itself."""
    process = _processes.Process(target=_fire_all, args=(settings.model_dump(), now, dies_after))
    process.start()
    return process


def _fire_all(values: dict[str, Any], now: datetime | None, dies_after: int | None) -> None:
    asyncio.run(_firing(Settings.model_validate(values), now, dies_after))


async def _firing(settings: Settings, now: datetime | None, dies_after: int | None) -> None:
    said = 0

    def count(_record: object) -> None:
        nonlocal said
        said += 1
        if said == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    async def listen(connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if dies_after is not None:
            connection.add_query_logger(count)

    url = settings.database_url.get_secret_value()
    async with asyncpg.create_pool(url, min_size=1, max_size=1, init=listen) as pool:
        ticking = Ticking(settings, pool, told=lambda: None)
        while await ticking.run_once(now) == 0.0:
            pass


async def ended(process: ForkServerProcess, within_s: float = 60.0) -> int | None:
    await asyncio.to_thread(process.join, within_s)
    return process.exitcode


async def accounts(pool: Pool) -> dict[str, int]:
    """What stands after all was fired: fires and ticks, and how far they differ."""
    async with pool.acquire() as connection, connection.transaction():
        # What no service asks: row by row, as the role has it, 10,000 of each would take a minute.
        await connection.execute("SET LOCAL enable_hashjoin = on")
        row = await connection.fetchrow(
            """WITH ticks AS (
                 SELECT convert_from(fact, 'UTF8')::json AS fact FROM outbox WHERE fact_type = 'ScheduleTick')
               SELECT (SELECT count(*) FROM fires) AS fires,
                      (SELECT count(*) FROM ticks) AS ticks,
                      (SELECT count(DISTINCT (fact->>'schedule_id', fact->>'fire_at')) FROM ticks) AS distinct_ticks,
                      (SELECT count(*) FROM fires f JOIN ticks t ON f.queue_id = (t.fact->>'queue_id')::uuid) AS paired,
                      (SELECT sum(fires_total) FROM schedules) AS counted"""
        )
    assert row is not None
    return dict(row)


@pytest.fixture
async def calendar(stack: Stack) -> AsyncIterator[Calendar]:
    """One replica on empty tables."""
    settings = scheduler_settings(stack)
    async with open_pool(settings) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        yield Calendar(settings, pool)
