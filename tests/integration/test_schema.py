"""The schemas: migrations agree with their files, every statement prepares, no role reaches another's rows."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from shared.database import Connection, Pool, load_queries, open_pool, transact
from shared.facts import SessionStop
from shared.inbox import Inbox, hour_of
from shared.migrate import Migration, MigrationError, migrate
from shared.settings import SERVICES
from tests.conftest import ROOT, Stack
from tests.integration.conftest import stop

QUERIES = [("queue", ROOT / "shared" / "queries.sql")] + [
    (service, path) for service in SERVICES if (path := ROOT / "services" / service / "queries.sql").exists()
]


@pytest.mark.parametrize(
    ("service", "path"), QUERIES, ids=lambda value: value.parent.name if isinstance(value, Path) else value
)
async def test_every_statement_prepares_on_the_migrated_schema(stack: Stack, service: str, path: Path) -> None:
    async with open_pool(stack.settings(service)) as pool, pool.acquire() as connection:
        for name, statement in load_queries(path).items():
            try:
                await connection.prepare(statement)
            except asyncpg.PostgresError as error:
                pytest.fail(f"{path.parent.name}/queries.sql {name}: {error}")


@pytest.mark.parametrize("service", SERVICES)
async def test_a_role_reaches_its_own_schema_and_no_other(stack: Stack, service: str) -> None:
    async with open_pool(stack.settings(service)) as pool:
        assert await pool.fetchval("SELECT current_schema()") == service
        await pool.fetch("SELECT * FROM outbox")
        for other in set(SERVICES) - {service}:
            for statement in (
                f"SELECT * FROM {other}.outbox",
                f"INSERT INTO {other}.outbox (fact_type, fact) VALUES ('x', '')",
                f"CREATE TABLE {other}.mine (x int)",
                f"DROP TABLE {other}.outbox",
                f"SET ROLE bide_{other}",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await pool.execute(statement)
        for statement in ("CREATE TABLE public.mine (x int)", "CREATE SCHEMA mine", "CREATE ROLE mine"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await pool.execute(statement)


@pytest.mark.parametrize("service", SERVICES)
async def test_a_role_has_limits(stack: Stack, service: str) -> None:
    """I8: a statement, a lock and an idle transaction end by themselves."""
    async with open_pool(stack.settings(service)) as pool:
        for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            assert await pool.fetchval(f"SHOW {limit}") in {"30s", "10s", "5s"}


ONE = Migration("trial", 1, "one", "CREATE TABLE trial_one (x int)")
TWO = Migration("trial", 2, "two", "CREATE TABLE trial_two (x int)")


@pytest.fixture
async def trial(pool: Pool) -> Pool:
    await pool.execute("DROP TABLE IF EXISTS trial_one, trial_two; DELETE FROM migrations WHERE origin = 'trial'")
    return pool


async def test_replicas_that_start_together_migrate_once(trial: Pool, stack: Stack) -> None:
    async def start() -> int:
        async with open_pool(stack.settings()) as pool:
            return await migrate(pool, [ONE, TWO])

    assert sum(await asyncio.gather(*(start() for _ in range(4)))) == 2
    assert await trial.fetchval("SELECT count(*) FROM migrations WHERE origin = 'trial'") == 2
    assert await migrate(trial, [ONE, TWO]) == 0


async def test_a_changed_migration_is_refused(trial: Pool) -> None:
    await migrate(trial, [ONE])
    changed = Migration("trial", 1, "one", "CREATE TABLE trial_one (y int)")
    with pytest.raises(MigrationError, match="write a new migration"):
        await migrate(trial, [changed])


async def test_a_schema_ahead_of_an_old_replica_is_left_alone(trial: Pool) -> None:
    await migrate(trial, [ONE, TWO])
    assert await migrate(trial, [ONE]) == 0


async def test_a_migration_that_fails_leaves_nothing(trial: Pool) -> None:
    broken = Migration("trial", 2, "two", "CREATE TABLE trial_two (x int); SELECT no_such_function()")
    with pytest.raises(asyncpg.UndefinedFunctionError):
        await migrate(trial, [ONE, broken])
    assert await trial.fetchval("SELECT to_regclass('trial_one') IS NOT NULL")
    assert await trial.fetchval("SELECT to_regclass('trial_two') IS NULL")


async def test_twelve_writers_of_the_same_rows_meet_no_deadlock(pool: Pool) -> None:
    """B-21: sorted keys, rows locked in key order. Arrival order gave 19 to 111 deadlocks per 600 batches once."""
    await pool.execute("DROP TABLE IF EXISTS rows_; CREATE TABLE rows_ (key int PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    await pool.execute("INSERT INTO rows_ (key) SELECT generate_series(1, 50)")
    facts = [stop(str(i)) for i in range(50)]
    inbox = Inbox(pool, keep_s=3600)
    await inbox.prepare(facts)
    before = await _deadlocks(pool)

    async def writer(seed: int) -> None:
        for turn in range(25):
            start = (seed * 7 + turn * 11) % 50
            batch = facts[start:] + facts[:start]
            if seed % 2:
                batch.reverse()

            async def work(connection: Connection, batch: list[SessionStop] = batch) -> None:
                await inbox.admit(connection, batch)
                await connection.execute(
                    """WITH mine AS (SELECT key FROM rows_ WHERE key = ANY($1::int[]) ORDER BY key FOR NO KEY UPDATE)
                       UPDATE rows_ SET n = n + 1 FROM mine WHERE rows_.key = mine.key""",
                    [int(fact.session_id) + 1 for fact in batch],
                )

            await transact(pool, work)

    await asyncio.gather(*(writer(seed) for seed in range(12)))
    assert await pool.fetchval("SELECT sum(n) FROM rows_") == 12 * 25 * 50
    assert await _deadlocks(pool) == before
    await pool.execute("DROP TABLE rows_")


async def _deadlocks(pool: Pool) -> int:
    await pool.execute("SELECT pg_stat_force_next_flush()")
    return int(await pool.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


async def test_a_deadlock_that_happens_all_the_same_is_repeated(pool: Pool) -> None:
    await pool.execute("DROP TABLE IF EXISTS pair; CREATE TABLE pair (key int PRIMARY KEY, n int NOT NULL DEFAULT 0)")
    await pool.execute("INSERT INTO pair VALUES (1), (2)")
    both_hold = asyncio.Barrier(2)
    tries = 0

    async def cross(first: int, second: int) -> None:
        async def work(connection: Connection) -> None:
            nonlocal tries
            tries += 1
            await connection.execute("UPDATE pair SET n = n + 1 WHERE key = $1", first)
            if tries <= 2:
                await both_hold.wait()
            await connection.execute("UPDATE pair SET n = n + 1 WHERE key = $1", second)

        await transact(pool, work)

    await asyncio.gather(cross(1, 2), cross(2, 1))
    assert tries >= 3, "one of them was the victim and came again"
    assert await pool.fetchval("SELECT sum(n) FROM pair") == 4
    await pool.execute("DROP TABLE pair")


async def test_the_inbox_forgets_by_the_hour_and_not_before(pool: Pool) -> None:
    """By the hour of the fact, but never what took effect within the time it remembers, however old the fact."""
    now = datetime.now(UTC)
    facts = [_made_at(now - timedelta(hours=hours)) for hours in (90, 50, 49, 1)]
    inbox = Inbox(pool, keep_s=48 * 3600)
    await inbox.prepare(facts)
    await transact(pool, lambda connection: inbox.admit(connection, facts))

    async def known() -> set[UUID]:
        return {row["fact_id"] for row in await pool.fetch("SELECT fact_id FROM inbox")}

    await inbox.forget(now + timedelta(hours=1))
    assert {fact.fact_id for fact in facts} <= await known(), "all of them were applied a moment ago"
    await pool.execute("UPDATE inbox SET at = now() - interval '49 hours' WHERE fact_id <> $1", facts[1].fact_id)
    await inbox.forget(now)
    assert await known() & {fact.fact_id for fact in facts} == {facts[1].fact_id, facts[3].fact_id}


async def test_a_fact_that_waited_longer_than_the_inbox_remembers_still_takes_effect(pool: Pool) -> None:
    fact = _made_at(datetime.now(UTC) - timedelta(days=30))
    inbox = Inbox(pool, keep_s=48 * 3600)
    await inbox.prepare([fact])
    assert await transact(pool, lambda connection: inbox.admit(connection, [fact, fact])) == [fact]
    assert await transact(pool, lambda connection: inbox.admit(connection, [fact])) == []


async def test_replicas_that_need_the_same_partition_make_it_once(pool: Pool) -> None:
    facts = [_made_at(datetime.now(UTC) - timedelta(days=100, hours=hours)) for hours in range(5)]
    await asyncio.gather(*(Inbox(pool, keep_s=3600).prepare(facts) for _ in range(6)))
    names = {row["relname"] for row in await pool.fetch("SELECT relname FROM pg_class WHERE relname LIKE 'inbox_%'")}
    assert {f"inbox_{hour_of(fact.fact_id)}" for fact in facts} <= names


def _made_at(moment: datetime) -> SessionStop:
    random = stop("x").fact_id.int & ((1 << 80) - 1)
    return SessionStop(
        **{**stop("x").model_dump(), "fact_id": UUID(int=(int(moment.timestamp() * 1000) << 80) | random)}
    )
