"""What was set aside of the bus: listed, counted, and in effect once when its cause is gone, on real servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aio_pika
import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from services.queue.history import History
from services.queue.letters import id_after, replay
from shared import topology
from shared.batches import encode, encode_batch
from shared.database import Pool, open_pool, transact
from shared.facts import MessageBusy, QueueQuery, WorkspaceRegistered
from shared.intake import set_aside
from tests.conftest import Stack, until
from tests.integration.queue_kit import Door, agent, digest, door, queue_service, queue_settings
from tests.integration.rows_kit import message

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, inbox, outbox, dead_letters"
REASONS = ("invalid", "unstorable", "handler_error", "undeliverable")


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Door]:
    """An empty queue service and a door to it."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
    async with door(stack) as opened, queue_service(stack, sweep_s=0.3, reconcile_s=0.3):
        yield opened
        await opened.side.pool.execute("TRUNCATE dead_letters")


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, and no service that works on them."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        yield pool
        await pool.execute(f"TRUNCATE {TABLES}")


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


async def listed(front: Door, count: int) -> list[dict[str, Any]]:
    """Wait until there are so many letters; all of them, as an operator sees them."""

    async def there() -> bool:
        return bool(await front.side.pool.fetchval("SELECT count(*) >= $1 FROM dead_letters", count))

    await until(there)
    status, body = await front.ask("dead_letters")
    assert (status, len(body["items"])) == (200, count), body
    letters: list[dict[str, Any]] = body["items"]
    return letters


async def again(front: Door, letter: dict[str, Any]) -> tuple[int, Any]:
    return await front.ask("replay", dead_letter=bytes.fromhex(letter["digest"]))


@asynccontextmanager
async def refused(pool: Pool, table: str, check: str) -> AsyncIterator[None]:
    """Rows that Postgres does not take for as long as the block lasts."""
    await pool.execute(f"ALTER TABLE {table} ADD CONSTRAINT trial CHECK ({check})")
    try:
        yield
    finally:
        await pool.execute(f"ALTER TABLE {table} DROP CONSTRAINT trial")


