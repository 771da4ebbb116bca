"""Faults of Postgres that need an administrator, and what the tables say when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import asyncpg

from tests.chaos.kit.account import Account
from tests.chaos.kit.processes import Ring
from tests.chaos.kit.storm import Storm
from tests.conftest import Stack

_SCHEMAS = ("queue", "proxy")
_ROLES = ("bide_queue", "bide_proxy")


@asynccontextmanager
async def admin(stack: Stack) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """The administrator's connection to this test's database: it may write even where nobody else may."""
    connection = await asyncpg.connect(stack.database_url, server_settings={"default_transaction_read_only": "off"})
    try:
        yield connection
    finally:
        await connection.close()


async def dead_letters(stack: Stack) -> list[str]:
    """What the services set aside: in a storm of good messages there is nothing to set aside."""
    async with admin(stack) as connection:
        return [
            f"{schema}: {row['fact_type']} {row['reason']}: {row['error']}"
            for schema in _SCHEMAS
            for row in await connection.fetch(f"SELECT fact_type, reason, error FROM {schema}.dead_letters")
        ]


async def end_sessions(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Terminate every session of the services in this database."""
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND usename = ANY($1::text[])",
        _ROLES,
    )


@asynccontextmanager
async def read_only(stack: Stack) -> AsyncIterator[None]:
    """Whoever connects meanwhile may only read, and keeps such a session for good: a primary that became a standby."""
    async with admin(stack) as connection:
        name = await connection.fetchval("SELECT quote_ident(current_database())")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await end_sessions(connection)
        try:
            yield
        finally:
            await connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


@asynccontextmanager
async def no_room(stack: Stack) -> AsyncIterator[None]:
    """Too many connections (53300) for whoever wants one: there is none, and no new one."""
    async with admin(stack) as connection:
        for role in _ROLES:
            await connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")
        await end_sessions(connection)
        try:
            yield
        finally:
            for role in _ROLES:
                await connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1")


@asynccontextmanager
async def locked(stack: Stack) -> AsyncIterator[None]:
    """An outside transaction that holds every workspace of the queue and sits idle."""
    async with admin(stack) as connection, connection.transaction():
        await connection.execute("SELECT FROM queue.workspaces ORDER BY workspace_id FOR UPDATE")
        yield


async def beaten(stack: Stack, replicas: int, within_s: float = 60.0) -> None:
    """Come back when so many queue replicas have beaten since now."""
    async with asyncio.timeout(within_s):
        since = None
        while True:
            try:
                async with admin(stack) as connection:
                    since = since or await connection.fetchval("SELECT clock_timestamp()")
                    found = await connection.fetchval("SELECT count(*) FROM queue.replicas WHERE beat_at > $1", since)
            except (OSError, asyncpg.PostgresError):
                found = 0
            if found >= replicas:
                return
            await asyncio.sleep(0.2)


_FAILURES = (
    "loop_failed", "batch_failed", "batch_not_acknowledged", "batch_repeated_singly", "turn_repeated_singly",
    "fact_set_aside", "ending_dropped", "delivery_failed", "tell_failed", "handler_failed", "counters_corrected",
)  # fmt: skip


def failures(logs: Iterable[str]) -> list[str]:
    """Log lines that no fault of a database excuses: what failed by itself instead of waiting."""
    return [
        line for log in logs for line in log.splitlines() if any(f'"event": "{each}"' in line for each in _FAILURES)
    ]


async def close_books(stack: Stack, services: Ring, load: Storm) -> Account:
    """Lost 0, set aside 0, delivered twice 0, one at a time; and no handler and no loop has failed by itself.

    Order holds too: batches that wait for Postgres side by side come through in any order (I3, a late insert).
    """
    account = await load.account(within_s=240)
    account.check()
    assert account.out_of_order() == []
    assert account.duplicates == []
    assert account.overlaps() == 0
    assert await dead_letters(stack) == []
    logs = [process.log.read_text(errors="replace") for process in services.processes.values()]
    assert failures(logs) == []
    return account
