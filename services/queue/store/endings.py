"""Deliveries that have ended: their items end, or go back to their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from services.queue.decide import Ending, Finish, Item, Place, Requeue
from services.queue.store.statements import PRIORITY_OF, SQL, columns
from shared.database import Connection
from shared.facts import Priority


@dataclass(frozen=True, slots=True)
class Fire:
    """The fire that an item is, at the schedule's revision `rev`."""

    schedule_id: UUID
    fire_at: datetime
    rev: int


def fire_of(row: asyncpg.Record) -> Fire | None:
    """None: it is a message."""
    return Fire(row["schedule_id"], row["fire_at"], row["rev_needed"]) if row["schedule_id"] is not None else None


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that finished or went back: what the counters must know. `was` is its status before."""

    queue_id: UUID
    workspace_id: str
    was: str
    rev: int
    dispatched_at: float
    priority: Priority
    place: Place | None = None
    """Where it waits again."""
    fire: Fire | None = None
    """Of a tick that has ended."""
    absorbs: UUID | None = None
    """The schedule of a tick that waits again, if it may stand for a newer one."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A delivery that has ended, and its fate."""

    item: Item
    fate: Finish | Requeue
    answer: bytes | None = None
    error: str | None = None
    wait_s: float = 0.0


async def ending_instead(connection: Connection, queue_ids: Sequence[UUID]) -> list[asyncpg.Record]:
    """Read those that may end instead of going back."""
    return await connection.fetch(SQL["ending_instead"], queue_ids) if queue_ids else []


async def end(connection: Connection, items: Sequence[tuple[UUID, str, str, UUID | None]]) -> list[asyncpg.Record]:
    """End items that wait: `(queue_id, status, reason, superseded_by)`; return the rows of those that did."""
    return await connection.fetch(SQL["end_items"], *columns(items)) if items else []


async def finish(connection: Connection, settled: Sequence[Settled]) -> dict[UUID, Ended]:
    """End items, fenced; return those that really ended."""
    rows = [
        (
            each.item.queue_id, each.item.delivery_no, each.fate.status.value, each.fate.reason, each.fate.attempts,
            each.answer, each.error,
        )
        for each in settled
        if isinstance(each.fate, Finish)
    ]  # fmt: skip
    if not rows:
        return {}
    found = await connection.fetch(SQL["finish_items"], *columns(rows))
    return {
        row["queue_id"]: Ended(
            row["queue_id"],
            row["workspace_id"],
            row["status"],
            row["rev"],
            row["dispatched_epoch"] or 0.0,
            PRIORITY_OF[row["priority"]],
            fire=fire_of(row),
        )
        for row in found
    }


async def requeue(connection: Connection, settled: Sequence[Settled]) -> dict[UUID, Ended]:
    """Send items back to their place, fenced; return those that went."""
    rows = [
        (
            each.item.queue_id, each.item.delivery_no, each.fate.attempts, each.fate.deaths,
            # Where the workspace waits its row does not: a beat that opens it must find the same one first.
            each.wait_s if each.fate.row_wait else 0.0,
            each.fate.reason, each.error, each.fate.ending is Ending.UNKNOWN,
        )
        for each in settled
        if isinstance(each.fate, Requeue)
    ]  # fmt: skip
    if not rows:
        return {}
    found = await connection.fetch(SQL["requeue_items"], *columns(rows))
    return {
        row["queue_id"]: Ended(
            row["queue_id"],
            row["workspace_id"],
            "dispatched",
            0,
            row["dispatched_epoch"],
            PRIORITY_OF[row["priority"]],
            place=(row["lane"], row["rank_ms"]),
            absorbs=row["schedule_id"] if row["coalesces"] else None,
        )
        for row in found
    }
