"""What scheduler answers to questions about schedules: they come over the bus from a proxy, which knows who may ask."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.scheduler import decide, forms, sessions, store
from services.scheduler import verbs as commands
from services.scheduler.cron import CronError, describe, rule, upcoming
from services.scheduler.metrics import COMMANDS
from services.scheduler.rules import rule_of
from services.scheduler.settings import Settings
from services.scheduler.shapes import UNKNOWN, Answer, Refused, iso, problem, shown, shown_fire
from services.scheduler.store import SQL
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import QueryAnswered, ScheduleQuery
from shared.intake import Tell

_PAGE_MAX = 100
_PAGE_PROMPTS = 1 << 19
"""Prompts of one page, in characters: an answer travels whole."""
_PREVIEW_MAX = 100
_LATEST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Answers:
    """The handler of ScheduleQuery, bound to what it tells."""

    settings: Settings
    publisher: Publisher
    wake: Callable[[], None]
    """Wakes the loop that fires: a schedule may have got an earlier moment."""
    step: Callable[[], None] = lambda: None
    """Wakes the loop of sessions."""

    async def query(self, connection: Connection, facts: Sequence[ScheduleQuery]) -> Tell:
        """Answer each question; what came too late is refused, so that a command is never a surprise."""
        wanted = [fact for fact in facts if fact.verb in commands.COMMANDS]
        # All that this batch's commands touch, at once and in key order: one after the other they would meet a turn
        # that comes the other way.
        removed = await store.hold_workspaces(
            connection, {each.workspace_id for each in wanted if each.verb == "create"}
        )
        await store.lock(connection, [each.schedule_id for each in wanted if each.schedule_id is not None])
        turn = sessions.Turn()
        answered = [(fact, *await self._answer(connection, fact, removed, turn)) for fact in facts]

        def tell() -> None:
            for fact, status, body in answered:
                reply = QueryAnswered(
                    workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id, status=status,
                    body=json.dumps(body).encode(),
                )  # fmt: skip
                self.publisher.post(reply, to=fact.reply_to)
                if fact.verb in commands.COMMANDS | sessions.VERBS:
                    COMMANDS.labels(fact.verb, str(status)).inc()
            if wanted:
                self.wake()
            if turn.told:
                sessions.tell(self.publisher, turn)
                self.step()

        return tell

    async def _answer(
        self, connection: Connection, fact: ScheduleQuery, removed: Mapping[str, bool], turn: sessions.Turn
    ) -> Answer:
        # By the database's clock: a replica's own may be wrong by more than a deadline is long (C-C2).
        now = await store.clock(connection)
        if fact.expires_at < now:
            words = "The request came after its own deadline; nothing was done. Send it again."
            return 408, problem("too_late", words)
        if fact.verb == "sessions":
            return await sessions.show(connection, fact, self.settings)
        if fact.verb in sessions.VERBS:
            return await sessions.command(connection, fact, self.settings, turn)
        if fact.verb not in commands.COMMANDS:
            return await _QUESTIONS[fact.verb](connection, fact)
        rows = await store.lock(connection, [fact.schedule_id] if fact.schedule_id is not None else [])
        held = commands.Held(now, rows, removed, self.settings.schedules_max)
        return await commands.command(connection, fact, held)


async def _list(connection: Connection, fact: ScheduleQuery) -> Answer:
    """By name, a page at a time."""
    limit = min(fact.limit, _PAGE_MAX)
    rows = await connection.fetch(SQL["list_schedules"], fact.workspace_id, fact.cursor or "", limit + 1)
    page: list[asyncpg.Record] = []
    length = 0
    for row in rows[:limit]:
        length += len(row["prompt"])
        if page and length > _PAGE_PROMPTS:
            break
        page.append(row)
    more = len(rows) > len(page)
    return 200, {
        "items": [shown(row) for row in page],
        "next_cursor": page[-1]["name"] if more else None,
    }


async def _show(connection: Connection, fact: ScheduleQuery) -> Answer:
    row = await _find(connection, fact)
    return UNKNOWN if row is None or row["deleted_at"] is not None else (200, shown(row))


async def _fires(connection: Connection, fact: ScheduleQuery) -> Answer:
    """Newest first; of a deleted schedule too: what happened has happened."""
    try:
        before = datetime.fromisoformat(fact.cursor) if fact.cursor is not None else _LATEST
    except ValueError:
        return _BAD_CURSOR
    if before.tzinfo is None:
        return _BAD_CURSOR
    if await _find(connection, fact) is None:
        return UNKNOWN
    rows = await connection.fetch(SQL["list_fires"], fact.schedule_id, before, fact.limit + 1)
    page = rows[: fact.limit]
    more = len(rows) > len(page)
    return 200, {
        "items": [shown_fire(row) for row in page],
        "next_cursor": iso(page[-1]["fire_at"]) if more else None,
    }


async def _preview(connection: Connection, fact: ScheduleQuery) -> Answer:
    """The next moments of a schedule; or, without an id, of the rule in the body, before it is made one."""
    count = min(fact.limit, _PREVIEW_MAX)
    now = await store.clock(connection)
    try:
        if fact.schedule_id is None:
            timing = forms.read_timing(forms.read_object(fact.body))
            asked = rule(created_at=now, **timing.model_dump())
            return 200, _moments(list(upcoming(asked, now, count)), timing.cron)
        row = await _find(connection, fact)
        if row is None or row["deleted_at"] is not None:
            return UNKNOWN
        schedule = store.schedule_of(row)
        return 200, _moments(decide.upcoming(schedule, rule_of(schedule), now, count), schedule.cron)
    except Refused as refused:
        return refused.answer()
    except CronError as error:
        return 422, problem(error.code.value, str(error))


def _moments(moments: Sequence[datetime], cron: str | None) -> dict[str, Any]:
    return {"next": [iso(moment) for moment in moments], "words": describe(cron) if cron is not None else None}


async def _find(connection: Connection, fact: ScheduleQuery) -> asyncpg.Record | None:
    """The schedule that the question is about; another workspace's is not told from none (A-S-12)."""
    row = await connection.fetchrow(SQL["find_schedule"], fact.schedule_id)
    return row if row is not None and row["workspace_id"] == fact.workspace_id else None


_BAD_CURSOR: Answer = (400, problem("bad_cursor", "The cursor is not one that a listing gave. Start without it."))

_QUESTIONS: Mapping[str, Callable[[Connection, ScheduleQuery], Awaitable[Answer]]] = {
    "list": _list,
    "show": _show,
    "fires": _fires,
    "preview": _preview,
}
