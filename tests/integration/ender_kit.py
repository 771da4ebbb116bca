"""The end of sessions on real tables, in the test's time: facts are handed in, and what is said is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.scheduler.sessions import Sessions
from services.scheduler.settings import Settings
from shared.database import Connection, Pool, transact
from shared.facts import (
    BacklogSnapshot,
    Fact,
    GateClosed,
    KillDone,
    NamedBacklog,
    Running,
    SessionDirective,
    SessionGate,
    SessionKill,
    SessionStop,
    WorkspaceChanged,
)
from shared.intake import Tell
from tests.conftest import Stack
from tests.integration.scheduler_kit import TABLES, Calendar, query, scheduler_settings

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SHORT = {"session_ceiling_s": 100.0, "checkpoint_grace_s": 20.0, "stop_grace_s": 10.0}
"""As in the tables of tests/unit/test_scheduler_session_steps.py."""
_CLOCK = """
CREATE SCHEMA session_time;
GRANT USAGE ON SCHEMA session_time TO bide_scheduler;
CREATE TABLE session_time.clock (now timestamptz NOT NULL);
INSERT INTO session_time.clock VALUES (now());
GRANT SELECT, UPDATE ON session_time.clock TO bide_scheduler;
CREATE FUNCTION session_time.clock_timestamp() RETURNS timestamptz
  LANGUAGE sql STABLE AS 'SELECT now FROM session_time.clock';
CREATE FUNCTION session_time.now() RETURNS timestamptz
  LANGUAGE sql STABLE AS 'SELECT now FROM session_time.clock'"""
_IN_TEST_TIME = {"search_path": "scheduler, session_time, pg_catalog"}
EMPTY = f"TRUNCATE {TABLES}; UPDATE last_snapshot SET at = '-infinity', snapshot_id = NULL"
FactT = TypeVar("FactT", bound=Fact)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def runs(session_id: str, began_s: float = 0.0, **about: Any) -> Running:
    return Running(session_id=session_id, started_at=at(began_s), **about)


def backlog(*running: Running, name: str = "w", **about: Any) -> NamedBacklog:
    values = {
        "workspace_id": name,
        "rev": 1,
        "incarnation": 1,
        "waiting": 0,
        "in_use": len(running),
        "running": running,
        **about,
    }
    return NamedBacklog.model_validate(values)


class Replica:
    """One replica of the loop; `posted` is what it has said and nobody has looked at."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.posted: list[Fact] = []
        self.relayed = 0
        self.sessions = Sessions(settings, pool, self, told=self._relay)  # type: ignore[arg-type]

    def post(self, fact: Fact, *, to: str | None = None) -> None:
        """What it calls of a publisher."""
        assert to is None
        self.posted.append(fact)

    def _relay(self) -> None:
        self.relayed += 1


