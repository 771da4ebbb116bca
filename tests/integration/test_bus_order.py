"""What must be read in order is: one replica at a time, batches that wait are written together, another takes over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial

import pytest
from uuid_utils.compat import uuid7

from shared.database import Connection
from shared.facts import MessageBusy, SessionStop
from shared.intake import Tell
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica, stop


def numbered(number: int) -> MessageBusy:
    return MessageBusy(
        workspace_id="w", rev=number + 1, queue_id=uuid7(), caller_id="c", caller_hash=bytes(32), key_hash=bytes(32),
        body_hash=bytes(32), reason="at_capacity", method="message/send", body=b"{}",
    )  # fmt: skip


class Written:
    """What handlers committed, in the order of their commits, and in how many transactions."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.by: list[str] = []

    async def read(self, side: Replica) -> None:
        async def handle(connection: Connection, facts: Sequence[MessageBusy]) -> Tell:
            # Work of random length: two transactions at once would overtake each other.
            await connection.execute("SELECT pg_sleep($1)", random.uniform(0, 0.01))

            def tell() -> None:
                self.numbers += [fact.rev - 1 for fact in facts]
                self.by.append(side.settings.replica_id)

            return tell

        side.reader.store(MessageBusy, handle)
        await side.reader.start()

    async def until(self, count: int) -> None:
        async def there() -> bool:
            return len(self.numbers) >= count

        await until(there)


async def test_messages_are_written_in_the_order_in_which_they_were_confirmed(clean: Stack) -> None:
    """I3: 500 batches of one fact, two replicas; one of them reads, and what waits is one transaction."""
    written = Written()
    async with replica(clean) as one, replica(clean) as two:
        await written.read(one)
        await written.read(two)
        for number in range(500):
            await one.publisher.publish(numbered(number))
        await written.until(500)
        assert written.numbers == list(range(500))
        assert len(set(written.by)) == 1
        assert len(written.by) < 500


async def test_another_replica_reads_on_when_the_one_that_read_is_gone(clean: Stack) -> None:
    """What was committed and not acknowledged comes again, and has no second effect. Who was cut may not have told."""
    async with replica(clean) as one, replica(clean) as two:
        for each in (one, two):
            each.reader.store(MessageBusy, partial(_effect, each.settings.replica_id))
            await each.reader.start()
        posting = asyncio.create_task(_post(one, 300))
        await until(lambda: _written(one, 50))
        seen_by = await one.pool.fetchval("SELECT seen_by FROM effects LIMIT 1")
        reading = {one.settings.replica_id: one, two.settings.replica_id: two}[seen_by]
        connection = await reading.reader.broker.connect()
        await connection.close()  # un-acked batches go back to their place
        await posting
        await until(lambda: _written(one, 300))
        assert await one.effects() == sorted(f"{number:03}" for number in range(300))
        assert await one.pool.fetchval("SELECT count(DISTINCT seen_by) FROM effects") == 2


async def _effect(replica_id: str, connection: Connection, facts: Sequence[MessageBusy]) -> None:
    rows = [(f"{fact.rev - 1:03}", replica_id) for fact in facts]
    await connection.executemany("INSERT INTO effects (session_id, seen_by) VALUES ($1, $2)", rows)


async def _written(side: Replica, count: int) -> bool:
    return len(await side.effects()) >= count


async def _post(side: Replica, count: int) -> None:
    for number in range(count):
        await side.publisher.publish(numbered(number))


@pytest.mark.parametrize("busy_elsewhere", [False, True])
async def test_a_replica_that_stops_hands_over_without_letting_later_messages_pass(
    clean: Stack, *, busy_elsewhere: bool
) -> None:
    """B-30: what it had fetched goes back before its sibling reads on, also while its other readers still work."""
    written, go = Written(), asyncio.Event()

    async def slowly(_connection: Connection, _facts: Sequence[SessionStop]) -> None:
        await go.wait()

    async with replica(clean) as one, replica(clean) as two:
        for each in (one, two):
            each.reader.store(SessionStop, slowly)
            await written.read(each)
        posting = asyncio.create_task(_post(one, 400))
        await written.until(50)
        if busy_elsewhere:
            await one.publisher.publish(stop("s1"))
            await one.publisher.publish(stop("s2"))
        reading = {one.settings.replica_id: one, two.settings.replica_id: two}[written.by[0]]
        stopping = asyncio.create_task(reading.reader.stop())
        await written.until(300)  # the sibling reads on, whatever the other still waits for
        go.set()
        await stopping
        await posting
        await written.until(400)
        assert written.numbers == list(range(400))
