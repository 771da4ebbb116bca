"""Schedules as the queue knows them, and the items that stand for their fires. Under the lock of their workspaces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from services.queue.decide import Place, Schedule, Tick, Workspace
from services.queue.store.statements import PRIORITIES, SQL, columns
from shared.database import Connection
from shared.facts import Priority, ScheduleChanged


def caller_of(schedule_id: UUID) -> tuple[str, bytes]:
    """Who sends the ticks of a schedule, and the key by which they are found. Nobody outside may be called so."""
    caller = f"system:schedule:{schedule_id}"
    return caller, hashlib.sha256(caller.encode()).digest()


async def find_schedules(connection: Connection, schedule_ids: Iterable[UUID]) -> dict[UUID, Schedule]:
    rows = await connection.fetch(SQL["find_schedules"], list(schedule_ids))
    return {row["schedule_id"]: Schedule(**row) for row in rows}


async def save_schedules(connection: Connection, facts: Iterable[ScheduleChanged]) -> None:
    """Take over what is newer than what is there. No schedule stands twice."""
    rows = (
        (
            fact.schedule_id, fact.workspace_id, fact.rev, b"" if fact.deleted else fact.prompt.encode(), fact.paused,
            fact.deleted,
        )
        for fact in facts
    )  # fmt: skip
    await connection.execute(SQL["save_schedules"], *columns(rows))


async def find_ticks(connection: Connection, schedules: Iterable[tuple[str, UUID]]) -> list[Tick]:
    """All that waits and runs of these (workspace, schedule), in the order of their ids."""
    wanted = [(name, caller_of(schedule_id)[1]) for name, schedule_id in schedules]
    rows = await connection.fetch(SQL["find_ticks"], *columns(wanted)) if wanted else []
    return sorted((_tick(row) for row in rows), key=lambda tick: tick.queue_id)


def _tick(row: asyncpg.Record) -> Tick:
    return Tick(
        queue_id=row["queue_id"],
        workspace_id=row["workspace_id"],
        schedule_id=row["schedule_id"],
        fire_at=row["fire_at"],
        last_fire_at=row["last_fire_at"],
        first_missed_at=row["first_missed_at"],
        merged_count=row["merged_count"],
        rev=row["rev_needed"],
        waits=row["waits"],
        coalesces=row["coalesces"],
        context_id=row["context_id"],
        ceiling_s=row["ceiling_s"],
    )


async def insert_ticks(
    connection: Connection, ticks: Iterable[tuple[Tick, Priority, Place]], workspaces: Mapping[str, Workspace]
) -> None:
    """Let ticks wait; none of their ids is known."""
    rows = [
        (
            tick.queue_id, tick.workspace_id, *caller_of(tick.schedule_id),
            hashlib.sha256(tick.queue_id.bytes).digest(), PRIORITIES[priority], *place,
            workspaces[tick.workspace_id].give_up_after_s, tick.schedule_id, tick.fire_at, tick.last_fire_at,
            tick.first_missed_at, tick.merged_count, tick.rev, tick.coalesces, tick.context_id, tick.ceiling_s,
        )
        for tick, priority, place in ticks
    ]  # fmt: skip
    if rows:
        await connection.execute(SQL["insert_ticks"], *columns(rows))


async def merge_ticks(connection: Connection, ticks: Iterable[Tick], workspaces: Mapping[str, Workspace]) -> None:
    """Write what these, which wait, stand for now."""
    rows = [
        (
            tick.queue_id, tick.last_fire_at, tick.first_missed_at, tick.merged_count, tick.rev, tick.context_id,
            tick.ceiling_s, workspaces[tick.workspace_id].give_up_after_s,
        )
        for tick in ticks
    ]  # fmt: skip
    if rows:
        await connection.execute(SQL["merge_ticks"], *columns(rows))


async def release_ticks(connection: Connection, queue_ids: Sequence[UUID]) -> None:
    """Let those be claimed whose prompts have come."""
    if queue_ids:
        await connection.execute(SQL["release_ticks"], queue_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a schedule says now, and for which tick."""

    tick: Tick
    rev: int
    text: str


async def read_prompts(connection: Connection, queue_ids: Sequence[UUID]) -> dict[UUID, Prompt]:
    """The newest prompt for each of these ticks, which were claimed."""
    rows = await connection.fetch(SQL["read_prompts"], queue_ids)
    return {row["queue_id"]: Prompt(_tick(row), row["prompt_rev"], row["prompt"].decode()) for row in rows}


async def save_bodies(connection: Connection, bodies: Mapping[UUID, bytes]) -> None:
    await connection.execute(SQL["save_bodies"], list(bodies), list(bodies.values()))
