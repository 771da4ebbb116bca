"""Who may still write what: late finishes, two judges of one row, a finish between an insert and its look-up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.queue import store
from services.queue.drain import Drain, key_of
from services.queue.loops import Loops
from services.queue.store import SQL
from shared.addresses import AddressRules
from shared.agents import Agents
from shared.broker import open_publisher
from shared.database import Pool, open_pool
from tests.conftest import Stack, until
from tests.integration.queue_kit import agent, door, queue_service, queue_settings
from tests.integration.rows_kit import claim, enqueue, finished, message, settle


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, and no service that works on them."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute("TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas")
        yield pool


async def test_only_the_delivery_that_holds_the_row_may_write(rows: Pool) -> None:
    """A-Q-22, B-03: a late failure changes nothing; a late success completes a row only while it waits again."""
    fact = message("w")
    await enqueue(rows, fact)
    (first,) = await claim(rows, "w", "one")
    assert await settle(rows, first, "owner_died")
    (second,) = await claim(rows, "w", "two")
    assert second.delivery_no == 2
    for late in ("failed_attempt", "busy", "unknown", "refused", "delivered"):
        assert not await settle(rows, first, late), f"{late} of delivery 1 while 2 is under way"
    assert await settle(rows, second, "busy")
    for late in ("failed_attempt", "busy", "unknown", "refused"):
        assert not await settle(rows, first, late), f"{late} of delivery 1 while the row waits"  # type: ignore[arg-type]
    assert await settle(rows, first, "delivered", b"late, and true")
    row = await finished(rows, fact.queue_id)
    assert row is not None
    assert (row["status"], row["answer"]) == ("completed", b"late, and true")
    assert not await settle(rows, second, "delivered", b"too late"), "what has ended never changes"
    counters = await rows.fetchrow("SELECT waiting, running FROM workspaces WHERE workspace_id = 'w'")
    assert tuple(counters or ()) == (0, 0)


async def test_two_judges_of_one_lost_row_have_one_effect(rows: Pool) -> None:
    """B-02: both find the owner silent; the row goes back once, and counts one attempt."""
    await enqueue(rows, message("w"))
    (item,) = await claim(rows, "w", "gone")
    effects = await asyncio.gather(*(settle(rows, item, "owner_died") for _ in range(5)))
    assert sum(effects) == 1
    assert await rows.fetchval("SELECT attempts FROM a2a_queue") == 1
    assert await rows.fetchval("SELECT waiting FROM workspaces") == 1


async def test_a_claim_is_not_adopted_while_its_turn_may_still_begin_it(rows: Pool, stack: Stack) -> None:
    """B-04: the commit is slow to be confirmed, and reread finds the row meanwhile, as often as it likes."""
    settings = queue_settings(stack)
    async with open_publisher(settings) as publisher:
        drain = Drain(settings, rows, publisher, Agents(AddressRules(allow_loopback=True)))
        loops = Loops(settings, rows, rows, publisher, drain)
        await enqueue(rows, message("w"))
        (item,) = await claim(rows, "w", settings.replica_id)
        drain.turns_begun += 1
        for _ in range(3):
            await loops.reread()
        assert not drain.holds(key_of(item))
        drain.turns_ended += 1
        await loops.reread()
        assert drain.holds(key_of(item))


SILENT_S = 20.0


async def seen(pool: Pool, replica: str, *, beat_s: float, unbroken_s: float = 100.0) -> None:
    """A replica that beat last `beat_s` ago, after `unbroken_s` without a break."""
    await pool.execute(
        """INSERT INTO replicas (replica_id, beat_at, unbroken_since)
           VALUES ($1, now() - make_interval(secs => $2), now() - make_interval(secs => $2 + $3))""",
        replica, beat_s, unbroken_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gap_s", "may_judge"), [(5.0, True), (9.0, True), (11.0, False), (19.0, False), (40.0, False)]
)
async def test_a_judge_whose_own_beats_were_held_back_judges_nobody(rows: Pool, gap_s: float, may_judge: bool) -> None:
    """B-07, B-18: an outage a little shorter than the silence would otherwise take every sibling's deliveries."""
    await seen(rows, "judge", beat_s=gap_s)
    assert await rows.fetchval(SQL["beat_replica"], "judge", SILENT_S) is may_judge


