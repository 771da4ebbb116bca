"""The queue's steps on its rows, as its handlers and turns make them, without a service that works on them."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.queue import decide, store
from services.queue.decide import Item, Reply
from services.queue.keeping import keep
from services.queue.settling import account, begin
from services.queue.store import Settled
from shared.database import Connection, Pool, transact
from shared.facts import MessageBusy
from tests.integration.queue_kit import digest


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
        after = {name: replace(workspace, url="http://a") for name, workspace in before.items()}
        for fact in facts:
            if fact.queue_id in kept.new:
                after[fact.workspace_id] = decide.keep(after[fact.workspace_id], store.place_of(fact), fact.priority)
        await store.save(connection, before, after)
        return kept.new

    return await transact(pool, work)


async def claim(pool: Pool, name: str, owner: str) -> list[Item]:
    """Claim what may be claimed, as a turn does."""

    async def work(connection: Connection) -> list[Item]:
        before = await store.lock(connection, [name])
        free = decide.spare(before[name], await store.clock(connection, None))
        spare = {name: free} if free else {}
        claimed = await store.claim(connection, spare, before, owner, None, starvation_limit_s=1800)
        after = {name: begin(before[name], mine) for name, mine in claimed.items()}
        await store.save_counters(connection, before, after)
        return [item for mine in claimed.values() for item in mine.items]

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
