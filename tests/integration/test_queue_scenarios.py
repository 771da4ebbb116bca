"""What has gone wrong in queues elsewhere, on real servers: each test names its scenario."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aio_pika
import asyncpg
import pytest
from pydantic import ValidationError
from uuid_utils.compat import uuid7

from services.queue import store
from services.queue.__main__ import main
from services.queue.answers import Answers
from services.queue.drain import Drain
from services.queue.loops import Loops
from services.queue.store import SQL
from shared import topology
from shared.batches import encode, encode_batch
from shared.broker import open_publisher
from shared.database import Connection, Pool, open_pool
from shared.facts import MessageBusy, QueueQuery
from tests.conftest import Stack, until
from tests.integration.calendar_kit import LONG
from tests.integration.calendar_kit import free as end_turns
from tests.integration.queue_kit import Door, agent, digest, door, queue_service, queue_settings
from tests.integration.rows_kit import claim, enqueue, message, settle

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, inbox, outbox, dead_letters"


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Door]:
    """An empty queue service and a door to it; what is set aside is the test's own affair."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
    async with (
        door(stack) as opened,
        queue_service(stack, sweep_s=0.3, reconcile_s=0.3, owner_beat_s=0.1, owner_silent_s=0.5),
    ):
        yield opened


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, and no service that works on them."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        yield pool


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


# ── what cannot be kept ──────────────────────────────────────────────────────────────────────────────────────────────


async def letters(front: Door) -> list[str]:
    return sorted(row["reason"] for row in await front.side.pool.fetch("SELECT reason FROM dead_letters"))


async def ends_unreadable(front: Door, facts: Sequence[MessageBusy], reason: str) -> None:
    """Each has ended where its caller sees it, and its end was told."""
    for fact, item in zip(facts, await front.ended(*(fact.queue_id for fact in facts)), strict=True):
        assert (item["status"], item["reason"], item["workspace_id"]) == ("failed", "unreadable", fact.workspace_id)
        assert reason in item["last_error"]
        asked = await front.ask("item", queue_id=fact.queue_id, caller_hash=digest("caller"))
        assert asked[0] == 200, "it is its caller's"
        await until(lambda fact=fact: _told(front, fact.queue_id, "failed"))  # type: ignore[misc]
        assert len(front.changes[fact.queue_id]) == 1
    assert await letters(front) == [reason] * len(facts)


async def _told(front: Door, queue_id: UUID, status: str) -> bool:
    return any(change.status.value == status for change in front.changes.get(queue_id, []))


async def test_a_message_that_cannot_be_read_ends_where_its_caller_sees_it(front: Door) -> None:
    """B-14: one is of another contract, one holds a lone surrogate; each was promised, and the good one is kept."""
    name = fresh()
    good, other, surrogate = (front.busy(name, text) for text in ("good", "other", "surrogate"))
    kept = front.kept[good.queue_id] = asyncio.get_running_loop().create_future()
    front.publisher.post_encoded(MessageBusy, encode(other).replace(b'"TASK"', b'"URGENT"'))
    front.publisher.post(good)
    front.publisher.post_encoded(MessageBusy, encode(surrogate).replace(b'"at_capacity"', b'"\\ud800"'))
    assert (await kept).position == 1
    await ends_unreadable(front, [other, surrogate], "invalid")
    assert (await front.item(good.queue_id))["status"] == "queued"


async def test_a_message_that_cannot_be_stored_ends_where_its_caller_sees_it(front: Door) -> None:
    """B-14: NUL in a text, which no column takes (class 22); its repeat under the same id is the same end."""
    name = fresh()
    bad = front.busy(name, "bad", reason="a\0b")
    await front.publisher.publish(bad)
    await ends_unreadable(front, [bad], "unstorable")
    again = bad.model_copy(update={"fact_id": uuid7(), "reason": "backlog"})
    assert (await front.keep(again)).duplicate_of == bad.queue_id


