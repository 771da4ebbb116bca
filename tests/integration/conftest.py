"""A reader under test: the queue service's own machinery with a handler that writes what it got into one table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import aio_pika
import pytest

from shared import topology
from shared.broker import Publisher, open_publisher
from shared.consumer import Reader
from shared.database import Connection, Pool, open_pool
from shared.facts import SessionGate, SessionStop
from shared.inbox import Inbox
from shared.settings import SharedSettings
from tests.conftest import Stack

if TYPE_CHECKING:
    from tests.integration.dockerd_kit import Engine

EFFECTS = "CREATE TABLE effects (session_id text NOT NULL, times int NOT NULL DEFAULT 1, seen_by text)"


def stop(session_id: str, *, reason: str = "r") -> SessionStop:
    """A fact of a quorum queue that the queue service reads."""
    return SessionStop(workspace_id="w1", rev=1, session_id=session_id, incarnation=1, reason=reason)


def gate(session_id: str) -> SessionGate:
    """A fact that nobody but the queue service reads: without its queue it can go nowhere."""
    return SessionGate(
        workspace_id="w1", rev=1, session_id=session_id, incarnation=1, closed=True, gate_until=datetime.now(UTC)
    )


async def write_effects(connection: Connection, facts: Sequence[SessionStop | SessionGate]) -> None:
    """A handler with an effect that counts: one row per fact and application."""
    await connection.executemany("INSERT INTO effects (session_id) VALUES ($1)", [(fact.session_id,) for fact in facts])


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica of a reader and a publisher, in this process."""

    settings: SharedSettings
    pool: Pool
    publisher: Publisher
    reader: Reader

    async def effects(self) -> list[str]:
        return [row["session_id"] for row in await self.pool.fetch("SELECT session_id FROM effects ORDER BY 1")]

    async def dead_letters(self) -> list[tuple[str, str]]:
        rows = await self.pool.fetch("SELECT reason, error FROM dead_letters ORDER BY at")
        return [(row["reason"], row["error"]) for row in rows]


@asynccontextmanager
async def replica(stack: Stack, service: str = "queue", **settings: object) -> AsyncIterator[Replica]:
    """Bring up what `shared.service.running` does, but for HTTP; the block registers handlers and starts the reader."""
    async with AsyncExitStack() as exits:
        values = stack.settings(service, **settings)
        pool = await exits.enter_async_context(open_pool(values))
        publisher = await exits.enter_async_context(open_publisher(values))
        reader = Reader(values, service, pool, Inbox(pool, keep_s=values.inbox_keep_s))
        exits.push_async_callback(reader.stop)
        yield Replica(values, pool, publisher, reader)


@pytest.fixture
async def clean(stack: Stack) -> AsyncIterator[Stack]:
    """This worker's stack with an empty `effects` table, no dead letters and empty queues."""
    await make_clean(stack)
    yield stack
    await purge(stack)


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Engine]:
    """This worker's own dockerd: tests freeze it."""
    from tests.integration.dockerd_kit import engine_or_reason  # noqa: PLC0415 - two clients of Docker load slowly

    yield from engine_or_reason()


async def make_clean(stack: Stack) -> None:
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"DROP TABLE IF EXISTS effects; {EFFECTS}; TRUNCATE dead_letters, outbox, inbox")
    await purge(stack)


async def purge(stack: Stack) -> None:
    """Take every fact off the bus."""
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        channel = await connection.channel()
        await topology.declare(channel)
        for route in topology.ROUTES:
            if route.kind is not topology.Kind.REPLICA:
                await (await channel.get_queue(route.queue(""))).purge()


@pytest.fixture(scope="module", autouse=True)
def quiet_bus(stack: Stack) -> None:
    """Nothing is on its way to this file's tests that another's have left: a calendar leaves thousands of ticks."""
    asyncio.run(purge(stack))
