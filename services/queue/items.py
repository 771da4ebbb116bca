"""Items as they are shown: the Item of the HTTP face, with its place in line and why it waits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from services.queue import decide, store
from services.queue.store import PRIORITY_OF, SQL
from shared.database import Connection
from shared.facts import QueueQuery

ANSWER_INLINE_MAX = 64 << 10

Answer = tuple[int, Mapping[str, Any]]
"""An HTTP status and the object that goes with it."""


def problem(code: str, detail: str) -> dict[str, str]:
    return {"code": code, "detail": detail}


UNKNOWN: Answer = (404, problem("item_unknown", "There is no such item, or it is not yours. Check the id."))


async def find(connection: Connection, fact: QueueQuery) -> asyncpg.Record | None:
    """The item that the question is about, if the asker may see it."""
    row = await connection.fetchrow(SQL["find_item"], fact.queue_id)
    if row is None or (fact.caller_hash is not None and row["caller_hash"] != fact.caller_hash):
        return None  # another's item is not told from none
    return row


async def show(connection: Connection, queue_id: UUID) -> Answer:
    """The item as it is now, also in the middle of a command's transaction."""
    row = await connection.fetchrow(SQL["find_item"], queue_id)
    if row is None:
        return UNKNOWN
    (shown,) = await show_all(connection, [row])
    return 200, shown


async def show_all(
    connection: Connection, rows: Sequence[asyncpg.Record], *, in_a_row: bool = False
) -> list[dict[str, Any]]:
    """Rows of one workspace. `in_a_row`: they wait one behind the other, so only the first is counted."""
    if not rows:
        return []
    name = rows[0]["workspace_id"]
    workspace = (await store.read(connection, [name])).get(name) or decide.Workspace(name)
    began = None
    if any(row["status"] == "queued" for row in rows):
        running = await store.running(connection, [workspace])
        began = min((row["dispatched_at"].timestamp() for row in running), default=None)
        began = min([moment for moment in (began, _oldest_forward(workspace)) if moment is not None], default=None)
    now, shown, first = time.time(), [], None
    for number, row in enumerate(rows):
        position = None
        if row["status"] == "queued":
            if first is None or not in_a_row:
                first = 1 + await connection.fetchval(
                    SQL["count_ahead"], name, row["lane"], row["rank_ms"], row["queue_id"]
                )
                position = first
            else:
                position = first + number
        shown.append(shape(row, workspace, position, session_began=began, now=now))
    return shown


def _oldest_forward(workspace: decide.Workspace) -> float | None:
    return min((began for proxy in workspace.forwards.values() for _, _, began in proxy.running), default=None)


def shape(
    row: asyncpg.Record,
    workspace: decide.Workspace,
    position: int | None,
    *,
    session_began: float | None = None,
    now: float,
) -> dict[str, Any]:
    """The Item of the HTTP face."""
    why, waits = None, None
    if position is not None:
        waiting = decide.Waiting(
            position=position, priority=PRIORITY_OF[row["priority"]], rank_ms=row["rank_ms"], attempts=row["attempts"],
            not_before=_seconds(row["not_before"]), session_began=session_began,
            awaits_prompt=row["schedule_id"] is not None and _seconds(row["not_before"]) == math.inf,
        )  # fmt: skip
        why, waits = decide.why(workspace, waiting, now)
    answer = row["answer"]
    inline = answer is not None and len(answer) <= ANSWER_INLINE_MAX
    return {
        "queue_id": str(row["queue_id"]),
        "workspace_id": row["workspace_id"],
        "caller_id": row["caller_id"],
        "status": row["status"],
        "reason": row["ended_reason"],
        "priority": PRIORITY_OF[row["priority"]].value,
        "position": position,
        "why": why,
        "waits": waits,
        "attempts": row["attempts"],
        "delivery_no": row["delivery_no"],
        "enqueued_at": _iso(row["enqueued_at"]),
        "dispatched_at": _iso(row["dispatched_at"]),
        "ended_at": _iso(row["ended_at"]),
        "expires_at": _iso(_expires_at(row, workspace, now)),
        "retry_of": str(row["retry_of"]) if row["retry_of"] else None,
        "retried_by": str(row["retried_by"]) if row["retried_by"] else None,
        "superseded_by": str(row["superseded_by"]) if row["superseded_by"] else None,
        "last_error": row["last_error"],
        "context_id": row["context_id"],
        "method": row["method"],
        "agent_task_id": row["agent_task_id"],
        "kind": "message" if row["schedule_id"] is None else "tick",
        "schedule_id": str(row["schedule_id"]) if row["schedule_id"] else None,
        "fire_at": _iso(row["fire_at"]),
        "merged_count": row["merged_count"],
        "first_missed_at": _iso(row["first_missed_at"]),
        "answer": _json(answer) if inline else None,
        "answer_url": f"/queue/{row['queue_id']}/answer" if answer is not None and not inline else None,
    }


def _seconds(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return math.inf if moment.year == MAXYEAR else moment.timestamp()  # infinity, as the driver says it


def _expires_at(row: asyncpg.Record, workspace: decide.Workspace, now: float) -> datetime | None:
    """When it ends by itself, if the workspace goes on now: through a pause the clock stands still."""
    moment: datetime | None = row["expires_at"]
    if moment is None or workspace.paused_at is None:
        return moment
    since = max(workspace.paused_at, row["enqueued_at"].timestamp())
    return moment + timedelta(seconds=max(0.0, now - since))


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return answer.decode("utf-8", "replace")


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment is not None else None