async def test_a_message_that_meets_a_bug_ends_where_its_caller_sees_it(front: Door) -> None:
    """B-14: a table is not there, as after a deploy without its migration; messages that do not need it are kept."""
    name = fresh()
    await front.side.pool.execute("ALTER TABLE idempotency_keys RENAME TO away")
    try:
        bad, good = front.busy(name, "bad", explicit_key=True), front.busy(name, "good")
        front.publisher.post(bad)
        assert (await front.keep(good)).position == 1
        await ends_unreadable(front, [bad], "handler_error")
    finally:
        await front.side.pool.execute("ALTER TABLE away RENAME TO idempotency_keys")


async def test_a_message_that_the_broker_gave_up_on_ends_where_its_caller_sees_it(front: Door, stack: Stack) -> None:
    """B-14, B-29: the batch comes by the queue of dead letters; the one of it that had been kept goes on waiting."""
    name = fresh()
    facts = [front.busy(name, str(number)) for number in range(3)]
    await front.keep(facts[0])
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        channel = await connection.channel()
        death: Any = {"queue": "queue.message.busy", "reason": "delivery_limit", "count": 1}
        message = aio_pika.Message(encode_batch(map(encode, facts)), headers={"x-death": [death]})
        await channel.default_exchange.publish(message, topology.DEAD_QUEUE)
    await front.ended(facts[1].queue_id, facts[2].queue_id)
    assert await letters(front) == ["undeliverable"]
    assert [(await front.item(fact.queue_id))["status"] for fact in facts] == ["queued", "failed", "failed"]


async def test_what_has_no_readable_id_is_a_dead_letter_only(front: Door) -> None:
    """B-14: and a repeat of what waits already changes nothing of it, however broken the repeat."""
    name = fresh()
    fact = front.busy(name, "x")
    await front.keep(fact)
    raw = encode(fact).replace(b'"TASK"', b'"URGENT"')
    front.publisher.post_encoded(MessageBusy, raw)
    front.publisher.post_encoded(MessageBusy, raw.replace(str(fact.queue_id).encode(), b"?"))
    front.publisher.post_encoded(MessageBusy, json.dumps({"workspace_id": name}).encode())

    async def set_aside() -> bool:
        return await letters(front) == ["invalid"] * 3

    await until(set_aside)
    assert (await front.item(fact.queue_id))["status"] == "queued"
    assert not await front.side.pool.fetchval("SELECT count(*) FROM a2a_finished")


