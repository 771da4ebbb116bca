"""What queue answers to questions about items: the Item of the HTTP face, a listing, a cancel.

A question reads and a cancel writes; both come over the bus from a proxy, which has already said who asks.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from services.queue import letters, store
from services.queue.backlogs import read_backlogs
from services.queue.drain import Drain
from services.queue.items import UNKNOWN, Answer, find, problem, show_all
from services.queue.store import PRIORITIES, SQL
from services.queue.verbs import COMMANDS
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import FLEET, QueryAnswered, QueueQuery
from shared.intake import Tell

_FIRST = (-1, -1, UUID(int=0))
_LANE, _RANK = re.compile(r"[01]"), re.compile(r"-?[0-9]{1,18}")
_LAST_ID = UUID(int=(1 << 128) - 1)
_WAITING = {"queued", "dispatched"}


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
        woken: list[str] = []
        moved = await self._lock(connection, facts)
        for fact in sorted(facts, key=lambda fact: str(fact.queue_id)):
            status, body = await _answer(connection, fact)
            if fact.verb in {"retry", "promote"} and "workspace_id" in body:
                woken.append(body["workspace_id"])
            encoded = json.dumps(body).encode()
            answered.append(
                (fact.reply_to, QueryAnswered(workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id,
                                              status=status, body=encoded))
            )  # fmt: skip

        backlogs = await read_backlogs(connection, await store.read(connection, moved) if moved else {}, moved.now)

        def tell() -> None:
            for backlog in backlogs:
                self.publisher.post(backlog)
            for reply_to, reply in answered:
                self.publisher.post(reply, to=reply_to)
            if any(fact.verb == "snapshot" for fact in facts):
                self.tell_backlogs()
            self.drain.wake(woken)

        return tell

    @staticmethod
    async def _lock(connection: Connection, facts: Sequence[QueueQuery]) -> store.Locked:
        """Lock all workspaces that this batch's commands move items in, at once and in key order.

        One after the other they would be locked in the order of the items, and meet a turn that comes the other way.
        """
        commands = [fact for fact in facts if fact.verb in COMMANDS]
        items = [fact.queue_id for fact in commands if fact.queue_id is not None]
        known = await store.find_ids(connection, items) if items else {}
        names = {each.workspace_id for each in known.values()}
        names |= {fact.workspace_id for fact in commands if fact.queue_id is None and fact.workspace_id != FLEET}
        return await store.lock(connection, names) if names else store.Locked()


async def _answer(connection: Connection, fact: QueueQuery) -> Answer:
    if fact.expires_at < datetime.now(UTC):
        return 408, problem("too_late", "The request came after its own deadline; nothing was done. Send it again.")
    return await _VERBS[fact.verb](connection, fact)


async def _item(connection: Connection, fact: QueueQuery) -> Answer:
    row = await find(connection, fact)
    return UNKNOWN if row is None else (200, (await show_all(connection, [row]))[0])


async def _whole_answer(connection: Connection, fact: QueueQuery) -> Answer:
    row = await find(connection, fact)
    if row is None:
        return UNKNOWN
    if row["answer"] is None:
        return 404, problem("no_answer", f"The item is {row['status']} and has no answer.")
    return 200, {"answer_base64": base64.b64encode(row["answer"]).decode()}


async def _known(connection: Connection, fact: QueueQuery) -> Answer:
    """Whether the id, or the key, stands for an item of this caller: then a message with it takes no new place."""
    about = (fact.workspace_id, fact.caller_hash, fact.queue_id, fact.key_hash)
    return (200, {}) if await connection.fetchval(SQL["is_known"], *about) else UNKNOWN


async def _list(connection: Connection, fact: QueueQuery) -> Answer:
    status = fact.status or "queued"
    priority = PRIORITIES[fact.priority] if fact.priority is not None else None
    try:
        after = _cursor(fact.cursor, waiting=status in _WAITING)
    except ValueError:
        return 400, problem("bad_cursor", "The cursor is not one that a listing gave. Start without it.")
    if status in _WAITING:
        query = "list_waiting" if status == "queued" else "list_dispatched"
        rows = await connection.fetch(SQL[query], fact.workspace_id, fact.caller_hash, *after, fact.limit + 1, priority)
    else:
        rows = await connection.fetch(
            SQL["list_finished"], fact.workspace_id, fact.caller_hash, status, after[-1], fact.limit + 1, priority
        )
    page = rows[: fact.limit]
    more = len(rows) > fact.limit
    whole = fact.caller_hash is None and fact.priority is None  # nobody between them was left out
    items = await show_all(connection, page, in_a_row=whole)
    return 200, {"items": items, "next_cursor": _cursor_of(page[-1]) if more else None}


def _cursor(text: str | None, *, waiting: bool) -> tuple[int, int, UUID]:
    if text is None:
        return _FIRST if waiting else (0, 0, _LAST_ID)
    lane, rank_ms, queue_id = text.split(".")
    if not (_LANE.fullmatch(lane) and _RANK.fullmatch(rank_ms)):
        raise ValueError(text)  # a number that no column can hold would be an error of ours, and a dead letter
    return int(lane), int(rank_ms), UUID(queue_id)


def _cursor_of(row: asyncpg.Record) -> str:
    return f"{row['lane'] or 0}.{row['rank_ms'] or 0}.{row['queue_id']}"


async def _snapshot(_connection: Connection, _fact: QueueQuery) -> Answer:
    return 200, {}  # it comes to everybody, by its own way


_VERBS: Mapping[str, Callable[[Connection, QueueQuery], Awaitable[Answer]]] = {
    "item": _item,
    "answer": _whole_answer,
    "list": _list,
    "known": _known,
    "snapshot": _snapshot,
    "dead_letters": letters.dead_letters,
    "replay": letters.replay,
    **COMMANDS,
}