async def test_a_message_that_could_not_be_stored_is_delivered_once_when_its_cause_is_gone(front: Door) -> None:
    """B-14: kept, listed without its body, replayed twice, delivered once: a new item after the one that failed."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        bad = front.busy(name, "a secret", reason="poison")
        async with refused(front.side.pool, "a2a_queue", "reason <> 'poison'"):
            await front.publisher.publish(bad)
            await front.ended(bad.queue_id)
        (letter,) = await listed(front, 1)
        assert (letter["fact_type"], letter["reason"], letter["replayed_at"]) == ("MessageBusy", "unstorable", None)
        assert "trial" in letter["error"]
        assert letter["size"] == len(encode(bad))
        assert "secret" not in json.dumps(letter)
        first = await again(front, letter)
        new_id = id_after(bad.queue_id)
        assert (first[0], first[1]["queue_ids"], first[1]["facts"]) == (200, [str(new_id)], 1)
        (item,) = await front.ended(new_id)
        assert (item["status"], item["retry_of"]) == ("completed", str(bad.queue_id))
        assert await again(front, letter) == first
        (letter,) = await listed(front, 1)
        assert letter["replayed_at"] == first[1]["replayed_at"]
        after = front.busy(name, "after")
        await front.keep(after)  # read behind whatever was published before it
        await front.ended(after.queue_id)
        assert [received.queue_id for received in worker.received] == [str(new_id), str(after.queue_id)]
        assert (await front.item(bad.queue_id))["status"] == "failed"
        status, retried = await front.ask("retry", queue_id=bad.queue_id)
        assert (status, retried["queue_id"]) == (200, str(new_id)), "retried already, by the replay"


async def test_a_fact_that_met_a_bug_takes_effect_although_the_inbox_knows_it(front: Door) -> None:
    """B-14: of any kind that is kept, not only messages."""
    name = fresh()
    fact = WorkspaceRegistered(workspace_id=name, rev=1, incarnation=1, url="http://poison")
    async with refused(front.side.pool, "workspaces", "url <> 'http://poison'"):
        await front.publisher.publish(fact)
        (letter,) = await listed(front, 1)
    assert await front.side.pool.fetchval("SELECT count(*) FROM inbox WHERE fact_id = $1", fact.fact_id) == 1
    assert (await again(front, letter))[0] == 200

    async def known() -> bool:
        url = await front.side.pool.fetchval("SELECT url FROM workspaces WHERE workspace_id = $1", name)
        return bool(url == "http://poison")

    await until(known)


async def test_a_message_with_an_id_from_a_wrong_clock_is_readable_as_a_fact_of_its_own(front: Door) -> None:
    """B-14: what was wrong with it is what a replay renews."""
    bad = front.busy(fresh(), "x")
    front.publisher.post_encoded(MessageBusy, encode(bad).replace(str(bad.fact_id).encode(), str(uuid4()).encode()))
    (letter,) = await listed(front, 1)
    assert letter["reason"] == "invalid"
    assert (await again(front, letter))[0] == 200
    await until(lambda: waits(front, id_after(bad.queue_id)))


async def waits(front: Door, queue_id: UUID) -> bool:
    return bool(await front.side.pool.fetchval("SELECT count(*) FROM a2a_queue WHERE queue_id = $1", queue_id))


async def test_what_cannot_be_read_still_is_told_and_stays(front: Door) -> None:
    """B-14."""
    bad = front.busy(fresh(), "x")
    front.publisher.post_encoded(MessageBusy, encode(bad).replace(b'"TASK"', b'"URGENT"'))
    await listed(front, 1)
    front.publisher.post_encoded(MessageBusy, b'{"cut":')  # and whatever else is in its batch
    for letter in await listed(front, 2):
        status, body = await again(front, letter)
        assert (status, body["code"]) == (409, "still_unreadable")
        assert letter["error"].splitlines()[0][:8] in body["detail"] or "JSONDecodeError" in body["detail"]
    assert [letter["replayed_at"] for letter in await listed(front, 2)] == [None, None]
    assert not await front.side.pool.fetchval("SELECT count(*) FROM a2a_queue")


async def test_what_cannot_be_stored_still_is_a_dead_letter_again(front: Door) -> None:
    """B-14: NUL, which no column takes; each life of it ends where its caller sees it, and no copy is lost."""
    bad = front.busy(fresh(), "x", reason="a\0b")
    await front.publisher.publish(bad)
    (letter,) = await listed(front, 1)
    assert (await again(front, letter))[0] == 200
    newest, oldest = await listed(front, 2)
    assert (newest["reason"], newest["replayed_at"]) == ("unstorable", None)
    assert (oldest["digest"], oldest["replayed_at"] is None) == (letter["digest"], False)
    for item in await front.ended(bad.queue_id, id_after(bad.queue_id)):
        assert (item["status"], item["reason"]) == ("failed", "unreadable")


async def test_a_batch_that_the_broker_gave_up_on_comes_back_fact_by_fact(front: Door, stack: Stack) -> None:
    """B-29: what had been kept waits as before, what had failed is a new item, what is broken is its own letter."""
    name = fresh()
    kept, failed, broken = (front.busy(name, text) for text in ("kept", "failed", "broken"))
    await front.keep(kept)
    raw = [encode(kept), encode(failed), encode(broken).replace(b'"TASK"', b'"URGENT"')]
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        channel = await connection.channel()
        death: Any = {"queue": "queue.message.busy", "reason": "delivery_limit", "count": 1}
        letter = aio_pika.Message(encode_batch(raw), headers={"x-death": [death]})
        await channel.default_exchange.publish(letter, topology.DEAD_QUEUE)
    await front.ended(failed.queue_id, broken.queue_id)
    (found,) = await listed(front, 1)
    status, body = await again(front, found)
    assert (status, body["facts"], body["still_unreadable"]) == (200, 2, 1)
    assert body["queue_ids"] == [str(kept.queue_id), str(id_after(failed.queue_id))]
    await until(lambda: waits(front, id_after(failed.queue_id)))
    assert await front.side.pool.fetchval("SELECT count(*) FROM a2a_queue") == 2
    newest, _ = await listed(front, 2)
    assert (newest["fact_type"], newest["reason"]) == ("MessageBusy", "invalid")


async def test_letters_are_listed_page_by_page_and_only_to_an_operator(front: Door) -> None:
    for number in range(5):
        await letter_of(front.side.pool, f"x{number}".encode())
    # Three of them in one moment: the place of a letter is its moment and its digest.
    await front.side.pool.execute("UPDATE dead_letters SET at = now() - interval '1 h' WHERE fact < 'x3'")
    wanted = await front.side.pool.fetch("SELECT digest FROM dead_letters ORDER BY at DESC, digest DESC")
    seen: list[str] = []
    cursor = None
    for _ in range(3):
        status, body = await front.ask("dead_letters", limit=2, cursor=cursor)
        assert status == 200
        seen += [letter["digest"] for letter in body["items"]]
        cursor = body["next_cursor"]
    assert seen == [row["digest"].hex() for row in wanted]
    assert cursor is None
    for cursor in ("x", "1.2.3", "1.zz", f"{10**40}.00"):
        assert (await front.ask("dead_letters", cursor=cursor))[0] == 400
    one = bytes.fromhex(seen[0])
    assert (await front.ask("dead_letters", caller_hash=digest("caller")))[0] == 403
    assert (await front.ask("replay", caller_hash=digest("caller"), dead_letter=one))[0] == 403
    assert [(await front.ask("replay", dead_letter=each))[0] for each in (None, digest("none"))] == [404, 404]


async def letter_of(pool: Pool, raw: bytes, reason: str = "invalid", fact_type: str = "MessageBusy") -> bytes:
    """Set a fact aside as a reader does; its digest."""
    async with pool.acquire() as connection:
        await set_aside(connection, fact_type, raw, reason, "an error")
    return hashlib.sha256(fact_type.encode() + b"\0" + raw).digest()


def question(letter: bytes) -> QueueQuery:
    return QueueQuery(
        workspace_id="-", rev=1, query_id=uuid7(), verb="replay", dead_letter=letter, reply_to="nobody",
        expires_at=datetime.now(UTC) + timedelta(seconds=10),
    )  # fmt: skip


async def outgoing(pool: Pool) -> list[dict[str, Any]]:
    return [json.loads(row["fact"]) for row in await pool.fetch("SELECT fact FROM outbox ORDER BY id")]


async def test_a_replay_is_a_fact_of_its_own_and_else_as_it_came(rows: Pool) -> None:
    """With what a newer version wrote into it; two letters of one message are the same new item."""
    fact = message("w").model_copy(update={"reply_to": "gone"})
    await rows.execute(
        """INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority,
             status, reason, method, body, enqueued_at, ended_at, attempts, delivery_no, rev)
           VALUES ($1, 'w', 'c', '', '', '', 50, 'failed', 'unreadable', '', '', now(), now(), 0, 0, 1)""",
        fact.queue_id,
    )
    repeated = fact.model_copy(update={"fact_id": uuid7()})
    came = [{**json.loads(encode(each)), "added_later": {"n": 1}} for each in (fact, repeated)]
    for each in came:
        digest_of = await letter_of(rows, json.dumps(each).encode(), "handler_error")
        for _ in range(2):
            status, _body = await transact(rows, lambda connection, d=digest_of: replay(connection, question(d)))  # type: ignore[misc]
            assert status == 200
    left = await outgoing(rows)
    assert len({each["fact_id"] for each in [*came, *left]}) == 4
    renewed = {"queue_id": str(id_after(fact.queue_id)), "retry_of": str(fact.queue_id), "reply_to": None, "beat": None}
    assert [{**each, "fact_id": None} for each in left] == [{**came[0], "fact_id": None, **renewed}] * 2


async def test_what_was_true_for_a_moment_only_is_not_said_again(rows: Pool) -> None:
    for fact_type in ("WorkspaceHeartbeat", "QueueQuery", "queue.proxy.beat", "NoSuchFact"):
        letter = await letter_of(rows, b"{}", "handler_error", fact_type)
        status, body = await transact(rows, lambda connection, d=letter: replay(connection, question(d)))  # type: ignore[misc]
        assert (status, body["code"]) == (409, "not_replayable")
    assert await outgoing(rows) == []


async def test_letters_are_counted_by_reason_and_forgotten_by_age(rows: Pool, stack: Stack) -> None:
    for number in range(4):
        await letter_of(rows, f"i{number}".encode())
    done = await letter_of(rows, b"done", "unstorable")
    await letter_of(rows, b"waits", "unstorable")
    await rows.execute("UPDATE dead_letters SET replayed_at = now() WHERE digest = $1", done)
    await rows.execute("UPDATE dead_letters SET at = now() - interval '31 days' WHERE fact = 'i0'")
    await rows.execute("UPDATE dead_letters SET at = now() - interval '29 days' WHERE fact = 'i1'")
    await rows.execute("""INSERT INTO dead_letters (digest, at, fact_type, reason, error, fact)
                          SELECT sha256(int4send(n)), now() - interval '40 days', 'x', 'invalid', '', ''
                          FROM generate_series(1, 1500) n""")
    keeper = History(queue_settings(stack, dead_letters_days=30), rows)
    assert await keeper.run_once() == 0
    assert await keeper.run_once() > 0
    assert await rows.fetchval("SELECT count(*) FROM dead_letters") == 5
    counted = {reason: REGISTRY.get_sample_value("bide_queue_dead_letters", {"reason": reason}) for reason in REASONS}
    assert counted == {"invalid": 3, "unstorable": 1, "handler_error": 0, "undeliverable": 0}
