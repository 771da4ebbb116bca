"""What people and callers may do with items: cancel, retry, promote, and cancel what matches.

Each runs in one transaction under the lock of its workspace, which the caller holds already, answers with what it did,
and said twice does it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.queue import decide, store
from services.queue.items import UNKNOWN, Answer, find, problem, show
from services.queue.store import PRIORITIES, PRIORITY_OF, SQL
from services.queue.waiting import end_waiting
from shared.database import Connection
from shared.facts import MessageBusy, Priority, QueueQuery

INFO_TTL_S = 300.0
_PAGE = 1000
"""So many items one command ends at most."""
_COUNT_MAX = 100_000
_REPEATABLE = {"failed", "expired", "canceled"}
RETRIED = "retry"
"""The reason of an item that was made by retrying another."""


async def cancel(connection: Connection, fact: QueueQuery) -> Answer:
    """Take a waiting item out of the line; ask for the end of one that its agent has."""
    row = await find(connection, fact)
    if row is None:
        return UNKNOWN
    # Whatever we have just read: under the lock that this takes it is neither claimed nor sent back any more.
    if await end_waiting(connection, [(row["queue_id"], row["workspace_id"])], "canceled", "canceled"):
        return await show(connection, row["queue_id"])
    if row["status"] == "canceled":
        return await show(connection, row["queue_id"])  # said twice: the same answer
    if await connection.fetchval(SQL["ask_cancel"], row["queue_id"]) is not None:
        _, body = await show(connection, row["queue_id"])
        detail = "Its agent has it. The cancel is remembered and passed on as soon as the agent has named its task."
        return 202, {**body, **problem("cancel_requested", detail)}
    _, body = await show(connection, row["queue_id"])
    return 409, {**body, **problem("already_ended", "The item has ended; what has ended does not change.")}


async def retry(connection: Connection, fact: QueueQuery) -> Answer:
    """Make a new item of one that ended badly: the same body, no key, a new give-up. One retry for each item.

    Of a tick it makes a message, with the prompt that was sent: its fire has been settled, and is not settled again.
    """
    row = await find(connection, fact)
    if row is None:
        return UNKNOWN
    if row["retried_by"] is not None:
        return await show(connection, row["retried_by"])
    if row["status"] not in _REPEATABLE:
        words = f"The item is {row['status']}. Only one that failed, expired or was canceled can be sent again."
        return 409, problem("not_ended_badly", words)
    failed = await connection.fetchrow(SQL["find_failed"], row["queue_id"])
    if failed is None or not failed["body"]:
        return 409, _bodyless(row)
    if (await store.read(connection, [row["workspace_id"]]))[row["workspace_id"]].removed:
        return 410, problem("workspace_removed", "The workspace was removed: nobody will deliver it.")
    queue_id = await _insert_again(connection, failed)
    await connection.execute(SQL["set_retried"], failed["queue_id"], queue_id)
    _, body = await show(connection, queue_id)
    return 201, body


def _bodyless(row: asyncpg.Record) -> dict[str, str]:
    if row["schedule_id"] is not None:
        return problem("never_sent", "It is a tick, and no message was made of it yet. Run its schedule instead.")
    return problem("body_gone", "Its body is no longer kept here. Send the message anew.")


async def _insert_again(connection: Connection, failed: asyncpg.Record) -> UUID:
    name, queue_id, priority = failed["workspace_id"], uuid7(), PRIORITY_OF[failed["priority"]]
    expires_at = datetime.now(UTC) + timedelta(seconds=INFO_TTL_S) if priority is Priority.INFO else None
    message = MessageBusy(
        workspace_id=name,
        rev=0,
        queue_id=queue_id,
        caller_id=failed["caller_id"],
        caller_hash=failed["caller_hash"],
        key_hash=hashlib.sha256(str(queue_id).encode()).digest(),
        body_hash=failed["body_hash"],
        reason=RETRIED,
        priority=priority,
        method=failed["method"],
        body=failed["body"],
        context_id=failed["context_id"],
        expires_at=expires_at,
        retry_of=failed["queue_id"],
    )
    before = await store.lock(connection, [name])
    new = await store.insert(connection, [message], before)
    assert new, "its id is new, and so is its key"
    kept = decide.keep(before[name], store.place_of(message), priority)
    await store.save_counters(connection, before, {name: kept})
    return queue_id


async def promote(connection: Connection, fact: QueueQuery) -> Answer:
    """Let an item go before all others of its lane. CRITICAL still goes first."""
    row = await find(connection, fact)
    if row is None:
        return UNKNOWN
    if row["status"] != "queued":
        words = "The item is no longer waiting, so it has no place in line."
        return 409, problem("not_waiting", words)
    name = row["workspace_id"]
    before = await store.lock(connection, [name])
    moved = await connection.fetchrow(SQL["promote_item"], row["queue_id"])
    if moved is not None:
        workspace = before[name]
        floors = decide.lowered(workspace.floors, (moved["lane"], moved["rank_ms"]))
        after = replace(workspace, floors=floors, rev=workspace.rev + 1)
        await store.save_counters(connection, before, {name: after})
    return await show(connection, row["queue_id"])


async def cancel_many(connection: Connection, fact: QueueQuery) -> Answer:
    """End what waits in a workspace and matches, in delivery order; or only count it."""
    priority = PRIORITIES[fact.priority] if fact.priority is not None else None
    about = (fact.workspace_id, priority, fact.caller_hash, fact.older_than_s, None)
    found = [row["queue_id"] for row in await connection.fetch(SQL["match_waiting"], *about, _COUNT_MAX)]
    if fact.count_only:
        return 200, {"matched": len(found), "canceled": 0, "remaining": len(found)}
    ended = await end_waiting(connection, [(each, fact.workspace_id) for each in found[:_PAGE]], "canceled", "dropped")
    return 200, {"matched": len(found), "canceled": len(ended), "remaining": len(found) - len(ended)}


COMMANDS: Mapping[str, Callable[[Connection, QueueQuery], Awaitable[Answer]]] = {
    "cancel": cancel,
    "retry": retry,
    "promote": promote,
    "cancel_many": cancel_many,
}
