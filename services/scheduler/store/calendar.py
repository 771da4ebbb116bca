"""Rows of schedules and fires, in and out as values, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from services.scheduler.decide import Outcome, Schedule, Several, bounced, offset
from services.scheduler.store.statements import SQL, turned
from shared import outbox
from shared.database import Connection
from shared.facts import Priority, ScheduleChanged, TickSettled

_COLUMNS = tuple(each.name for each in fields(Schedule))
_PRIORITY = _COLUMNS.index("priority")


@dataclass(frozen=True, slots=True)
class Fire:
    """A row of fires that is to be written. Without an outcome it is on its way as the item `queue_id`."""

    schedule_id: UUID
    moments: Several
    rev: int
    outcome: Outcome | None = None
    reason: str | None = None
    merged_into: datetime | None = None
    queue_id: UUID | None = None
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class Advance:
    """A schedule's step: where it stood, where it stands, and what its counters get."""

    schedule: Schedule
    next_fire_at: datetime | None
    remaining_runs: int | None
    fires: int
    merged: int
    missed: int


def schedule_of(row: asyncpg.Record | Mapping[str, Any]) -> Schedule:
    values: list[Any] = [row[name] for name in _COLUMNS]
    values[_PRIORITY] = Priority(values[_PRIORITY])
    return Schedule(*values)


def due_at(schedule: Schedule, next_fire_at: datetime | None) -> datetime | None:
    return next_fire_at and next_fire_at + offset(schedule.schedule_id, schedule.jitter_s)


async def clock(connection: Connection, now: datetime | None = None) -> datetime:
    moment: datetime = await connection.fetchval(SQL["read_clock"], now)
    return moment


async def claim_due(connection: Connection, limit: int, now: datetime | None) -> list[asyncpg.Record]:
    """Lock the schedules that have been due for longest; each row has the database's `clock` besides."""
    return await connection.fetch(SQL["claim_due"], limit, now)


async def insert_fires(connection: Connection, fires: Sequence[Fire]) -> set[tuple[UUID, datetime]]:
    """Write fires; return those that were new by `(schedule_id, first moment)`."""
    if not fires:
        return set()
    rows = (
        (
            fire.schedule_id, fire.moments.first, fire.moments.last, fire.moments.count, fire.by_hand, fire.outcome,
            fire.reason, fire.merged_into, fire.queue_id, fire.rev,
        )
        for fire in fires
    )  # fmt: skip
    written = await connection.fetch(SQL["insert_fires"], *turned(rows))
    return {(row["schedule_id"], row["fire_at"]) for row in written}


async def advance(connection: Connection, advances: Sequence[Advance]) -> None:
    """Set the next moment of schedules that the caller holds."""
    rows = (
        (
            each.schedule.schedule_id, each.schedule.next_fire_at, each.next_fire_at,
            due_at(each.schedule, each.next_fire_at), each.remaining_runs, each.fires, each.merged, each.missed,
        )
        for each in advances
    )  # fmt: skip
    result = await connection.execute(SQL["advance_schedules"], *turned(rows))
    assert result == f"UPDATE {len(advances)}", "a row that we hold has moved"


async def tell_changed(connection: Connection, rows: Sequence[asyncpg.Record]) -> None:
    """Put into the outbox what these schedules say now. Owed for every new rev: a tick waits for its own."""
    if rows:
        await outbox.add(connection, [_changed(row) for row in rows])


def _changed(row: asyncpg.Record) -> ScheduleChanged:
    deleted = row["deleted_at"] is not None
    return ScheduleChanged(
        workspace_id=row["workspace_id"],
        rev=row["rev"],
        schedule_id=row["schedule_id"],
        prompt="" if deleted else row["prompt"],
        name=row["name"],
        paused=row["paused"],
        deleted=deleted,
    )


