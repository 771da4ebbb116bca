"""The rule of a schedule, remembered: to read an expression costs more than to ask it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from services.scheduler import decide
from services.scheduler.cron import Rule, rule
from services.scheduler.decide import Schedule

_REMEMBERED = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Remembering:
    """A rule that knows its last answer: a fleet with one expression asks for the same moment, one after the other."""

    rule: Rule
    after: datetime | None = None
    following: datetime | None = None

    def next(self, after: datetime) -> datetime | None:
        if after != self.after:
            self.following = self.rule.next(after)
            self.after = after
        return self.following


def rule_of(schedule: Schedule) -> Rule:
    """Raises CronError: the rule is not one, or its zone is gone."""
    return _rule(*_key(schedule))


def rule_to_fire(schedule: Schedule) -> decide.Rule:
    """As `rule_of`, for many schedules one after the other."""
    return _remembering(*_key(schedule))


_Key = tuple[str | None, int | None, datetime | None, str, datetime | None]


def _key(schedule: Schedule) -> _Key:
    anchor_at = schedule.anchor_at if schedule.every_s is not None else None
    return schedule.cron, schedule.every_s, schedule.at, schedule.timezone, anchor_at


@lru_cache(_REMEMBERED)
def _remembering(
    cron: str | None, every_s: int | None, at: datetime | None, timezone: str, anchor_at: datetime | None
) -> _Remembering:
    return _Remembering(_rule(cron, every_s, at, timezone, anchor_at))


@lru_cache(_REMEMBERED)
def _rule(
    cron: str | None, every_s: int | None, at: datetime | None, timezone: str, anchor_at: datetime | None
) -> Rule:
    # Only intervals count from somewhere; without it, all schedules with one expression share what was read.
    anchor = anchor_at or _EPOCH
    return rule(created_at=anchor, cron=cron, every_s=every_s, at=at, timezone=timezone)
