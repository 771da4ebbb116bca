"""Schedules as values, for tests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from services.scheduler.decide import Schedule, offset
from shared.facts import Priority

T0 = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)


def schedule(**changes: Any) -> Schedule:
    """Every half hour since T0, due at T0, with changes."""
    plain = Schedule(
        schedule_id=UUID(int=7), workspace_id="w", name="n", cron="*/30 * * * *", every_s=None, at=None, timezone="UTC",
        anchor_at=T0, prompt="p", context="fresh", overlap="queue_one", priority=Priority.TASK, catchup_window_s=None,
        jitter_s=0.0, ceiling_s=None, ends_at=None, remaining_runs=None, paused=False, pause_note=None,
        paused_by_error=None, next_fire_at=T0, rev=1,
    )  # fmt: skip
    return replace(plain, **changes)


class Steps:
    """A rule for tests: `period` after `period`, from T0, `count` times; it counts how often it is asked."""

    def __init__(self, period: timedelta, count: int | None = None) -> None:
        self.period = period
        self.last = None if count is None else T0 + (count - 1) * period
        self.asked = 0

    def next(self, after: datetime) -> datetime | None:
        self.asked += 1
        moment = T0 + max((after - T0) // self.period + 1, 0) * self.period
        return moment if self.last is None or moment <= self.last else None


def jitter_of(plan: Schedule) -> timedelta:
    return offset(plan.schedule_id, plan.jitter_s)