# ── counters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_counter_that_is_wrongly_zero_hides_no_item(front: Door) -> None:
    """B-06: no sweep looks at a workspace where nobody waits; its rows are found by themselves."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url, paused=True)
        facts = [front.busy(name, str(number)) for number in range(3)]
        for fact in facts:
            await front.keep(fact)
        forget = "UPDATE workspaces SET waiting = 0, paused = false, paused_at = NULL WHERE workspace_id = $1"
        await front.side.pool.execute(forget, name)
        await front.ended(*(fact.queue_id for fact in facts))
        assert [each.text for each in worker.received] == ["0", "1", "2"]


async def fill(pool: Connection | Pool, name: str, count: int, *, said: int | None = None) -> None:
    """`count` items that wait in `name`, with a counter that says `said`."""
    await pool.execute(
        """INSERT INTO a2a_queue (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, lane,
                                  rank_ms, method, body, reason, give_up_at)
           SELECT gen_random_uuid(), $1, 'c', sha256('c'), sha256(n::text::bytea), sha256(''), 50, 1, n, 'message/send',
                  '{}', 'backlog', now() + interval '1 day' FROM generate_series(1, $2::int) n""",
        name,
        count,
    )
    await pool.execute(
        """WITH known AS (UPDATE workspaces SET waiting = $2 WHERE workspace_id = $1 RETURNING workspace_id)
           INSERT INTO workspaces (workspace_id, url, waiting)
           SELECT $1, 'http://127.0.0.1:20001', $2 WHERE NOT EXISTS (SELECT FROM known)""",
        name,
        count if said is None else said,
    )


def loops(stack: Stack, pool: Pool, **changes: Any) -> Loops:
    """The loops of a replica whose drain does not turn and which tells nobody."""
    settings = queue_settings(stack, **changes)
    silent: Any = None
    return Loops(settings, pool, pool, silent, Drain(settings, pool, silent, silent))


async def test_counters_are_held_against_rows_without_counting_the_backlog(rows: Pool, stack: Stack) -> None:
    """B-06: page by page over what has rows or is said to have; up to 1,001 rows of each are counted."""
    for number in range(510):
        await fill(rows, f"a{number:03}", 1)
    await fill(rows, "b-deep", 20_000)
    await fill(rows, "c-wrong-above", 3_000, said=2_000)
    await fill(rows, "d-wrong-below", 3_000, said=900)
    await fill(rows, "e-wrongly-zero", 2, said=0)
    await fill(rows, "f-wrongly-some", 0, said=7)
    await rows.execute("VACUUM ANALYZE a2a_queue")
    looking = loops(stack, rows)
    assert await looking.reconcile() == 0, "a whole page: there is more"
    assert await looking.reconcile() == looking.settings.reconcile_s
    counters = await rows.fetch("SELECT workspace_id, waiting FROM workspaces WHERE workspace_id > 'b' ORDER BY 1")
    assert {row["workspace_id"][0]: row["waiting"] for row in counters} == {
        "b": 20_000, "c": 2_000, "d": 3_000, "e": 2, "f": 0,
    }  # fmt: skip
    page = await buffers(rows, SQL["counted_workspaces"], "a509", 500)
    counted = await buffers(rows, SQL["count_items"], ["b-deep"], 1001)
    whole = await buffers(rows, SQL["count_items"], ["b-deep"], None)
    print(f"buffers: a page of 5 workspaces with 26,000 items {page}, counting 1,001 of 20,000 {counted}, all {whole}")
    assert page < 100
    assert counted * 5 < whole


async def test_critical_that_no_counter_knows_is_found_however_long_the_line(rows: Pool, stack: Stack) -> None:
    """B-06: without its counter no claim looks into its lane, and the wrong counter was above the bound."""
    await fill(rows, "deep", 3_000)
    await rows.execute("UPDATE a2a_queue SET priority = 100, lane = 0 WHERE rank_ms > 2998")
    assert await loops(stack, rows).reconcile() > 0
    counters = await rows.fetchrow("SELECT waiting, waiting_critical FROM workspaces WHERE workspace_id = 'deep'")
    assert counters is not None
    assert tuple(counters) == (3_000, 2)


async def buffers(connection: Connection | Pool, query: str, *arguments: Any) -> int:
    """Blocks that `query` touches."""
    plan = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", *arguments)
    top = json.loads(plan)[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def waits_for_lock(pool: Pool, pid: int) -> bool:
    return bool(await pool.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))


async def test_cancels_of_one_batch_lock_their_workspaces_in_key_order(rows: Pool) -> None:
    """B-21: the order of the items is the other one; a turn that comes in key order must not meet them."""
    first, second = message("z"), message("a")
    await enqueue(rows, first, second)
    assert first.queue_id < second.queue_id
    expires = datetime.now(UTC) + timedelta(minutes=1)
    queries = [
        QueueQuery(workspace_id=fact.workspace_id, rev=1, query_id=uuid7(), verb="cancel", queue_id=fact.queue_id,
                   expires_at=expires, reply_to="nobody")
        for fact in (first, second)
    ]  # fmt: skip
    silent: Any = None
    answers = Answers(silent, silent)
    async with rows.acquire() as turn, rows.acquire() as canceling:
        pid = await canceling.fetchval("SELECT pg_backend_pid()")

        async def cancel() -> None:
            async with canceling.transaction():
                await answers.query(canceling, queries)

        async with turn.transaction():
            await store.lock(turn, ["a"])
            task = asyncio.create_task(cancel())
            await until(lambda: waits_for_lock(rows, pid))
            await turn.execute("SELECT FROM workspaces WHERE workspace_id = 'z' FOR NO KEY UPDATE NOWAIT")
        await task
    assert await rows.fetchval("SELECT count(*) FROM a2a_finished WHERE status = 'canceled'") == 2


# ── owners ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LATER = timedelta(minutes=10)


@asynccontextmanager
async def rescuer(stack: Stack, pool: Pool) -> AsyncIterator[tuple[Loops, Drain]]:
    """A replica whose loops turn when the test says."""
    settings = queue_settings(stack)
    silent: Any = None
    async with open_publisher(settings) as publisher:
        drain = Drain(settings, pool, publisher, silent)
        yield Loops(settings, pool, pool, publisher, drain), drain


async def rescue(looking: Loops, drain: Drain) -> None:
    """One look at the owners, page by page, and the turns that follow from it."""
    now = datetime.now(UTC) + LATER
    while await looking.beat(now) == 0:
        pass
    while await drain.run_once() == 0:
        pass


async def lose(pool: Pool, name: str, count: int) -> None:
    """Items of a paused workspace, claimed by a replica that has not beaten for long."""
    await fill(pool, name, count)
    await pool.execute(
        "UPDATE a2a_queue SET status = 'dispatched', owner = 'gone', delivery_no = 1, dispatched_at = now() "
        "WHERE workspace_id = $1",
        name,
    )
    await pool.execute(
        "UPDATE workspaces SET waiting = 0, running = $2, paused = true, paused_at = now() WHERE workspace_id = $1",
        name,
        count,
    )


async def waiting(pool: Pool, name: str) -> int:
    query = "SELECT count(*) FROM a2a_queue WHERE workspace_id = $1 AND status = 'queued' AND attempts = 1"
    return int(await pool.fetchval(query, name))


@pytest.mark.parametrize("row", ["silent", "deleted"])
async def test_deliveries_are_taken_over_also_when_their_owner_is_not_even_known(
    rows: Pool, stack: Stack, row: str
) -> None:
    """B-07: a rescuer that looked for the row of the dead would be blind once it is deleted; it is not, and waits."""
    await lose(rows, "w", 3)
    if row == "silent":
        await rows.execute("INSERT INTO replicas (replica_id, beat_at) VALUES ('gone', now() - interval '1 day')")
    async with rescuer(stack, rows) as (looking, drain):
        await rescue(looking, drain)
        assert await waiting(rows, "w") == 3
        await looking.beat(datetime.now(UTC))
        assert await rows.fetch("SELECT FROM replicas WHERE replica_id = 'gone'") == [], "and then it is forgotten"


async def test_a_rescuer_that_hangs_in_its_transaction_keeps_nobody_from_rescuing(rows: Pool, stack: Stack) -> None:
    """B-07: it holds the lock and says nothing more; the server ends its session (30 s for the role, less here)."""
    await lose(rows, "w", 3)
    hanging = await asyncpg.connect(stack.settings().database_url.get_secret_value())
    await hanging.execute("SET idle_in_transaction_session_timeout = '300ms'")
    await hanging.execute("BEGIN")
    await store.lock(hanging, ["w"])
    async with rescuer(stack, rows) as (looking, drain):
        await rescue(looking, drain)
    assert await waiting(rows, "w") == 3
    hanging.terminate()


async def test_a_rescue_that_breaks_once_comes_again(rows: Pool, stack: Stack) -> None:
    """B-07: its session is killed while it waits for the lock; what it had found is written by its next turn."""
    await lose(rows, "w", 3)
    async with rescuer(stack, rows) as (looking, drain), rows.acquire() as blocking:
        async with blocking.transaction():
            await store.lock(blocking, ["w"])
            task = asyncio.create_task(rescue(looking, drain))
            pid = await blocking.fetchval("SELECT pg_backend_pid()")
            kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))"
            await until(lambda: _truth(rows, kill, pid))
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                await task
        assert await waiting(rows, "w") == 0
        await drain.run_once()
        assert await waiting(rows, "w") == 3


async def _truth(pool: Pool, query: str, *arguments: Any) -> bool:
    return bool(await pool.fetchval(query, *arguments))


async def beats(pool: Pool, within_s: float) -> list[str]:
    """The replicas that have beaten within that time."""
    query = "SELECT replica_id FROM replicas WHERE beat_at > clock_timestamp() - make_interval(secs => $1) ORDER BY 1"
    return [row["replica_id"] for row in await pool.fetch(query, within_s)]


@contextmanager
def replica_of_its_own_loop(stack: Stack, **changes: Any) -> Iterator[asyncio.AbstractEventLoop]:
    """A queue service in a thread; blocking the loop that it yields blocks nobody else."""
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[None]] = []

    async def serve() -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        with suppress(asyncio.CancelledError):
            await main(queue_settings(stack, **changes))

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(30)
        assert not thread.is_alive()


async def test_a_replica_whose_loop_was_blocked_does_no_harm_when_it_comes_back(rows: Pool, stack: Stack) -> None:
    """B-09: its beats stop, another one takes its delivery; its own late finish has no effect."""
    timing = {"owner_beat_s": 0.1, "owner_silent_s": 0.6, "sweep_s": 0.3, "drain_s": 1.0}
    name, free = fresh(), threading.Event()
    async with door(stack) as front, agent(name, work_s=LONG) as worker:
        with replica_of_its_own_loop(stack, **timing) as loop:
            try:
                await until(lambda: _truth(rows, "SELECT count(*) FROM replicas"))
                (blocked,) = await beats(rows, 10)
                await front.register(name, worker.url)
                fact = front.busy(name, "x")
                await front.keep(fact)
                owner = "SELECT count(*) FROM a2a_queue WHERE queue_id = $1 AND owner = $2"
                await until(lambda: _truth(rows, owner, fact.queue_id, blocked))
                await worker.until(lambda: worker.active == 1)
                loop.call_soon_threadsafe(free.wait)
                worker.behave(work_s=0.05)
                end_turns(worker)
                async with queue_service(stack, **timing):
                    # Not by a question: the blocked one may have taken it, and would answer late.
                    ended = "SELECT status, attempts, delivery_no > 1 FROM a2a_finished WHERE queue_id = $1"
                    # It may hold locks in the middle of an answer: then the database takes them after 30 s.
                    await until(lambda: _truth(rows, ended, fact.queue_id), within_s=90)
                    assert tuple(await rows.fetchrow(ended, fact.queue_id) or ()) == ("completed", 1, True)
                    assert blocked not in await beats(rows, 0.6)
                    free.set()

                    async def beats_again() -> bool:
                        return blocked in await beats(rows, 0.3)

                    await until(beats_again)
                    await until(lambda: _told(front, fact.queue_id, "completed"))
                    after = front.busy(name, "y")
                    await front.keep(after)
                    await front.ended(after.queue_id)
            finally:
                free.set()
        assert [change.status.value for change in front.changes[fact.queue_id]].count("completed") == 1
    counters = await rows.fetchrow("SELECT waiting, running FROM workspaces WHERE workspace_id = $1", name)
    assert tuple(counters or ()) == (0, 0)


async def test_a_replica_beats_also_while_every_connection_of_its_pool_waits(rows: Pool, stack: Stack) -> None:
    """B-09, B-22: facts of a locked workspace hold them all for as long as a lock may be waited for."""
    pool_max = 2
    async with (
        door(stack) as front,
        queue_service(stack, database_pool_max=pool_max, owner_beat_s=0.1, owner_silent_s=0.6),
        rows.acquire() as locking,
    ):
        await locking.execute("SET idle_in_transaction_session_timeout = '120s'")
        await front.keep(front.busy("w", "first"))
        async with locking.transaction():
            await store.lock(locking, ["w"])
            for _ in range(pool_max + 2):
                await front.heartbeat("w")
            held = (
                "SELECT count(*) >= $1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = current_user"
            )
            await until(lambda: _truth(rows, held, pool_max // 2))  # facts take half of the pool at most
            since = await rows.fetchval("SELECT clock_timestamp()")
            beaten = "SELECT count(*) FROM replicas WHERE beat_at > $1::timestamptz + interval '1 s'"
            await until(lambda: _truth(rows, beaten, since))


def test_an_owner_beats_several_times_before_it_counts_as_silent(stack: Stack) -> None:
    """B-09: four times by default; less than three is refused, with what to write instead."""
    settings = queue_settings(stack)
    assert settings.owner_silent_s >= 4 * settings.owner_beat_s
    queue_settings(stack, owner_beat_s=1.0, owner_silent_s=3.0)
    with pytest.raises(ValidationError, match="at least 3 times BIDE_QUEUE_OWNER_BEAT_S"):
        queue_settings(stack, owner_beat_s=1.0, owner_silent_s=2.9)


@pytest.mark.parametrize("ahead_s", [-90.0, 90.0])
async def test_a_replica_whose_clock_is_wrong_judges_and_delivers_like_the_others(
    rows: Pool, stack: Stack, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """B-23: owners are judged by the database's clock alone, and a turn is as long as it is."""
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + ahead_s)
    await lose(rows, "w", 2)
    await rows.execute(
        """INSERT INTO replicas (replica_id, beat_at) VALUES ('gone', now() - interval '21 s'), ('here', now());
           UPDATE a2a_queue SET owner = 'here' WHERE rank_ms = 1;
           UPDATE a2a_queue SET dispatched_at = now() - interval '1 min'"""
    )
    async with rescuer(stack, rows) as (looking, drain):
        await looking.beat(datetime.now(UTC))
        await drain.run_once()
        left = await rows.fetch("SELECT rank_ms FROM a2a_queue WHERE status = 'dispatched'")
        assert [row["rank_ms"] for row in left] == [1]
    name = fresh()
    async with (
        door(stack) as front,
        queue_service(stack, forward_max_s=30.0, follow_min_s=0.1),
        agent(name, behaviour={"asynchronous": True, "work_s": 0.5}) as worker,
    ):
        await front.register(name, worker.url)
        await rows.execute("UPDATE workspaces SET ceiling_s = 0 WHERE workspace_id = $1", name)
        fact = front.busy(name, "x")
        await front.keep(fact)
        await until(lambda: _truth(rows, "SELECT count(*) FROM a2a_finished WHERE queue_id = $1", fact.queue_id))
        ended = await rows.fetchrow("SELECT status, reason FROM a2a_finished WHERE queue_id = $1", fact.queue_id)
        assert tuple(ended or ()) == ("completed", None)


