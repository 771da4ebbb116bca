"""The end of what waits: expired, given up on, canceled, dropped."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from services.queue import decide, fires, store
from services.queue.metrics import ENDED
from services.queue.store import PRIORITY_OF
from shared import outbox
from shared.database import Connection
from shared.facts import Fact, ItemChanged, ItemStatus


async def end_waiting(
    connection: Connection, items: Sequence[tuple[UUID, str]], status: str, reason: str
) -> list[UUID]:
    """End items that wait, visibly; return those that did (a claim may have been first)."""
    before = await store.lock(connection, {name for _, name in items})
    rows = await store.end(connection, [(queue_id, status, reason, None) for queue_id, _ in items])
    after = dict(before)
    for row in rows:
        after[row["workspace_id"]] = decide.leave(after[row["workspace_id"]], PRIORITY_OF[row["priority"]])
        ENDED.labels(status).inc()
    await store.save(connection, before, after)
    told: list[Fact] = []
    for row in rows:
        name, queue_id, ended = row["workspace_id"], row["queue_id"], ItemStatus(status)
        told.append(ItemChanged(workspace_id=name, rev=row["rev"], queue_id=queue_id, status=ended, reason=reason))
        if fire := store.fire_of(row):
            began_at = row["dispatched_epoch"] if row["attempts"] else None
            told.append(fires.settled(name, queue_id, fire, ended, reason, began_at=began_at))
    if told:
        await outbox.add(connection, told)
    return [row["queue_id"] for row in rows]
