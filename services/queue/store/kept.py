"""Messages on their way in: what is known already, and what becomes an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from services.queue import decide
from services.queue.decide import Place, Workspace
from services.queue.store.statements import PRIORITIES, SQL, columns
from shared.database import Connection
from shared.facts import MessageBusy


@dataclass(frozen=True, slots=True)
class Known:
    """An item that is there already. `body_hash` tells whether it is the same message."""

    queue_id: UUID
    workspace_id: str
    caller_hash: bytes
    body_hash: bytes


async def find_ids(connection: Connection, queue_ids: Sequence[UUID]) -> dict[UUID, Known]:
    return {row["queue_id"]: Known(**row) for row in await connection.fetch(SQL["find_ids"], queue_ids)}


Key = tuple[str, bytes, bytes]


def key_of(fact: MessageBusy) -> Key:
    return (fact.workspace_id, fact.caller_hash, fact.key_hash)


async def reserve_keys(connection: Connection, facts: Sequence[MessageBusy], keep_s: float) -> dict[Key, Known]:
    """Take the explicit keys of `facts`; return those that somebody had before, with what they stand for."""
    if not facts:
        return {}
    first = {key_of(fact): fact for fact in reversed(facts)}  # of two with the same key in one batch
    wanted = columns((*key_of(fact), fact.queue_id, fact.body_hash) for fact in first.values())
    await connection.execute(SQL["insert_keys"], *wanted, keep_s)
    return await _keyed(connection, "find_keys", facts)


async def find_active(connection: Connection, facts: Sequence[MessageBusy]) -> dict[Key, Known]:
    return await _keyed(connection, "find_active_keys", facts) if facts else {}


async def _keyed(connection: Connection, query: str, facts: Sequence[MessageBusy]) -> dict[Key, Known]:
    rows = await connection.fetch(SQL[query], *columns(key_of(fact) for fact in facts))
    return {
        (row["workspace_id"], row["caller_hash"], row["key_hash"]): Known(
            row["queue_id"], row["workspace_id"], row["caller_hash"], row["body_hash"]
        )
        for row in rows
    }


def place_of(fact: MessageBusy) -> Place:
    """Where the item of this message stands in the line."""
    return (decide.lane(fact.priority), decide.rank(fact.queue_id, fact.fact_id, fact.priority))


async def insert(
    connection: Connection, facts: Sequence[MessageBusy], workspaces: Mapping[str, Workspace]
) -> set[UUID]:
    """Insert items; return the ids that were new (the others met an active item with their key)."""
    if not facts:
        return set()
    rows = (
        (
            fact.queue_id, fact.workspace_id, fact.caller_id, fact.caller_hash, fact.key_hash, fact.body_hash,
            PRIORITIES[fact.priority], *place_of(fact),
            fact.method, fact.body, fact.reason, fact.context_id, fact.hops,
            fact.not_before, fact.expires_at, workspaces[fact.workspace_id].give_up_after_s, fact.retry_of,
        )
        for fact in facts
    )  # fmt: skip
    return {row["queue_id"] for row in await connection.fetch(SQL["insert_items"], *columns(rows))}


async def insert_ended(connection: Connection, ended: Sequence[tuple[MessageBusy, str, str, UUID | None]]) -> None:
    """Write proposed ids that never became items: `(fact, status, reason, superseded_by)`."""
    if not ended:
        return
    rows = (
        (
            fact.queue_id, fact.workspace_id, fact.caller_id, fact.caller_hash, fact.key_hash, fact.body_hash,
            PRIORITIES[fact.priority], status, reason, fact.method, fact.body, fact.context_id, by,
        )
        for fact, status, reason, by in sorted(ended, key=lambda each: each[0].queue_id)
    )  # fmt: skip
    await connection.execute(SQL["insert_finished"], *columns(rows))
