"""What queue answers to questions about items: the Item of the HTTP face, a listing, a cancel.

A question reads and a cancel writes; both come over the bus from a proxy, which has already said who asks.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from services.queue import decide, letters, store
from services.queue.drain import Drain
from services.queue.loops import end_waiting
from services.queue.store import PRIORITY_NAMES, SQL
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import QueryAnswered, QueueQuery
from shared.intake import Tell

ANSWER_INLINE_MAX = 64 << 10
_FIRST = (-1, -1, UUID(int=0))
_LAST_ID = UUID(int=(1 << 128) - 1)
_WAITING = {"queued", "dispatched"}

Answer = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The handler of QueueQuery, bound to what it tells."""

    publisher: Publisher
    drain: Drain
    tell_backlogs: Callable[[], None] = lambda: None
    """Wakes whoever tells every backlog."""

    async def query(self, connection: Connection, facts: Sequence[QueueQuery]) -> Tell:
        """Answer each question; what came too late is refused, so that a command is never a surprise."""
        answered = []
        # All workspaces that this batch cancels in, at once and in key order: one after the other they would be locked
        # in the order of the items, and meet a turn that comes the other way.
        canceling = [fact.queue_id for fact in facts if fact.verb == "cancel" and fact.queue_id is not None]
        if canceling:
            known = await store.find_ids(connection, canceling)
            await store.lock(connection, {each.workspace_id for each in known.values()})
        for fact in sorted(facts, key=lambda fact: str(fact.queue_id)):
            status, body = await _answer(connection, fact)
            encoded = json.dumps(body).encode()
            answered.append(
                (fact.reply_to, QueryAnswered(workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id,
                                              status=status, body=encoded))
            )  # fmt: skip

        def tell() -> None:
            for reply_to, reply in answered:
                self.publisher.post(reply, to=reply_to)
            if any(fact.verb == "snapshot" for fact in facts):
                self.tell_backlogs()

        return tell


async def _answer(connection: Connection, fact: QueueQuery) -> Answer:
    if fact.expires_at < datetime.now(UTC):
        return 408, _problem("too_late", "The request came after its own deadline; nothing was done. Send it again.")
    return await _VERBS[fact.verb](connection, fact)


def _problem(code: str, detail: str) -> dict[str, str]:
    return {"code": code, "detail": detail}


_UNKNOWN: Answer = (404, _problem("unknown_item", "There is no such item, or it is not yours. Check the id."))


async def _find(connection: Connection, fact: QueueQuery) -> asyncpg.Record | None:
    row = await connection.fetchrow(SQL["find_item"], fact.queue_id)
    if row is None or (fact.caller_hash is not None and row["caller_hash"] != fact.caller_hash):
        return None  # another's item is not told from none
    return row


async def _item(connection: Connection, fact: QueueQuery) -> Answer:
    row = await _find(connection, fact)
    if row is None:
        return _UNKNOWN
    position = None
    workspaces = await store.read(connection, [row["workspace_id"]])
    if row["status"] == "queued":
        ahead = await connection.fetchval(
            SQL["count_ahead"], row["workspace_id"], row["lane"], row["rank_ms"], row["queue_id"]
        )
        position = ahead + 1
    return 200, shape(row, workspaces[row["workspace_id"]], position)


async def _whole_answer(connection: Connection, fact: QueueQuery) -> Answer:
    row = await _find(connection, fact)
    if row is None:
        return _UNKNOWN
    if row["answer"] is None:
        return 404, _problem("no_answer", f"The item is {row['status']} and has no answer.")
    return 200, {"answer_base64": base64.b64encode(row["answer"]).decode()}


async def _known(connection: Connection, fact: QueueQuery) -> Answer:
    """Whether the id, or the key, stands for an item of this caller: then a message with it takes no new place."""
    about = (fact.workspace_id, fact.caller_hash, fact.queue_id, fact.key_hash)
    return (200, {}) if await connection.fetchval(SQL["is_known"], *about) else _UNKNOWN


async def _list(connection: Connection, fact: QueueQuery) -> Answer:
    status = fact.status or "queued"
    workspaces = await store.read(connection, [fact.workspace_id])
    if fact.workspace_id not in workspaces:
        return 200, {"items": [], "next_cursor": None}
    try:
        after = _cursor(fact.cursor, waiting=status in _WAITING)
    except ValueError:
        return 400, _problem("bad_cursor", "The cursor is not one that a listing gave. Start without it.")
    if status in _WAITING:
        query = "list_waiting" if status == "queued" else "list_dispatched"
        rows = await connection.fetch(SQL[query], fact.workspace_id, fact.caller_hash, *after, fact.limit + 1)
    else:
        rows = await connection.fetch(
            SQL["list_finished"], fact.workspace_id, fact.caller_hash, status, after[-1], fact.limit + 1
        )
    page = rows[: fact.limit]
    more = len(rows) > fact.limit
    places = await _places(connection, fact, page)
    items = [shape(row, workspaces[fact.workspace_id], place) for row, place in zip(page, places, strict=True)]
    return 200, {"items": items, "next_cursor": _cursor_of(page[-1]) if more else None}