@pytest.mark.parametrize(
    ("judge_s", "owner_s", "claimed_s", "lost"),
    [
        (0.0, 19.0, 60.0, 0),
        (0.0, 21.0, 60.0, 1),
        (30.0, 35.0, 60.0, 0),  # Postgres stood still between the judge's beat and its look
        (30.0, 51.0, 60.0, 1),
        (0.0, 90.0, 1.0, 0),  # it is back, and has claimed before it could beat
        (0.0, None, 1.0, 0),
        (0.0, None, 60.0, 1),
    ],
)
async def test_an_owner_is_lost_by_its_silence_up_to_the_judges_last_beat(
    rows: Pool, judge_s: float, owner_s: float | None, claimed_s: float, lost: int
) -> None:
    """B-04, B-07: neither a frozen Postgres nor a claim before the first beat makes a living owner a dead one."""
    await enqueue(rows, message("w"))
    await claim(rows, "w", "owner")
    await rows.execute("UPDATE a2a_queue SET dispatched_at = now() - make_interval(secs => $1)", claimed_s)
    await seen(rows, "judge", beat_s=judge_s)
    if owner_s is not None:
        await seen(rows, "owner", beat_s=owner_s)
    async with rows.acquire() as connection:
        assert len(await store.find_lost(connection, "judge", SILENT_S, None, after=None, most=500)) == lost


async def test_a_key_whose_item_ends_in_between_is_never_lost(rows: Pool) -> None:
    """A-Q-07, A-Q-27: insert, conflict, the active row ends, look-up: each send is new or a known one."""
    name, key = "w", "k"
    outcomes = {"new": 0, "known": 0}
    stopped = asyncio.Event()

    async def ends() -> None:
        while not stopped.is_set():
            for item in await claim(rows, name, "one"):
                await settle(rows, item, "delivered", b"{}")
            await asyncio.sleep(0)

    async def sends() -> None:
        for _ in range(40):
            fact = message(name, key)
            new = await enqueue(rows, fact)
            known = await finished(rows, fact.queue_id)
            assert new or (known is not None and known["status"] == "superseded")
            outcomes["new" if new else "known"] += 1

    ending = asyncio.create_task(ends())
    await asyncio.gather(*(sends() for _ in range(4)))
    stopped.set()
    await ending
    assert sum(outcomes.values()) == 160
    assert outcomes["new"] > 1, "the race was not met: the key was never free again"
    print(f"one key, 160 sends against a drain: {outcomes}")


async def test_drainers_never_deliver_twice_or_out_of_order_or_over_capacity(rows: Pool) -> None:
    """B-01, A-P-15: 12 drainers, 240 items, 4 workspaces of capacity 1; each claim is random in time."""
    names = [f"w{number}" for number in range(4)]
    facts = [message(names[number % 4]) for number in range(240)]
    await enqueue(rows, *facts)
    begun: dict[str, list[UUID]] = {name: [] for name in names}
    in_flight = dict.fromkeys(names, 0)
    most = dict.fromkeys(names, 0)
    chance = random.Random(7)

    async def drainer(number: int) -> None:
        while any(len(begun[name]) < 60 for name in names):
            name = chance.choice(names)
            for item in await claim(rows, name, f"replica-{number}"):
                begun[name].append(item.queue_id)
                in_flight[name] += 1
                most[name] = max(most[name], in_flight[name])
                await asyncio.sleep(chance.random() * 0.004)
                in_flight[name] -= 1
                await settle(rows, item, "delivered")
            await asyncio.sleep(0)

    await asyncio.wait_for(asyncio.gather(*(drainer(number) for number in range(12))), 60)
    assert set(most.values()) == {1}
    for name in names:
        assert len(set(begun[name])) == len(begun[name]) == 60
        assert all(first < second for first, second in pairwise(begun[name]))


async def test_a_replica_that_stood_still_after_its_claim_sends_nothing(
    stack: Stack, rows: Pool, admin: asyncpg.Connection[asyncpg.Record]
) -> None:
    """B-02, B-03: its claim's commit takes longer than its silence may: another replica may have delivered the item."""
    await admin.execute(
        """CREATE FUNCTION queue.stand_still() RETURNS trigger LANGUAGE plpgsql
           AS 'BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END';
           CREATE CONSTRAINT TRIGGER stand_still AFTER UPDATE ON queue.a2a_queue DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW WHEN (NEW.status = 'dispatched') EXECUTE FUNCTION queue.stand_still()"""
    )
    name = f"w-{uuid7().hex[-8:]}"
    async with (
        door(stack) as front,
        queue_service(stack, owner_silent_s=0.4, owner_beat_s=0.1, sweep_s=0.5),
        agent(name) as worker,
    ):
        try:
            await front.register(name, worker.url)
            fact = front.busy(name, "x")
            await front.keep(fact)

            async def claimed_again() -> bool:
                query = "SELECT delivery_no FROM a2a_queue WHERE queue_id = $1"
                return int(await rows.fetchval(query, fact.queue_id)) >= 3

            await until(claimed_again)
            assert not worker.received
        finally:
            await admin.execute("DROP FUNCTION queue.stand_still() CASCADE")
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["attempts"]) == ("completed", 0)
        assert len(worker.received) == 1
