"""Postgres: the pool, named queries, and what an error means for whoever caught it.

Every service has one schema and one role; the role's search_path is the schema, so no SQL here or in a service names
it. SQL stands in `queries.sql` and `migrations/`, never in Python, but for the few statements of this file's own.
"""

from __future__ import annotations

import asyncio
import enum
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias, TypeVar

import asyncpg

from shared.settings import SharedSettings
from shared.telemetry import log

# In quotes: asyncpg's classes are generic only in their stubs.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
COMMAND_TIMEOUT_S = 30.0
ACQUIRE_TIMEOUT_S = 5.0
_CONFLICT_TRIES = 3
_BACKOFF_BASE_S = 0.1
_BACKOFF_CAP_S = 5.0


class Trouble(enum.Enum):
    """What a database error says about the batch that met it (3-bus rules 3 and 4)."""

    CONFLICT = "conflict"
    """Serialization failure or deadlock: the same batch again, at once."""
    INFRASTRUCTURE = "infrastructure"
    """Postgres is away, starting, read-only or out of room: wait, then the same batch again."""
    DATA = "data"
    """One of the values cannot be stored: repeat fact by fact, set the bad one aside."""


_CONFLICT = ("40001", "40P01")
# 08 connections, 53 out of room, 57 operators and timeouts, 58 the disk; 25006 a standby after a failover, 25P03 an
# idle transaction that was cut, 55P03 a lock held for long. A slow or read-only database says nothing about the data.
_INFRASTRUCTURE = ("08", "53", "57", "58", "25006", "25P03", "55P03")
# 22 a value that cannot be stored, 23 a constraint, 54 a limit (a key too long for its index).
_DATA = ("22", "23", "54")


def classify(error: BaseException) -> Trouble | None:
    """Say what `error` means; None: no trouble of Postgres or of the data, but a broken promise of our own code."""
    if isinstance(error, asyncpg.PostgresError):
        return _classify_state(error.sqlstate or "")
    if isinstance(error, asyncpg.InterfaceError):
        if isinstance(error, ValueError):  # asyncpg could not encode an argument
            return Trouble.DATA
        return Trouble.INFRASTRUCTURE if "clos" in str(error) else None
    if isinstance(error, UnicodeEncodeError | OverflowError):
        return Trouble.DATA
    if isinstance(error, OSError | TimeoutError | EOFError | asyncpg.InternalClientError):
        return Trouble.INFRASTRUCTURE
    return None


def _classify_state(sqlstate: str) -> Trouble | None:
    if sqlstate in _CONFLICT:
        return Trouble.CONFLICT
    if sqlstate.startswith(_INFRASTRUCTURE):
        return Trouble.INFRASTRUCTURE
    if sqlstate.startswith(_DATA):
        return Trouble.DATA
    return None


_WORDS_MAX = 300
_ARGUMENT = "invalid input for query argument"


def in_words(error: BaseException) -> str:
    """What an error says, without the data that it met: that may be somebody's prompt, and this goes into logs.

    Postgres shows the row behind the first line (DETAIL), asyncpg the argument behind its number.
    """
    said = str(error).partition("\n")[0]
    if said.startswith(_ARGUMENT):
        said = said.partition(": ")[0]
    return f"{type(error).__name__}: {said}"[:_WORDS_MAX]


def backoff_s(attempt: int) -> float:
    """Half to all of 0.1 s doubling to 5 s; `attempt` counts from 0."""
    longest = min(_BACKOFF_CAP_S, float(_BACKOFF_BASE_S * 2 ** min(attempt, 10)))
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - no secret


async def transact(pool: Pool, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run `work` in one transaction; repeat it on deadlock and serialization failure, three times in all.

    `work` must be repeatable: it sees a fresh transaction each time.
    """
    for remaining in reversed(range(_CONFLICT_TRIES)):
        try:
            async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
                return await work(connection)
        except asyncpg.PostgresError as error:
            await leave_standby(pool, error)
            if classify(error) is not Trouble.CONFLICT or not remaining:
                raise
            log.info("transaction_repeated", sqlstate=error.sqlstate, remaining=remaining)
    raise AssertionError("unreachable: the last try returns or raises")


async def leave_standby(pool: Pool, error: BaseException) -> None:
    """After a session that may only read, open new ones: the server behind it is no longer the one that writes."""
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        await pool.expire_connections()


@asynccontextmanager
async def open_pool(settings: SharedSettings) -> AsyncIterator[Pool]:
    """Open the pool once Postgres answers; until then wait, for a service may start before its servers."""
    pool = await _connect(settings)
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await pool.close()
        except TimeoutError:
            pool.terminate()


async def _connect(settings: SharedSettings) -> Pool:
    transactional = settings.database_pooler == "transaction"
    attempt = 0
    while True:
        try:
            return await asyncpg.create_pool(
                settings.database_url.get_secret_value(),
                min_size=1,
                max_size=settings.database_pool_max,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
                statement_cache_size=0 if transactional else 256,
                reset=_nothing_to_reset,
                server_settings={} if transactional else {"application_name": settings.replica_id},
            )
        except (OSError, TimeoutError, asyncpg.PostgresError) as error:
            if classify(error) is not Trouble.INFRASTRUCTURE:
                raise
            log.warning("waiting_for_postgres", error=f"{type(error).__name__}: {error}", attempt=attempt)
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1


async def _nothing_to_reset(_: object) -> None:
    """Save a round trip per use of a connection: we set nothing in a session, and transactions are ended anyway."""


async def probe(settings: SharedSettings) -> None:
    """One round trip on a connection of its own, for /readyz: a pool that is busy is not a database that is away."""
    connection = await asyncpg.connect(settings.database_url.get_secret_value(), timeout=CONNECT_TIMEOUT_S)
    try:
        await connection.execute("SELECT 1")
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)


_NAME = re.compile(r"^-- name: ([a-z][a-z0-9_]*)\s*$", re.MULTILINE)


def load_queries(path: Path) -> Mapping[str, str]:
    """Split a `queries.sql` into its statements, each under a `-- name: snake_case` line.

    Raises:
        ValueError: a name stands twice.
    """
    parts = _NAME.split(path.read_text(encoding="utf-8"))
    names, statements = parts[1::2], parts[2::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: a query name stands twice")
    return dict(zip(names, (statement.strip() for statement in statements), strict=True))
