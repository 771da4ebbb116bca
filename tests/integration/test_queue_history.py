"""What has ended, by its day: made ahead, found, moved, dropped, on a real Postgres while others write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.queue.history import History
from services.queue.store import SQL
from shared.database import Connection, Pool, open_pool
from shared.migrate import read_migrations
from tests.conftest import ROOT, Stack
from tests.integration.claim_kit import explain
from tests.integration.queue_kit import digest, door, queue_service, queue_settings
from tests.integration.rows_kit import claim, enqueue, message, settle

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, outbox, dead_letters"
NOW = datetime.now(UTC)
_ENDED = """
INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, method,
                          body, answer, enqueued_at, ended_at, attempts, delivery_no, rev)
SELECT id, 'w', 'c', sha256('c'), sha256('k'), sha256('b'), 50, 'completed', 'message/send', 'body', 'answer',
       $2::timestamptz, $2::timestamptz, 0, 1, 2
FROM unnest($1::uuid[]) AS id
"""


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, with no day made: all that ends goes to the default partition."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        for name in await days(pool):
            await pool.execute(f"DROP TABLE {name}")
        yield pool
        await pool.execute(f"TRUNCATE {TABLES}")


async def days(pool: Pool | Connection) -> list[str]:
    """The day partitions that are there."""
    found = await pool.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'a2a_finished'::regclass ORDER BY 1"
    )
    return [row["name"] for row in found if row["name"] != "a2a_finished_default"]


def day(offset: int) -> str:
    return f"a2a_finished_{NOW + timedelta(days=offset):%Y%m%d}"


def history(stack: Stack, pool: Pool, **settings: object) -> History:
    return History(queue_settings(stack, **settings), pool)


async def end(pool: Pool, offset: int, count: int = 1) -> list[UUID]:
    """Items that ended so many days from now."""
    ids = [uuid7() for _ in range(count)]
    await pool.execute(_ENDED, ids, NOW + timedelta(days=offset))
    return ids


async def where(pool: Pool, ids: Sequence[UUID]) -> list[str]:
    """The partition of each item that is found."""
    found = await pool.fetch(
        "SELECT tableoid::regclass::text AS name FROM a2a_finished WHERE queue_id = ANY($1::uuid[]) ORDER BY 1", ids
    )
    return [row["name"] for row in found]


async def unmake(pool: Pool, name: str) -> None:
    """Send what ended on a day back to the default partition."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(f"""
            LOCK TABLE ONLY a2a_finished IN ACCESS EXCLUSIVE MODE;
            ALTER TABLE a2a_finished DETACH PARTITION {name};
            INSERT INTO a2a_finished_default SELECT * FROM {name};
            DROP TABLE {name}""")


async def through(work: History, now: datetime) -> int:
    """Take turns until there is nothing more to do; how many it took."""
    turns = 1
    while await work.run_once(now) == 0:
        turns += 1
    return turns


async def test_days_are_made_ahead_and_by_two_replicas_at_once_just_as_well(rows: Pool, stack: Stack) -> None:
    await asyncio.gather(*(through(history(stack, rows), NOW) for _ in range(4)))
    wanted = [day(0), day(1), day(2), day(3)]
    assert await days(rows) == wanted
    await through(history(stack, rows), NOW + timedelta(days=1))
    assert await days(rows) == [*wanted, day(4)]


async def test_an_ending_without_a_day_is_found_and_moves_when_its_day_is_made(rows: Pool, stack: Stack) -> None:
    """I1: an ending is never refused because a partition is missing."""
    fact = message("w")
    await enqueue(rows, fact)
    (item,) = await claim(rows, "w", "me")
    assert await settle(rows, item, "delivered", b'{"an":"answer"}')
    assert await where(rows, [fact.queue_id]) == ["a2a_finished_default"]
    ended = await rows.fetchrow("SELECT * FROM a2a_finished WHERE queue_id = $1", fact.queue_id)
    assert ended is not None
    await through(history(stack, rows), ended["ended_at"])
    assert await where(rows, [fact.queue_id]) == [f"a2a_finished_{ended['ended_at']:%Y%m%d}"]
    assert await rows.fetchrow("SELECT * FROM a2a_finished WHERE queue_id = $1", fact.queue_id) == ended


async def test_days_past_their_retention_are_dropped_and_their_items_are_unknown(rows: Pool, stack: Stack) -> None:
    await through(history(stack, rows), NOW - timedelta(days=9))
    offsets = (-9, -8, -7, -6)
    assert await days(rows) == [day(offset) for offset in offsets]
    items = {offset: (await end(rows, offset))[0] for offset in offsets}
    await through(history(stack, rows, retention_days=7), NOW)
    assert await days(rows) == [day(offset) for offset in (-7, -6, 0, 1, 2, 3)]
    await rows.execute(SQL["ensure_workspaces"], ["w"])
    async with door(stack) as front, queue_service(stack):
        answers = {offset: (await front.ask("item", queue_id=items[offset]))[0] for offset in offsets}
        assert answers == {-9: 404, -8: 404, -7: 200, -6: 200}


async def test_what_no_day_took_goes_by_batch(rows: Pool, stack: Stack) -> None:
    old, older, young = await end(rows, -8, 1500), await end(rows, -30, 1000), await end(rows, -7)
    assert await through(history(stack, rows, retention_days=7), NOW) == 3
    assert await where(rows, [*old, *older, *young]) == ["a2a_finished_default"]


async def test_bodies_go_earlier_if_an_operator_wants_so(rows: Pool, stack: Stack) -> None:
    await through(history(stack, rows), NOW - timedelta(days=4))
    items = {offset: await end(rows, offset, count) for offset, count in ((-5, 1), (-4, 1500), (-3, 1), (-2, 1))}
    short = history(stack, rows, bodies_days=2)
    assert await through(short, NOW) == 2

    async def kept() -> dict[int, set[tuple[bytes, bytes, bool]]]:
        query = "SELECT body, answer, body_dropped FROM a2a_finished WHERE queue_id = ANY($1::uuid[])"
        return {offset: {tuple(row) for row in await rows.fetch(query, ids)} for offset, ids in items.items()}

    gone, there = {(b"", b"answer", True)}, {(b"body", b"answer", False)}
    assert await kept() == {-5: gone, -4: gone, -3: gone, -2: there}
    assert await through(short, NOW + timedelta(days=1)) == 1
    assert (await kept())[-2] == gone


async def test_bodies_stay_as_long_as_their_items_otherwise(rows: Pool, stack: Stack) -> None:
    await end(rows, -3)
    await through(history(stack, rows), NOW)
    assert not await rows.fetchval("SELECT bool_or(body_dropped) FROM a2a_finished")


async def test_expired_keys_go_by_batch_and_others_stay(rows: Pool, stack: Stack) -> None:
    keys = """INSERT INTO idempotency_keys SELECT 'w', sha256('c'), sha256(int4send(n)), gen_random_uuid(), '', $2
              FROM generate_series($1::int, $1 + 1099) n"""
    await rows.execute(keys, 0, NOW - timedelta(seconds=1))
    await rows.execute(keys, 2000, NOW + timedelta(seconds=1))
    assert await through(history(stack, rows), NOW) == 2
    assert await rows.fetchval("SELECT count(*) FROM idempotency_keys WHERE expires_at > $1", NOW) == 1100
    assert await rows.fetchval("SELECT count(*) FROM idempotency_keys") == 1100


async def test_endings_go_on_while_days_are_made_and_dropped(rows: Pool, stack: Stack) -> None:
    """I1: each ending is written once and found once, wherever its row went meanwhile."""
    ended: list[UUID] = []
    enough, stop = asyncio.Event(), asyncio.Event()

    async def worker(name: str) -> None:
        while not stop.is_set():
            fact = message(name)
            await enqueue(rows, fact)
            (item,) = await claim(rows, name, "me")
            assert await settle(rows, item, "delivered", b"{}")
            assert len(await where(rows, [fact.queue_id])) == 1
            ended.append(fact.queue_id)
            if len(ended) >= 40:
                enough.set()

    async def calendar() -> tuple[int, int]:
        await enough.wait()
        one, other = history(stack, rows), history(stack, rows)
        tries = moved = 0
        for back in range(6):
            await through(one, NOW - timedelta(days=100 + 4 * back))
            if day(0) in await days(rows):
                await unmake(rows, day(0))
            in_default = len([name for name in await where(rows, ended) if name == "a2a_finished_default"])
            while any(name < day(-7) for name in await days(rows)) or day(0) not in await days(rows):
                await asyncio.gather(one.run_once(NOW), other.run_once(NOW))
                tries += 1
            moved += in_default
        stop.set()
        return tries, moved

    async with asyncio.TaskGroup() as group:
        made = group.create_task(calendar())
        for number in range(3):
            group.create_task(worker(f"w{number}"))
    tries, moved = made.result()
    print(f"{len(ended)} endings while 24 days were made and dropped in {tries} looks; {moved} rows moved")
    assert moved >= 6 * 40
    assert len(await where(rows, ended)) == len(ended) == len(set(ended))


async def test_a_day_in_use_is_not_waited_for(rows: Pool, stack: Stack) -> None:
    """A backup reads all of it: nobody who writes stands behind a DROP, and the day goes when the backup is over."""
    await through(history(stack, rows), NOW - timedelta(days=20))
    await through(history(stack, rows, retention_days=100), NOW)
    old = day(-20)
    async with rows.acquire() as backup, backup.transaction():
        await backup.fetch("SELECT queue_id FROM a2a_finished")
        await through(history(stack, rows), NOW)
        assert old in await days(rows)
        fact = message("w")
        await enqueue(rows, fact)
        (item,) = await claim(rows, "w", "me")
        assert await settle(rows, item, "delivered", b"{}")
    await through(history(stack, rows), NOW)
    assert old not in await days(rows)


async def test_a_day_that_would_hold_everybody_up_stays_where_it_is(rows: Pool, stack: Stack) -> None:
    """So much ended before its day was made that it cannot be moved: others wait for that once, and it is found."""
    ids = await end(rows, 0)
    await rows.execute("""
        CREATE FUNCTION trial() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN OLD; END';
        CREATE TRIGGER trial BEFORE DELETE ON a2a_finished_default FOR EACH ROW EXECUTE FUNCTION trial()""")
    one = history(stack, rows)
    try:
        await through(one, NOW)
        assert await days(rows) == [day(1), day(2), day(3)]
        assert await where(rows, ids) == ["a2a_finished_default"]
    finally:
        await rows.execute("DROP FUNCTION trial CASCADE")
    await through(one, NOW)
    assert day(0) not in await days(rows), "it is not tried again"
    await through(history(stack, rows), NOW)
    assert await where(rows, ids) == [day(0)]


NOBODY = "'00000000-0000-0000-0000-000000000000'"
PLANS = {
    "find_ids": "'{{{id}}}'",
    "find_item": "'{id}'",
    "is_known": "'w', sha256('c'), '{id}', sha256('k')",
    "list_finished": "'w', NULL, 'completed', 'ffffffff-ffff-ffff-ffff-ffffffffffff', 50",
}


async def test_an_item_is_found_by_an_index_in_every_day(rows: Pool, stack: Stack) -> None:
    """B-24: by the generic plan, as it is run from its sixth execution on, and however far a day has filled."""
    await through(history(stack, rows), NOW)
    ids = [(await end(rows, offset, count))[0] for offset, count in ((0, 3000), (1, 300), (2, 3), (30, 300))]
    tables = [*await days(rows), "a2a_finished_default"]
    async with rows.acquire() as connection:
        parameters = await _parameters(connection, "list_finished")
        for name, arguments in PLANS.items():
            extra = ", NULL" * (parameters - 5) if name == "list_finished" else ""
            for queue_id in ids:
                nodes = await explain(connection, name, arguments.format(id=queue_id) + extra)
                assert not {node["Node Type"] for node in nodes} & {"Seq Scan", "Sort", "Bitmap Heap Scan"}, nodes
                read = {node["Relation Name"] for node in nodes if node["Node Type"].startswith("Index")}
                assert read >= set(tables), (name, nodes)
        blanked = f"'{NOW - timedelta(days=30)}', '{NOW.date()}', {NOBODY}, 1000"
        nodes = await explain(connection, "blank_bodies", blanked)
        assert not {node["Node Type"] for node in nodes} & {"Seq Scan", "Sort"}, nodes
        read = {node["Relation Name"] for node in nodes if node["Node Type"].startswith("Index")}
        assert read == {"a2a_finished_default"}, "days that are not asked for are not read"


async def _parameters(connection: Connection, name: str) -> int:
    return len((await connection.prepare(SQL[name])).get_parameters())


async def test_what_had_ended_before_days_were_kept_is_carried_over(admin: asyncpg.Connection[asyncpg.Record]) -> None:
    """Found by its id as before, and gone with the last of its days."""
    transaction = admin.transaction()
    await transaction.start()
    try:
        await admin.execute("CREATE SCHEMA trial; SET LOCAL search_path = trial")
        *before, days_kept = read_migrations("queue", ROOT / "services" / "queue" / "migrations")[:4]
        for migration in before:
            await admin.execute(migration.sql)
        ids = [uuid7() for _ in range(3)]
        moments = [NOW - timedelta(days=40), NOW, NOW + timedelta(days=2)]
        for queue_id, moment in zip(ids, moments, strict=True):
            await admin.execute(_ENDED, [queue_id], moment)
        await admin.execute(days_kept.sql)
        found = await admin.fetch("SELECT queue_id, ended_at, answer, body FROM a2a_finished ORDER BY ended_at")
        assert [tuple(row) for row in found] == [
            (queue_id, moment, b"answer", b"body") for queue_id, moment in zip(ids, moments, strict=True)
        ]
        assert await days(admin) == [day(2)]
        await admin.execute(_ENDED, [uuid7()], NOW + timedelta(days=3))
        assert await admin.fetchval("SELECT count(*) FROM a2a_finished_default") == 1
        assert digest("c") == await admin.fetchval("SELECT DISTINCT caller_hash FROM a2a_finished")
    finally:
        await transaction.rollback()