async def _places(connection: Connection, fact: QueueQuery, page: Sequence[asyncpg.Record]) -> list[int | None]:
    """Positions of a page of waiting items: the first is counted, the others follow it, if nobody was left out."""
    if not page or page[0]["status"] != "queued":
        return [None] * len(page)
    if fact.caller_hash is not None:
        return [
            1 + await connection.fetchval(
                SQL["count_ahead"], row["workspace_id"], row["lane"], row["rank_ms"], row["queue_id"]
            )
            for row in page
        ]  # fmt: skip
    first = page[0]
    ahead = await connection.fetchval(
        SQL["count_ahead"], first["workspace_id"], first["lane"], first["rank_ms"], first["queue_id"]
    )
    return [ahead + number for number in range(1, len(page) + 1)]


def _cursor(text: str | None, *, waiting: bool) -> tuple[int, int, UUID]:
    if text is None:
        return _FIRST if waiting else (0, 0, _LAST_ID)
    lane, rank_ms, queue_id = text.split(".")
    return int(lane), int(rank_ms), UUID(queue_id)


def _cursor_of(row: asyncpg.Record) -> str:
    return f"{row['lane'] or 0}.{row['rank_ms'] or 0}.{row['queue_id']}"


async def _cancel(connection: Connection, fact: QueueQuery) -> Answer:
    row = await _find(connection, fact)
    if row is None:
        return _UNKNOWN
    # Whatever we have just read: under the lock that this takes it is neither claimed nor sent back any more.
    if await end_waiting(connection, [(row["queue_id"], row["workspace_id"])], "canceled", "canceled"):
        return await _item(connection, fact)
    if row["status"] == "canceled":
        return await _item(connection, fact)  # said twice: the same answer
    if await connection.fetchval(SQL["ask_cancel"], row["queue_id"]) is not None:
        _, body = await _item(connection, fact)
        detail = "Its agent has it. The cancel is remembered and passed on as soon as the agent has named its task."
        return 202, {**body, **_problem("cancel_requested", detail)}
    _, body = await _item(connection, fact)
    return 409, {**body, **_problem("already_ended", "The item has ended; what has ended does not change.")}


def shape(row: asyncpg.Record, workspace: decide.Workspace, position: int | None) -> dict[str, Any]:
    """The Item of the HTTP face."""
    answer = row["answer"]
    inline = answer is not None and len(answer) <= ANSWER_INLINE_MAX
    return {
        "queue_id": str(row["queue_id"]),
        "workspace_id": row["workspace_id"],
        "caller_id": row["caller_id"],
        "status": row["status"],
        "reason": row["ended_reason"],
        "priority": PRIORITY_NAMES[row["priority"]],
        "position": position,
        "why": decide.why(workspace, position, time.time()) if position is not None else None,
        "attempts": row["attempts"],
        "delivery_no": row["delivery_no"],
        "enqueued_at": _iso(row["enqueued_at"]),
        "dispatched_at": _iso(row["dispatched_at"]),
        "ended_at": _iso(row["ended_at"]),
        "expires_at": _iso(row["expires_at"]),
        "retry_of": None,
        "superseded_by": str(row["superseded_by"]) if row["superseded_by"] else None,
        "last_error": row["last_error"],
        "context_id": row["context_id"],
        "method": row["method"],
        "agent_task_id": row["agent_task_id"],
        "answer": _json(answer) if inline else None,
        "answer_url": f"/queue/{row['queue_id']}/answer" if answer is not None and not inline else None,
    }


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return answer.decode("utf-8", "replace")


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment is not None else None


async def _snapshot(_connection: Connection, _fact: QueueQuery) -> Answer:
    return 200, {}  # it comes to everybody, by its own way


_VERBS: Mapping[str, Callable[[Connection, QueueQuery], Awaitable[Answer]]] = {
    "item": _item,
    "answer": _whole_answer,
    "list": _list,
    "cancel": _cancel,
    "known": _known,
    "snapshot": _snapshot,
    "dead_letters": letters.dead_letters,
    "replay": letters.replay,
}
