"""The loop that fires: claims what is due, and in the same transaction writes the fire, its tick and the next moment.

Every replica turns it; SKIP LOCKED shares the work, and no one leads. It never waits for an agent or for the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.scheduler import decide, store, turns
from services.scheduler.decide import CATCH_UP, Due, Schedule, Several
from services.scheduler.metrics import DUE, FAILED, FIRES, LATE, PAUSED_BY_ERROR, TICKS
from services.scheduler.rules import rule_to_fire
from services.scheduler.settings import Settings
from services.scheduler.store import SQL, Advance, Fire
from shared import outbox
from shared.database import Connection, Pool, in_words
from shared.facts import ScheduleTick
from shared.loops import Loop
from shared.telemetry import log

_MOMENTS_TURN = 40_000
"""Moments that one turn goes through, 0.2 s of CPU: its locks are not held for longer."""
_MEASURE_S = 5.0
_MEASURED_MAX = 10_001
_FORGET_ROWS = 2000


@dataclass(slots=True)
class _Fired:
    """What a turn did; counted once it has committed."""

    claimed: int = 0
    late_s: list[float] = field(default_factory=list)
    merged: int = 0
    missed: int = 0
    failed: list[tuple[UUID, str]] = field(default_factory=list)


class Ticking:
    """`loop` fires; wake it when a schedule has got an earlier moment. `told` is called after a commit with facts."""

    def __init__(self, settings: Settings, pool: Pool, *, told: Callable[[], None]) -> None:
        self._settings = settings
        self._pool = pool
        self._told = told
        self.loop = Loop("ticking", self.run_once)

    async def run_once(self, now: datetime | None = None) -> float:
        """Fire one batch of what is due; return the seconds until the next moment, 0 while there may be more."""
        fired = await turns.take(self._pool, partial(self._fire, now=now), partial(self._fire_singly, now=now))
        self._tell(fired)
        if fired.claimed:
            return 0.0
        return turns.sleep_s(await self._pool.fetchval(SQL["next_due_in"], now), self._settings.look_s)

    async def probe(self) -> None:
        """For /readyz."""
        await turns.probe(self.loop, self._settings.look_s)

    async def measure(self) -> float:
        row = await self._pool.fetchrow(SQL["measure"], _MEASURED_MAX)
        assert row is not None, "it selects two counts"
        DUE.set(row["due"])
        FAILED.set(row["failed"])
        return _MEASURE_S

    async def forget(self, now: datetime | None = None) -> float:
        """Delete a batch of what ended, was deleted, or was recorded, long ago."""
        days, audit_days = self._settings.retention_days, self._settings.audit_days
        kept = (
            ("forget_schedules", days),
            ("forget_fires", days),
            ("forget_sessions", days),
            ("forget_audit", audit_days),
        )
        done = {await self._pool.execute(SQL[name], now, each, _FORGET_ROWS) for name, each in kept}
        return 0.0 if f"DELETE {_FORGET_ROWS}" in done else 3600.0

    async def _fire(self, connection: Connection, *, now: datetime | None) -> _Fired:
        rows = await store.claim_due(connection, self._settings.claim_rows, now)
        fired = _Fired(claimed=len(rows))
        await _write(connection, rows, fired)
        return fired

    async def _fire_singly(self, connection: Connection, *, now: datetime | None) -> _Fired:
        """As `_fire`, where some schedule of the batch cannot be written: that one is paused, the others go on."""
        rows = await store.claim_due(connection, self._settings.claim_rows, now)
        fired = _Fired(claimed=len(rows))
        for row in rows:
            alone, failed = _Fired(), _Fired()
            write = partial(_write, connection, [row], alone)
            give_up = partial(_give_up, connection, row["schedule_id"], fired=failed)
            if not await turns.alone(connection, write, give_up):
                alone = failed
            for each in ("late_s", "merged", "missed", "failed"):
                setattr(fired, each, getattr(fired, each) + getattr(alone, each))
        return fired

    def _tell(self, fired: _Fired) -> None:
        TICKS.inc(len(fired.late_s))
        FIRES.labels("coalesced").inc(fired.merged)
        FIRES.labels("missed").inc(fired.missed)
        for late_s in fired.late_s:
            LATE.observe(late_s)
        for schedule_id, reason in fired.failed:
            PAUSED_BY_ERROR.inc()
            log.error("schedule_paused_by_error", schedule_id=str(schedule_id), reason=reason)
        if fired.missed:
            log.warning("fires_missed", fires=fired.missed)
        if fired.claimed:
            log.info(
                "fired", ticks=len(fired.late_s), coalesced=fired.merged, late_s=round(max(fired.late_s, default=0), 3)
            )
            self._told()


async def _write(connection: Connection, rows: Sequence[asyncpg.Record], fired: _Fired) -> None:
    """Decide and write for rows that are locked: a handful of statements, however many they are."""
    verdicts: list[tuple[Schedule, Due]] = []
    looked_at = 0
    for row in rows:
        if looked_at >= _MOMENTS_TURN:
            break  # still due: the next turn's
        try:
            schedule = store.schedule_of(row)
            verdict = decide.due(schedule, rule_to_fire(schedule), row["clock"])
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one schedule is that one's alone
            await _give_up(connection, row["schedule_id"], error, fired=fired)
            continue
        looked_at += verdict.looked_at
        verdicts.append((schedule, verdict))
    if not verdicts:
        return
    fires = [fire for schedule, verdict in verdicts for fire in _fires(schedule, verdict)]
    new = await store.insert_fires(connection, fires)
    written = [fire for fire in fires if (fire.schedule_id, fire.moments.first) in new]
    await store.advance(connection, [_advance(schedule, verdict, new) for schedule, verdict in verdicts])
    schedules = {schedule.schedule_id: (schedule, verdict) for schedule, verdict in verdicts}
    ticks = [_tick(*schedules[fire.schedule_id], fire) for fire in written if fire.queue_id is not None]
    if ticks:
        await outbox.add(connection, ticks)
    clock = rows[0]["clock"]
    for fire in written:
        if fire.queue_id is not None:
            schedule, _ = schedules[fire.schedule_id]
            late = clock - fire.moments.first - decide.offset(schedule.schedule_id, schedule.jitter_s)
            fired.late_s.append(max(late.total_seconds(), 0.0))
        elif fire.outcome == "missed":
            fired.missed += fire.moments.count
        else:
            fired.merged += fire.moments.count


async def _give_up(connection: Connection, schedule_id: UUID, error: Exception, *, fired: _Fired) -> None:
    reason = in_words(error).replace("\x00", "")
    await store.pause_failed(connection, schedule_id, reason)
    fired.failed.append((schedule_id, reason))


def _fires(schedule: Schedule, verdict: Due) -> list[Fire]:
    fires = []
    if verdict.missed is not None:
        fires.append(Fire(schedule.schedule_id, verdict.missed, schedule.rev, "missed", "not_running"))
    if verdict.merged is not None:
        fires.append(
            Fire(schedule.schedule_id, verdict.merged, schedule.rev, "coalesced", CATCH_UP, merged_into=verdict.fire)
        )
    if verdict.fire is not None:
        itself = Several(verdict.fire, verdict.fire, 1)
        fires.append(Fire(schedule.schedule_id, itself, schedule.rev, queue_id=uuid7()))
    return fires


def _advance(schedule: Schedule, verdict: Due, new: set[tuple[UUID, datetime]]) -> Advance:
    def count(several: Several | None) -> int:
        return several.count if several is not None and (schedule.schedule_id, several.first) in new else 0

    merged, missed = count(verdict.merged), count(verdict.missed)
    fired = int((schedule.schedule_id, verdict.fire) in new)
    return Advance(
        schedule,
        verdict.next_fire_at,
        verdict.remaining_runs,
        fires=fired + merged + missed,
        merged=merged,
        missed=missed,
    )


def _tick(schedule: Schedule, verdict: Due, fire: Fire) -> ScheduleTick:
    merged = verdict.merged
    assert fire.queue_id is not None, "only those that run"
    return ScheduleTick(
        fact_id=fire.queue_id,
        workspace_id=schedule.workspace_id,
        rev=schedule.rev,
        schedule_id=schedule.schedule_id,
        fire_at=fire.moments.first,
        queue_id=fire.queue_id,
        merged_count=1 + (merged.count if merged else 0),
        first_missed_at=merged.first if merged else None,
        priority=schedule.priority,
        overlap=schedule.overlap,
        context=schedule.context,
        ceiling_s=schedule.ceiling_s,
    )