class Supervisors:
    """Replicas of scheduler on empty tables; nothing turns by itself, and time is what the test says."""

    def __init__(self, settings: Settings, pool: Pool, replicas: int = 2) -> None:
        self.settings, self.pool = settings, pool
        self.replicas = [Replica(settings, pool) for _ in range(replicas)]
        self.calendar = Calendar(settings, pool)
        self.calendar.post = self._answered  # type: ignore[method-assign]
        self.now_s = 0.0
        self._snapshots = 0
        self._revs = 0

    def _answered(self, fact: Fact, *, to: str | None = None) -> None:
        if to is None:
            self.replicas[0].posted.append(fact)
        else:
            Calendar.post(self.calendar, fact, to=to)

    @property
    def now(self) -> datetime:
        return at(self.now_s)

    async def until(self, seconds: float) -> None:
        """Let it be so many seconds after T0."""
        self.now_s = seconds
        await self.pool.execute("UPDATE session_time.clock SET now = $1", at(seconds))

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    def made(self, *backlogs: NamedBacklog, read_at: datetime | None = None) -> BacklogSnapshot:
        self._snapshots += 1
        return BacklogSnapshot(
            rev=self._snapshots, occurred_at=read_at or at(self.now_s), snapshot_id=uuid7(), part=0, parts=1,
            backlogs=backlogs,
        )  # fmt: skip

    async def see(self, *backlogs: NamedBacklog, by: int = 0, read_at: datetime | None = None) -> list[Fact]:
        """A replica hears a snapshot of now, and turns; what it says."""
        await self.replicas[by].sessions.snapshots([self.made(*backlogs, read_at=read_at)])
        return await self.turn(by)

    async def shut(self, session_id: str = "q:1", **about: Any) -> list[Fact]:
        """The gate's word comes in, and a replica turns; what it says."""
        await self.hear_shut(self.shutting(session_id, **about))
        return await self.turn()

    def shutting(self, session_id: str, **about: Any) -> GateClosed:
        moment = about.pop("moment", at(self.now_s))
        values = {
            "workspace_id": "w", "rev": 1, "occurred_at": moment, "session_id": session_id, "incarnation": 1,
            "generation": 1, "until": moment + timedelta(seconds=120), "in_flight": (runs(session_id),),
            "beat_at": moment, **about,
        }  # fmt: skip
        return GateClosed.model_validate(values)

    async def hear_shut(self, *facts: GateClosed, by: int = 0) -> None:
        sessions = self.replicas[by].sessions
        await self._write(lambda connection: sessions.gates_closed(connection, facts))

    async def killed(self, result: str, session_id: str = "q:1", by: int = 0, **about: Any) -> list[Fact]:
        """Liveness has answered; what is said to that, and in the turn that follows."""
        return await self.killed_all((session_id, result), by=by, **about)

    async def killed_all(self, *answers: tuple[str, str], by: int = 0, **about: Any) -> list[Fact]:
        facts = [
            KillDone.model_validate(
                {
                    "workspace_id": "w", "rev": 1, "session_id": session_id, "incarnation": 1, "order_id": uuid7(),
                    "result": result, **about,
                }
            )
            for session_id, result in answers
        ]  # fmt: skip
        sessions = self.replicas[by].sessions
        await self._write(lambda connection: sessions.kills_done(connection, facts))
        return await self.turn(by)

    async def allow(self, name: str = "w", incarnation: int = 1, **settings: Any) -> None:
        """The registry's newest word about a workspace."""
        self._revs += 1
        fact = WorkspaceChanged(
            workspace_id=name, rev=self._revs, incarnation=incarnation, url="http://agent.example", settings=settings
        )
        await self._write(lambda connection: self.calendar.handlers.registered(connection, [fact]))

    async def ask(
        self, verb: str, query_id: UUID | None = None, name: str = "w", **body: object
    ) -> tuple[int, dict[str, Any]]:
        about = {} if query_id is None else {"query_id": query_id}
        (answer,) = await self.calendar.ask(query(verb, None, workspace_id=name, body=body, **about))
        return answer

    async def _write(self, work: Callable[[Connection], Coroutine[Any, Any, Tell]]) -> None:
        (await transact(self.pool, work))()

    # ── what goes out ────────────────────────────────────────────────────────────────────────────────────────────────

    async def turn(self, by: int = 0) -> list[Fact]:
        """Turn until nothing is due; what the replica has said since anybody looked."""
        while await self.replicas[by].sessions.run_once() == 0.0:
            pass
        return self.said(by)

    async def turn_all(self) -> list[Fact]:
        """All replicas turn at once; what they say together."""
        await asyncio.gather(*(replica.sessions.run_once() for replica in self.replicas))
        return [fact for by in range(len(self.replicas)) for fact in self.said(by)]

    def said(self, by: int = 0) -> list[Fact]:
        replica = self.replicas[by]
        said, replica.posted[:] = list(replica.posted), []
        return said

    async def kills(self) -> list[SessionKill]:
        return await self.calendar.told(SessionKill)

    async def row(self, session_id: str = "q:1") -> asyncpg.Record:
        row = await self.pool.fetchrow("SELECT * FROM sessions WHERE session_id = $1", session_id)
        assert row is not None
        return row

    async def ids(self) -> list[str]:
        """All rows, also of what has ended."""
        return [row["session_id"] for row in await self.pool.fetch("SELECT session_id FROM sessions ORDER BY 1")]

    async def brought_to(self, state: Literal["checkpoint_sent", "stop_sent", "kill_ordered"]) -> None:
        """Session q:1, which began at 0, is in this state: since 100, 120, or 131 s."""
        await self.until(2)
        await self.see(backlog(runs("q:1")))
        for moment, reached in ((100, "checkpoint_sent"), (120, "stop_sent"), (131, "kill_ordered")):
            await self.until(moment)
            await self.turn()
            if reached == "kill_ordered":
                await self.shut()
            if reached == state:
                break
        assert (await self.row())["state"] == state


def words(facts: Sequence[Fact]) -> list[str]:
    """What was said, in words and in order."""
    return [_words(fact) for fact in facts]


def _words(fact: Fact) -> str:
    match fact:
        case SessionDirective():
            return f"{fact.kind} {fact.reason}"
        case SessionStop():
            return f"cancel {fact.reason}"
        case SessionGate():
            return "gate" if fact.closed else "gate opens"
        case _:
            return type(fact).__name__


def of(facts: Sequence[Fact], kind: type[FactT]) -> list[FactT]:
    return [fact for fact in facts if isinstance(fact, kind)]


def asks_of(row: asyncpg.Record) -> list[str]:
    return [ask["reason"] for ask in json.loads(row["asks"])]


@asynccontextmanager
async def supervised(stack: Stack, **settings: object) -> AsyncIterator[Supervisors]:
    """Replicas whose Postgres has the test's time, whatever their own clocks say."""
    administrator = await asyncpg.connect(stack.database_url)
    await administrator.execute("DROP SCHEMA IF EXISTS session_time CASCADE")
    await administrator.execute(_CLOCK)
    values = scheduler_settings(stack, **{**SHORT, **settings})
    try:
        async with asyncpg.create_pool(
            values.database_url.get_secret_value(), min_size=1, max_size=6, server_settings=_IN_TEST_TIME,
            reset=_nothing_to_reset,
        ) as pool:  # fmt: skip
            await pool.execute(EMPTY)
            opened = Supervisors(values, pool)
            await opened.until(0)
            yield opened
            await pool.execute(EMPTY)
    finally:
        await administrator.execute("DROP SCHEMA session_time CASCADE")
        await administrator.close()


async def _nothing_to_reset(_: object) -> None:
    """As the services have it."""


@pytest.fixture
async def supervisors(stack: Stack) -> AsyncIterator[Supervisors]:
    async with supervised(stack) as opened:
        yield opened