async def pause_failed(connection: Connection, schedule_id: UUID, reason: str) -> None:
    """Pause a schedule that cannot be fired, and say why."""
    await tell_changed(connection, await connection.fetch(SQL["pause_failed"], schedule_id, reason))


async def lock(connection: Connection, schedule_ids: Iterable[UUID]) -> dict[UUID, asyncpg.Record]:
    """Lock schedules in key order, deleted ones too."""
    rows = await connection.fetch(SQL["lock_schedules"], sorted(set(schedule_ids)))
    return {row["schedule_id"]: row for row in rows}


async def insert(connection: Connection, schedule: Schedule) -> bool:
    """Whether it was new; if not, its id or its name is taken."""
    return await connection.fetchval(SQL["insert_schedule"], *_values(schedule)) is not None


async def save(connection: Connection, schedule: Schedule) -> None:
    result = await connection.execute(SQL["save_schedule"], *_values(schedule))
    assert result == "UPDATE 1", "a row that we hold was not where we locked it"


def _values(schedule: Schedule) -> list[Any]:
    return [getattr(schedule, name) for name in _COLUMNS] + [due_at(schedule, schedule.next_fire_at)]


@dataclass(frozen=True, slots=True)
class Told:
    """The registry's word about a workspace."""

    rev: int
    removed: bool = False
    incarnation: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


async def hear_workspaces(connection: Connection, news: Mapping[str, Told]) -> tuple[list[str], list[str]]:
    """Take over what is newer; return the workspaces of which it is news, and of them those that are removed."""
    rows = (
        (name, told.rev, told.removed, told.incarnation, json.dumps(told.settings))
        for name, told in sorted(news.items())
    )
    heard = await connection.fetch(SQL["hear_workspaces"], *turned(rows))
    names = sorted(row["workspace_id"] for row in heard)
    return names, sorted(row["workspace_id"] for row in heard if row["removed"])


async def delete_of(connection: Connection, workspace_ids: Sequence[str]) -> list[asyncpg.Record]:
    """Delete the schedules of these workspaces."""
    ids = [row["schedule_id"] for row in await connection.fetch(SQL["schedules_of"], workspace_ids)]
    return await connection.fetch(SQL["delete_schedules"], ids) if ids else []


async def hold_workspaces(connection: Connection, workspace_ids: Iterable[str]) -> dict[str, bool]:
    """Hold workspaces against their removal: whether each is removed already."""
    wanted = sorted(set(workspace_ids))
    if not wanted:
        return {}
    await connection.execute(SQL["ensure_workspaces"], wanted)
    return {row["workspace_id"]: row["removed"] for row in await connection.fetch(SQL["hold_workspaces"], wanted)}


async def settle_fires(connection: Connection, facts: Sequence[TickSettled]) -> list[asyncpg.Record]:
    """Let fires end that have not; return those that did. The caller holds their schedules."""
    rows = (
        (fact.schedule_id, fact.fire_at, fact.outcome, fact.reason, fact.merged_into, fact.began_at)
        for fact in sorted(facts, key=lambda fact: (fact.schedule_id, fact.fire_at))
    )
    return await connection.fetch(SQL["settle_fires"], *turned(rows))


async def bounce_fires(connection: Connection, ended: Sequence[asyncpg.Record]) -> list[tuple[UUID, datetime]]:
    """Mark which fires have bounced by what has ended now; return those that nobody had marked."""
    keys = {
        (fire["schedule_id"], moment)
        for fire in ended
        for moment in bounced(fire["outcome"], fire["fire_at"], fire["merged_into"])
    }
    if not keys:
        return []
    rows = await connection.fetch(SQL["bounce_fires"], *turned(sorted(keys)))
    return [(row["schedule_id"], row["fire_at"]) for row in rows]


async def settle_schedules(connection: Connection, tallies: Sequence[tuple[Any, ...]]) -> None:
    """Add to the counters of schedules that the caller holds; columns as in the statement."""
    if tallies:
        await connection.execute(SQL["settle_schedules"], *turned(tallies))