async def test_no_id_is_a_number_that_runs_out(rows: Pool) -> None:
    """B-23: int4 overflowed elsewhere after years."""
    narrow = await rows.fetch(
        """SELECT table_name, column_name FROM information_schema.columns
           WHERE table_schema = current_schema() AND data_type IN ('integer', 'smallint')
             AND (column_name ~ '(^|_)(id|rev|ms)$')"""
    )
    assert narrow == []


@asynccontextmanager
async def unwritable(pool: Pool, name: str) -> AsyncIterator[None]:
    """Let Postgres refuse every change of the items of `name`, as it would a value that it cannot store."""
    await pool.execute(
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '22000'; END $$;
            CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON a2a_queue FOR EACH ROW
            WHEN (OLD.workspace_id = '{name}') EXECUTE FUNCTION refuse()"""
    )
    try:
        yield
    finally:
        await pool.execute("DROP TRIGGER refuse ON a2a_queue; DROP FUNCTION refuse()")


async def test_a_page_of_rows_that_cannot_be_released_hides_no_later_one(rows: Pool, stack: Stack) -> None:
    """B-08: 500 lost rows that Postgres refuses to write, and behind them 100 that it does not."""
    await lose(rows, "stuck", 500)
    await rows.execute("UPDATE a2a_queue SET queue_id = ('0' || substr(queue_id::text, 2))::uuid")
    await lose(rows, "later", 100)
    await rows.execute(
        "UPDATE a2a_queue SET queue_id = ('f' || substr(queue_id::text, 2))::uuid WHERE workspace_id = 'later'"
    )
    async with rescuer(stack, rows) as (looking, drain), unwritable(rows, "stuck"):
        await rescue(looking, drain)
        assert await waiting(rows, "later") == 100
        assert await waiting(rows, "stuck") == 0
    async with rescuer(stack, rows) as (looking, drain):
        await rescue(looking, drain)
        assert await waiting(rows, "stuck") == 500, "they are found again as soon as they can be written"


async def test_a_workspace_whose_items_cannot_be_claimed_keeps_no_other_waiting(front: Door) -> None:
    """B-08: it is in every turn until it is left to the next sweep; the others are delivered meanwhile."""
    name = fresh()
    async with agent(name) as worker, unwritable(front.side.pool, "a-stuck"):
        await front.register(name, worker.url)
        await fill(front.side.pool, "a-stuck", 1)
        await until(lambda: _truth(front.side.pool, "SELECT waiting FROM workspaces WHERE workspace_id = 'a-stuck'"))
        for number in range(20):
            fact = front.busy(name, str(number))
            await front.keep(fact)
            await front.ended(fact.queue_id)
        assert not worker.refused


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_item_is_without_a_deadline_and_each_ends_visibly_at_it(rows: Pool, stack: Stack) -> None:
    """A-D-11: whatever its caller asked for, also in a workspace that was removed or never had an agent."""
    facts = [message("alone"), message("removed"), message("removed")]
    await enqueue(rows, *facts)
    await rows.execute("UPDATE workspaces SET removed = true WHERE workspace_id = 'removed'")
    assert await rows.fetchval(
        "SELECT attnotnull FROM pg_attribute WHERE attrelid = 'a2a_queue'::regclass AND attname = 'give_up_at'"
    )
    async with rescuer(stack, rows) as (looking, _):
        now = datetime.now(UTC)
        await looking.end_due(now + timedelta(hours=23, minutes=59))
        assert await rows.fetchval("SELECT count(*) FROM a2a_queue") == 3
        await looking.end_due(now + timedelta(hours=24, minutes=1))
    ended = await rows.fetch("SELECT status, reason FROM a2a_finished")
    assert [tuple(row) for row in ended] == [("expired", "expired")] * 3
    assert await rows.fetchval("SELECT count(*) FROM outbox WHERE fact_type = 'ItemChanged'") == 3


async def test_a_page_of_items_that_do_not_end_hides_no_later_one(rows: Pool, stack: Stack) -> None:
    """B-08: 600 of a paused workspace, whose clock stands, 500 that Postgres refuses to write, and then one."""
    await fill(rows, "paused", 600)
    await rows.execute("UPDATE workspaces SET paused = true, paused_at = now()")
    await fill(rows, "stuck", 500)
    await rows.execute("UPDATE a2a_queue SET give_up_at = now() - interval '2 days'")
    await fill(rows, "later", 1)
    async with rescuer(stack, rows) as (looking, _), unwritable(rows, "stuck"):
        now = datetime.now(UTC) + timedelta(days=2)
        while await looking.end_due(now) == 0:
            pass
    left = await rows.fetch("SELECT workspace_id, count(*) FROM a2a_queue GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in left] == [("paused", 600), ("stuck", 500)]
    assert await rows.fetchval("SELECT waiting FROM workspaces WHERE workspace_id = 'later'") == 0


# ── keys, order, wake-ups ────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_item_that_returns_meets_no_newer_one_of_its_key(rows: Pool) -> None:
    """B-10: the key is taken also while the item is delivered, so that there is none to collide with."""
    first = message("w", "k")
    await enqueue(rows, first)
    (item,) = await claim(rows, "w", "one")
    again = message("w", "k")
    assert await enqueue(rows, again) == set()
    for reply in ("busy", "owner_died", "failed_attempt"):
        assert await settle(rows, item, reply)
        await rows.execute("UPDATE a2a_queue SET not_before = NULL")
        await rows.execute("UPDATE workspaces SET not_before = NULL")
        (item,) = await claim(rows, "w", "one")
        assert item.queue_id == first.queue_id
    superseded = await rows.fetchrow("SELECT status, superseded_by FROM a2a_finished")
    assert tuple(superseded or ()) == ("superseded", first.queue_id)


async def test_an_item_whose_time_has_not_come_blocks_nobody_behind_it(rows: Pool) -> None:
    """B-11: the head of the line waits for an hour; those behind it are claimed in their order."""
    head = message("w").model_copy(update={"not_before": datetime.now(UTC) + timedelta(hours=1)})
    ready = [message("w") for _ in range(3)]
    await enqueue(rows, head, *ready)
    begun: list[UUID] = []
    while items := await claim(rows, "w", "one"):
        begun += [item.queue_id for item in items]
        await settle(rows, items[0], "delivered")
    assert begun == [fact.queue_id for fact in ready]
    await rows.execute("UPDATE a2a_queue SET not_before = now() - interval '1 s'")
    assert [item.queue_id for item in await claim(rows, "w", "one")] == [head.queue_id]


async def test_every_enqueue_gets_a_typed_answer(front: Door) -> None:
    """B-17: new, the same again, known under another id, another body: nothing is refused without a word."""
    name = fresh()
    first = front.busy(name, "one", key="k")
    word = await front.keep(first)
    assert (word.duplicate_of, word.conflict, word.position) == (None, False, 1)
    word = await front.keep(first.model_copy(update={"fact_id": uuid7()}))
    assert (word.duplicate_of, word.conflict) == (first.queue_id, False)
    word = await front.keep(front.busy(name, "one", key="k", body=first.body))
    assert (word.duplicate_of, word.conflict) == (first.queue_id, False)
    word = await front.keep(front.busy(name, "two", key="k"))
    assert (word.duplicate_of, word.conflict) == (None, True)
    word = await front.keep(front.busy(name, "two", key="l"))
    assert (word.duplicate_of, word.conflict, word.position) == (None, False, 2)


async def test_work_whose_wake_up_was_lost_is_found_behind_a_page_that_cannot_be_delivered(front: Door) -> None:
    """B-08, B-19: nothing listens in Postgres; a row that no fact told of is found by the sweep, behind 500 closed."""
    pool = front.side.pool
    async with agent("z") as worker:
        await front.register("z", worker.url)
        async with pool.acquire() as connection, connection.transaction():
            for number in range(500):
                await fill(connection, f"a{number:03}", 1)
            await connection.execute(
                "UPDATE workspaces SET paused = true, paused_at = now() WHERE workspace_id LIKE 'a%'"
            )
            fact = front.busy("z", "x")
            await fill(connection, "z", 1)
            await connection.execute(
                "UPDATE a2a_queue SET queue_id = $1, body = $2 WHERE workspace_id = 'z'", fact.queue_id, fact.body
            )
            await connection.execute("UPDATE workspaces SET url = $1 WHERE workspace_id = 'z'", worker.url)
        await front.ended(fact.queue_id)
        assert [each.queue_id for each in worker.received] == [str(fact.queue_id)]
