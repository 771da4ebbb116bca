"""The rule of a schedule, remembered: to read an expression costs more than to ask it."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from services.scheduler.cron import Rule, rule
from services.scheduler.decide import Schedule

_REMEMBERED = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rule_of(schedule: Schedule) -> Rule:
    """Raises CronError: the rule is not one, or its zone is gone."""
    anchor_at = schedule.anchor_at if schedule.every_s is not None else None
    return _rule(schedule.cron, schedule.every_s, schedule.at, schedule.timezone, anchor_at)


@lru_cache(_REMEMBERED)
def _rule(
    cron: str | None, every_s: int | None, at: datetime | None, timezone: str, anchor_at: datetime | None
) -> Rule:
    # Only intervals count from somewhere; without it, all schedules with one expression share what was read.
    anchor = anchor_at or _EPOCH
    return rule(created_at=anchor, cron=cron, every_s=every_s, at=at, timezone=timezone)
