"""What people may do with schedules: create, change, delete, run now, pause, resume.

Each runs in one transaction under the schedule's lock, which the caller holds already, answers with what it did, and
said twice does it once: the record of who changed what knows the question's id.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.scheduler import decide, forms, store
from services.scheduler.cron import CronError, first
from services.scheduler.decide import Schedule, Several
from services.scheduler.rules import rule_of
from services.scheduler.shapes import UNKNOWN, Answer, Refused, problem, shown, shown_fire
from services.scheduler.store import SQL, Fire
from shared import outbox
from shared.database import Connection
from shared.facts import ScheduleQuery, ScheduleTick

COMMANDS = frozenset({"create", "patch", "delete", "run", "pause", "resume"})


@dataclass(frozen=True, slots=True)
class Held:
    """What the caller's transaction holds, and what it may count on."""

    now: datetime
    """The database's time once everything was locked."""
    rows: Mapping[UUID, asyncpg.Record]
    """Schedules by id, deleted ones too."""
    removed: Mapping[str, bool]
    """Workspaces in which something is created: whether each is gone."""
    schedules_max: int


async def command(connection: Connection, fact: ScheduleQuery, held: Held) -> Answer:
    """Do what `fact` says, once."""
    done = await connection.fetchrow(SQL["find_command"], fact.query_id)
    if done is not None:
        return await _said_again(connection, done)
    try:
        if fact.verb == "create":
            return await _create(connection, fact, held)
        row = _found(fact, held)
        if fact.verb == "delete" and row["deleted_at"] is not None:
            return 200, _gone(row)
        return await _CHANGES[fact.verb](connection, fact, row, held.now)
    except Refused as refused:
        return refused.answer()
    except CronError as error:
        return 422, problem(error.code.value, str(error))


def _found(fact: ScheduleQuery, held: Held) -> asyncpg.Record:
    """The schedule that a command is about. Another workspace's is not told from none (A-S-12)."""
    row = held.rows.get(fact.schedule_id) if fact.schedule_id else None
    gone = row is not None and row["deleted_at"] is not None and fact.verb != "delete"
    if row is None or gone or row["workspace_id"] != fact.workspace_id:
        raise Refused("unknown_schedule", "There is no such schedule here. Check the id.", status=404)
    if row["deleted_at"] is None and fact.if_match not in {None, row["rev"]}:
        words = f"The schedule has rev {row['rev']} by now. Read it again and repeat the change."
        raise Refused("rev_mismatch", words, status=412)
    return row


async def _create(connection: Connection, fact: ScheduleQuery, held: Held) -> Answer:
    if fact.schedule_id is None:
        raise Refused("no_id", "A new schedule comes with the id that it gets.")
    there = held.rows.get(fact.schedule_id)
    if there is not None and there["workspace_id"] == fact.workspace_id and there["deleted_at"] is None:
        return 200, shown(there)
    if there is not None:
        raise Refused("id_taken", "This id is or was another schedule's. Choose another.", status=409)
    if held.removed.get(fact.workspace_id):
        words = "The workspace was removed; nobody would answer its schedules."
        raise Refused("workspace_removed", words, status=409)
    form = forms.read_form(forms.read_object(fact.body))
    schedule = forms.schedule_of(form, fact.schedule_id, fact.workspace_id, anchor_at=held.now, rev=1)
    schedule = replace(schedule, next_fire_at=_begun(schedule, held.now))
    most = held.schedules_max
    if await connection.fetchval(SQL["count_schedules"], fact.workspace_id, most) >= most:
        words = f"The workspace has {most} schedules, which are as many as it may have. Delete some."
        raise Refused("too_many_schedules", words, status=409)
    if not await store.insert(connection, schedule):
        raise _name_taken(schedule)
    return 201, shown(await _changed(connection, fact, schedule.schedule_id))


def _begun(schedule: Schedule, now: datetime) -> datetime | None:
    """The first moment of a new schedule, which must have one. Raises CronError or Refused."""
    begins = first(rule_of(schedule), now)
    if decide.bounded(begins, schedule.ends_at, schedule.remaining_runs) is None:
        raise Refused(
            "never_fires", "The schedule is over before its first moment: look at ends_at and remaining_runs."
        )
    return None if schedule.paused else begins


async def _patch(connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime) -> Answer:
    return await _change(connection, fact, row, now, forms.read_object(fact.body))


async def _pause(connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime) -> Answer:
    said = forms.read_object(fact.body)
    note = {"pause_note": said["note"]} if "note" in said else {}
    return await _change(connection, fact, row, now, {"paused": True, **note})


async def _resume(connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime) -> Answer:
    return await _change(connection, fact, row, now, {"paused": False})


