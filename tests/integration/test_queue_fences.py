"""Who may still write what: late finishes, two judges of one row, a finish between an insert and its look-up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.queue import decide, store
from services.queue.decide import Item, Reply
from services.queue.drain import account
from services.queue.handlers import keep
from services.queue.store import Settled
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import MessageBusy
from tests.conftest import Stack
from tests.integration.queue_kit import digest


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, and no service that works on them."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute("TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas")
        yield pool


def message(name: str, key: str | None = None) -> MessageBusy:
    body = b'{"method":"message/send"}'
    return MessageBusy(
        workspace_id=name, rev=1, queue_id=uuid7(), caller_id="c", caller_hash=digest("c"),
        key_hash=digest(key or str(uuid7())), body_hash=digest("b"), reason="backlog", method="message/send", body=body,
    )  # fmt: skip


async def enqueue(pool: Pool, *facts: MessageBusy) -> set[UUID]:
    """Keep messages as the handler does; return the ids that were new."""

    async def work(connection: Connection) -> set[UUID]:
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        kept = await keep(connection, facts, before, 3600)
        after = {
            name: replace(
                workspace,
                url="http://a",
                waiting=workspace.waiting
                + sum(fact.queue_id in kept.new for fact in facts if fact.workspace_id == name),
            )
            for name, workspace in before.items()
        }
        await store.save(connection, before, after)
        return kept.new

    return await transact(pool, work)


async def claim(pool: Pool, name: str, owner: str) -> list[Item]:
    """Claim what may be claimed, as a turn does."""

    async def work(connection: Connection) -> list[Item]:
        before = await store.lock(connection, [name])
        free = decide.spare(before[name], await store.clock(connection, None))
        items, first = await store.claim(connection, {name: free} if free else {}, before, owner, None)
        after = {name: decide.begin(before[name], len(items), first[name])} if items else before
        await store.save(connection, before, after)
        return items

    return await transact(pool, work)


async def settle(pool: Pool, item: Item, reply: Reply, answer: bytes | None = None) -> bool:
    """Write what came back, as a turn does; whether it had an effect."""
    fate = decide.fate(reply, attempts=item.attempts, deaths=item.deaths, at_most_once=False, cancel_requested=False)
    settled = Settled(item, fate, answer)

    async def work(connection: Connection) -> bool:
        before = await store.lock(connection, [item.workspace_id])
        now = await store.clock(connection, None)
        found = {**await store.finish(connection, [settled]), **await store.requeue(connection, [settled])}
        row = found.get(item.queue_id)
        if row is not None:
            await store.save(
                connection, before, {item.workspace_id: account(before[item.workspace_id], settled, row, now)}
            )
        return row is not None

    return await transact(pool, work)


async def finished(pool: Pool, queue_id: UUID) -> asyncpg.Record | None:
    return await pool.fetchrow("SELECT status, answer FROM a2a_finished WHERE queue_id = $1", queue_id)


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
