"""The outbox: what was committed leaves, whoever dies."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aio_pika

from shared import outbox
from shared.broker import NotPublished, open_publisher
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import SessionStop
from shared.loops import turning
from shared.outbox import Relay
from tests.conftest import Stack, until
from tests.integration.conftest import replica, stop, write_effects

ROOT = Path(__file__).parents[2]


async def add(pool: Pool, *names: str) -> None:
    async def work(connection: Connection) -> None:
        await outbox.add(connection, [stop(name) for name in names])

    await transact(pool, work)


async def waiting(pool: Pool) -> int:
    return int(await pool.fetchval("SELECT count(*) FROM outbox"))


async def test_what_was_committed_is_published_and_forgotten(clean: Stack) -> None:
    async with replica(clean) as one:
        one.reader.store(SessionStop, write_effects)
        await one.reader.start()
        relay = Relay(one.pool, one.publisher, claim_s=30, sweep_s=3600)
        async with turning([relay.loop]):
            await add(one.pool, "a", "b")
            relay.wake()
            await until(lambda: _effects(one.pool, 2))
        assert await waiting(one.pool) == 0


async def test_what_was_rolled_back_is_not_published(clean: Stack) -> None:
    async with replica(clean) as one:
        async with one.pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await outbox.add(connection, [stop("never")])
            await transaction.rollback()
        assert await waiting(one.pool) == 0


CHILD = """
import asyncio, os, sys
from pydantic import SecretStr
from shared import outbox
from shared.database import open_pool, transact
from shared.outbox import Relay
from shared.settings import SharedSettings
from tests.integration.conftest import stop

class Stuck:
    is_connected = True
    def post_encoded(self, kind, encoded):
        print("claimed", flush=True)
        return asyncio.get_running_loop().create_future()

async def main():
    settings = SharedSettings(database_url=SecretStr(sys.argv[1]), amqp_url=SecretStr("amqp://unused/"))
    async with open_pool(settings) as pool:
        async def work(connection):
            await outbox.add(connection, [stop(str(i)) for i in range(100)])
        await transact(pool, work)
        await Relay(pool, Stuck(), claim_s=30, sweep_s=1).run_once()

asyncio.run(main())
"""


async def test_the_outbox_of_a_killed_replica_is_published_by_its_sibling(clean: Stack) -> None:
    """B-04: it committed, claimed, and died before the broker confirmed."""
    settings = clean.settings()
    command = [sys.executable, "-c", CHILD, settings.database_url.get_secret_value()]
    child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"claimed\n"
    child.kill()
    await child.wait()
    async with replica(clean) as sibling:
        sibling.reader.store(SessionStop, write_effects)
        await sibling.reader.start()
        relay = Relay(sibling.pool, sibling.publisher, claim_s=30, sweep_s=1)
        await relay.run_once()
        assert await waiting(sibling.pool) == 100, "the claim of the dead one still holds"
        await relay.run_once(now=datetime.now(UTC) + timedelta(seconds=31))
        await until(lambda: _effects(sibling.pool, 100))
        assert await waiting(sibling.pool) == 0
        assert await sibling.effects() == sorted(str(i) for i in range(100))


async def test_two_relays_publish_each_fact_once(clean: Stack) -> None:
    async with replica(clean) as one, open_publisher(clean.settings()) as other:
        await add(one.pool, *(str(i) for i in range(1200)))
        relays = [Relay(one.pool, publisher, claim_s=30, sweep_s=1) for publisher in (one.publisher, other)]
        await asyncio.gather(*(relay.run_once() for relay in relays for _ in range(2)))
        assert await facts_in(clean, "queue.session.stop") == 1200, "the inbox would hide one that left twice"
        assert await waiting(one.pool) == 0


async def test_what_the_broker_refused_is_tried_again(clean: Stack) -> None:
    class Refusing:
        is_connected = True

        def post_encoded(self, _kind: object, _encoded: bytes) -> asyncio.Future[None]:
            refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            refused.set_exception(NotPublished("away"))
            return refused

    async with open_pool(clean.settings()) as pool, open_publisher(clean.settings()) as publisher:
        await add(pool, "a")
        await Relay(pool, Refusing(), claim_s=30, sweep_s=1).run_once()  # type: ignore[arg-type]
        assert await waiting(pool) == 1
        await Relay(pool, publisher, claim_s=30, sweep_s=1).run_once()
        assert await waiting(pool) == 0, "the claim was given back, not left to run out"


async def test_rows_of_a_type_that_only_a_newer_replica_knows_stand_in_nobodys_way(clean: Stack) -> None:
    async with open_pool(clean.settings()) as pool, open_publisher(clean.settings()) as publisher:
        await pool.execute(
            "INSERT INTO outbox (fact_type, fact) SELECT 'NewerFact', '{}' FROM generate_series(1, 1100)"
        )
        await add(pool, "behind")
        relay = Relay(pool, publisher, claim_s=30, sweep_s=1)
        for _ in range(3):
            await relay.run_once()
        assert await facts_in(clean, "queue.session.stop") == 1
        assert await waiting(pool) == 1100


async def test_a_relay_that_is_stopped_finishes_its_turn(clean: Stack) -> None:
    """B-05: rows that stay claimed would wait half a minute at each deploy."""
    async with open_pool(clean.settings()) as pool, open_publisher(clean.settings()) as publisher:
        await add(pool, *(str(i) for i in range(400)))
        relay = Relay(pool, publisher, claim_s=30, sweep_s=3600)
        async with turning([relay.loop]):
            await until(lambda: _claimed(pool))
        assert await waiting(pool) == 0


async def _claimed(pool: Pool) -> bool:
    rows = "SELECT count(*) = 0 OR bool_or(claimed_until IS NOT NULL) FROM outbox"
    return bool(await pool.fetchval(rows))


async def facts_in(stack: Stack, queue_name: str) -> int:
    """Count the facts of all batches that wait in a queue, and leave it empty."""
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        queue = await (await connection.channel()).get_queue(queue_name)
        count = 0
        while message := await queue.get(fail=False, no_ack=True):
            count += len(json.loads(message.body))
        return count


async def _effects(pool: Pool, count: int) -> bool:
    return int(await pool.fetchval("SELECT count(*) FROM effects")) == count
