"""What a claim costs: a queue full of rows, the drain's own turn on one connection, and the buffers it touches.

Buffers are exact where times are not: the test in CI and the benchmark both count them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import asyncpg
from pydantic import SecretStr

from services.queue import store
from services.queue.deliver import Ending
from services.queue.drain import Drain, Turn
from services.queue.settings import Settings
from services.queue.settling import begin
from services.queue.store import SQL
from shared.addresses import AddressRules
from shared.agents import Agents
from shared.broker import open_publisher
from shared.database import Connection, Pool, open_pool
from tests.conftest import Stack

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, outbox"
_BEGUN_MS = 1_700_000_000_000
_CHUNK = 100_000

# Each row's id and rank say when it came: one per millisecond, so the order of ranks is that of insertion.
_LOAD = f"""
INSERT INTO a2a_queue (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, lane, rank_ms,
                       method, body, reason, give_up_at)
SELECT (lpad(to_hex({_BEGUN_MS} + n), 12, '0') || '7' || left(md5($1), 3) || '8' || lpad(to_hex(n), 15, '0'))::uuid,
       $1::text, 'c', sha256('c'), sha256(int4send(n)), sha256('body'), 50, 1, {_BEGUN_MS} + n, 'message/send',
       '\\x7b7d', 'backlog', now() + interval '1 day'
FROM generate_series($2::int + 1, $2 + $3::int) AS n
"""
FETCHED = """
SELECT coalesce(sum(pg_stat_get_xact_blocks_fetched(oid)), 0)::int
FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'i')
"""


async def empty(pool: Pool) -> None:
    await pool.execute(f"TRUNCATE {TABLES}")


@asynccontextmanager
async def never_analysed(admin: Connection) -> AsyncIterator[None]:
    """No statistics, also none of an earlier use, and no autovacuum that makes any."""
    for table in ("a2a_queue", "workspaces"):
        await admin.execute(f"DELETE FROM pg_statistic WHERE starelid = 'queue.{table}'::regclass")
        await admin.execute(f"ALTER TABLE queue.{table} SET (autovacuum_enabled = off)")
    try:
        yield
    finally:
        for table in ("a2a_queue", "workspaces"):
            await admin.execute(f"ALTER TABLE queue.{table} RESET (autovacuum_enabled)")


async def load(connection: Connection, name: str, rows: int, *, after: int = 0) -> None:
    """Let `rows` more items wait in the workspace, which had `after`, and tell its counter."""
    for begun in range(after, after + rows, _CHUNK):  # no statement of the role may run for long
        await connection.execute(_LOAD, name, begun, min(_CHUNK, after + rows - begun))
    async with connection.transaction():
        before = await store.lock(connection, [name])
        waiting = before[name].waiting + rows
        changed = replace(before[name], url="http://127.0.0.1:9", waiting=waiting, rev=before[name].rev + 1)
        await store.save(connection, before, {name: changed})


@dataclass(frozen=True, slots=True)
class Bench:
    """The drain without its deliveries: what it claims, nobody delivers."""

    pool: Pool
    drain: Drain

    async def turn(
        self,
        connection: Connection,
        name: str,
        endings: Sequence[Ending] = (),
        *,
        room: int = 1,
        now: datetime | None = None,
    ) -> Turn:
        """Settle and claim as the service does, in a transaction of its own or in the caller's."""
        async with connection.transaction():
            return await self.drain._turn(connection, endings, [name], room, now)

    async def claim(self, connection: Connection, name: str, endings: Sequence[Ending] = ()) -> tuple[Turn, int]:
        """Take one turn and roll it back; the turn and how many buffers it touched."""
        transaction = connection.transaction()
        await transaction.start()
        try:
            before = await connection.fetchval(FETCHED)
            turn = await self.drain._turn(connection, endings, [name], 1, None)
            return turn, await connection.fetchval(FETCHED) - before
        finally:
            await transaction.rollback()

    async def claim_alone(self, connection: Connection, name: str) -> None:
        """Lock, claim, count, in the caller's transaction: what a claim is, without what a turn tells of it."""
        workspaces = await store.lock(connection, [name])
        claimed = await store.claim(connection, {name: 1}, workspaces, "me", None, starvation_limit_s=1800)
        after = {name: begin(workspaces[name], claimed[name])}
        await store.save_counters(connection, workspaces, after)

    async def touched(self, connection: Connection, work: Callable[[], Awaitable[object]]) -> int:
        """How many buffers `work` touches; it is rolled back."""
        transaction = connection.transaction()
        await transaction.start()
        try:
            before = await connection.fetchval(FETCHED)
            await work()
            return int(await connection.fetchval(FETCHED)) - int(before)
        finally:
            await transaction.rollback()

    async def cycles(self, connection: Connection, name: str, count: int) -> None:
        """Claim `count` items one after the other: each is finished in the turn that claims the next."""
        endings: list[Ending] = []
        for _ in range(count):
            turn = await self.turn(connection, name, endings)
            endings = [Ending(item, "delivered", b"{}") for item in turn.items]
        await self.turn(connection, name, endings, room=0)


@asynccontextmanager
async def bench(stack: Stack) -> AsyncIterator[Bench]:
    settings = Settings.model_validate(
        {**stack.settings().model_dump(exclude={"replica_id"}), "delivery_secret": SecretStr("s")}
    )
    async with open_pool(settings) as pool, open_publisher(settings) as publisher:
        agents = Agents(AddressRules(allow_loopback=True))
        yield Bench(pool, Drain(settings, pool, publisher, agents))
        await agents.close()


@asynccontextmanager
async def held_snapshot(stack: Stack) -> AsyncIterator[None]:
    """Somebody's long report: nothing that dies meanwhile can be vacuumed."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM pg_class")
            yield
    finally:
        await connection.close()


async def explain(connection: Connection, name: str, *arguments: str) -> list[Mapping[str, Any]]:
    """Run a named statement by its generic plan, as it is run from its sixth execution on; the nodes of the plan.

    `arguments` are SQL literals.
    """
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"SET LOCAL plan_cache_mode = force_generic_plan; PREPARE probe AS {SQL[name]}")
        found = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE probe({', '.join(arguments)})"
        )
        await connection.execute("DEALLOCATE probe")
        return list(_nodes(json.loads(found)[0]["Plan"]))
    finally:
        await transaction.rollback()


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