async def _change(
    connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime, changes: dict[str, Any]
) -> Answer:
    before = store.schedule_of(row)
    form = forms.merged(before, changes)
    after = forms.schedule_of(form, before.schedule_id, before.workspace_id, anchor_at=before.anchor_at, rev=before.rev)
    after = replace(after, paused_by_error=before.paused_by_error if after.paused else None)
    if decide.timing(after) != decide.timing(before):
        after = replace(after, anchor_at=now)
        first(rule_of(after), now)  # refuses what can never fire
    if replace(after, next_fire_at=before.next_fire_at) == before:
        return 200, shown(row)
    next_fire_at = decide.edited(before, after, rule_of(after), now)
    after = replace(after, next_fire_at=next_fire_at, rev=before.rev + 1)
    if after.name != before.name and await connection.fetchval(
        SQL["is_named"], after.workspace_id, after.name, after.schedule_id
    ):
        raise _name_taken(after)
    if after.next_fire_at != before.next_fire_at:
        await _withdraw(connection, before, now, "paused" if after.paused else "edited")
    await store.save(connection, after)
    return 200, shown(await _changed(connection, fact, after.schedule_id))


async def _delete(connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime) -> Answer:
    await _withdraw(connection, store.schedule_of(row), now, "deleted")
    await connection.execute(SQL["delete_schedule"], row["schedule_id"])
    return 200, _gone(await _changed(connection, fact, row["schedule_id"]))


async def _run(connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, now: datetime) -> Answer:
    """Fire now, also when it is over: a person asked for it, and it takes none of the remaining runs."""
    schedule = store.schedule_of(row)
    if schedule.paused:  # the queue withdraws what a paused schedule tells it
        raise Refused("paused", "The schedule is paused. Resume it, and then let it run.", status=409)
    queue_id = uuid7()
    fire = Fire(
        schedule.schedule_id, Several(now, now, 1), schedule.rev, reason="by_hand", queue_id=queue_id, by_hand=True
    )
    if not await store.insert_fires(connection, [fire]):
        raise Refused("fired_now", "The schedule fires at this very moment by itself.", status=409)
    await connection.execute(SQL["count_fires"], schedule.schedule_id, 1, 0)
    tick = ScheduleTick(
        workspace_id=schedule.workspace_id, rev=schedule.rev, schedule_id=schedule.schedule_id, fire_at=now,
        queue_id=queue_id, priority=schedule.priority, overlap=schedule.overlap, context=schedule.context,
        ceiling_s=schedule.ceiling_s,
    )  # fmt: skip
    await outbox.add(connection, [tick])
    await _record(connection, fact, row, fire_at=now)
    return 201, await _fire(connection, schedule.schedule_id, now)


async def _withdraw(connection: Connection, before: Schedule, now: datetime, reason: str) -> None:
    """Let the moments that were due end visibly: their schedule says otherwise now."""
    if before.next_fire_at is None or before.next_fire_at > now:
        return
    try:
        moments = decide.overdue(before, rule_of(before), now)
    except CronError:
        return  # nobody can say which they were
    if moments is not None and await store.insert_fires(
        connection, [Fire(before.schedule_id, moments, before.rev, "canceled", reason)]
    ):
        await connection.execute(SQL["count_fires"], before.schedule_id, moments.count, moments.count)


async def _changed(connection: Connection, fact: ScheduleQuery, schedule_id: UUID) -> asyncpg.Record:
    """Record and tell a change; return the row as it is now."""
    row = await connection.fetchrow(SQL["find_schedule"], schedule_id)
    assert row is not None, "it has just been written"
    await store.tell_changed(connection, [row])
    await _record(connection, fact, row)
    return row


async def _record(
    connection: Connection, fact: ScheduleQuery, row: asyncpg.Record, *, fire_at: datetime | None = None
) -> None:
    about = (row["workspace_id"], row["schedule_id"], row["rev"], fire_at)
    await connection.execute(SQL["insert_audit"], fact.query_id, fact.by, fact.verb, *about)


async def _said_again(connection: Connection, done: asyncpg.Record) -> Answer:
    """A command that was done before, and whose answer was lost."""
    if done["fire_at"] is not None:
        return 201, await _fire(connection, done["schedule_id"], done["fire_at"])
    row = await connection.fetchrow(SQL["find_schedule"], done["schedule_id"])
    if row is None:
        return UNKNOWN
    return 200, _gone(row) if done["action"] == "delete" else shown(row)


async def _fire(connection: Connection, schedule_id: UUID, fire_at: datetime) -> dict[str, Any]:
    row = await connection.fetchrow(SQL["find_fire"], schedule_id, fire_at)
    return shown_fire(row) if row is not None else {"schedule_id": str(schedule_id)}


def _gone(row: asyncpg.Record) -> dict[str, Any]:
    return {"schedule_id": str(row["schedule_id"]), "deleted": True, "rev": row["rev"]}


def _name_taken(schedule: Schedule) -> Refused:
    words = f"The workspace has a schedule named {schedule.name!r} already. Choose another."
    return Refused("name_taken", words, status=409)


_CHANGES: Mapping[str, Callable[[Connection, ScheduleQuery, asyncpg.Record, datetime], Awaitable[Answer]]] = {
    "patch": _patch,
    "pause": _pause,
    "resume": _resume,
    "delete": _delete,
    "run": _run,
}
