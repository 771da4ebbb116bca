"""The three ways to say when: an expression in a zone, an interval, one moment. All answer `next(after)`, in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from services.scheduler.cron.parse import parse
from services.scheduler.cron.refusals import CronError, Refusal
from services.scheduler.cron.times import SEARCH_YEARS, Cron
from services.scheduler.cron.zones import zone

EVERY_S_MAX = SEARCH_YEARS * 366 * 86_400


@dataclass(frozen=True, slots=True)
class Calendar:
    cron: Cron
    zone: ZoneInfo

    def next(self, after: datetime) -> datetime | None:
        return self.cron.next(after, self.zone)


@dataclass(frozen=True, slots=True)
class Every:
    """Elapsed time, which no clock change stretches: the k-th fire is `anchor` + k * `every_s`, k from 1."""

    every_s: int
    anchor: datetime

    def next(self, after: datetime) -> datetime:
        period = timedelta(seconds=self.every_s)
        return self.anchor + max((after - self.anchor) // period + 1, 1) * period


@dataclass(frozen=True, slots=True)
class At:
    at: datetime

    def next(self, after: datetime) -> datetime | None:
        return self.at if self.at > after else None


Rule = Calendar | Every | At


def rule(
    *,
    created_at: datetime,
    cron: str | None = None,
    every_s: int | None = None,
    at: datetime | None = None,
    timezone: str = "UTC",
) -> Rule:
    """The rule that a schedule's row or a request holds. Raises CronError; whether it ever fires, `first` says."""
    if [cron, every_s, at].count(None) != 2:  # noqa: PLR2004 - two of the three are not given
        raise CronError(Refusal.NOT_ONE_RULE, "A schedule has one of cron, every_s and at.")
    place = zone(timezone)
    if cron is not None:
        return Calendar(parse(cron), place)
    if every_s is not None:
        if not 1 <= every_s <= EVERY_S_MAX:
            raise CronError(
                Refusal.OUT_OF_RANGE, f"every_s is 1 to {EVERY_S_MAX} seconds, which are {SEARCH_YEARS} years."
            )
        return Every(every_s, created_at.astimezone(UTC))
    assert at is not None, "one of the three is given"
    if at.tzinfo is None:
        raise CronError(Refusal.NOT_UNDERSTOOD, "at is a moment with its offset, as in 2027-03-28T09:00:00+02:00.")
    return At(at.astimezone(UTC))


def first(rule: Rule, after: datetime) -> datetime:
    """The first moment of a new or edited rule. Raises CronError if it has none."""
    moment = rule.next(after)
    if moment is None and isinstance(rule, Calendar):
        raise CronError(
            Refusal.NEVER_FIRES, f"The clocks of {rule.zone.key} show no such moment within {SEARCH_YEARS} years."
        )
    if moment is None:
        raise CronError(Refusal.NEVER_FIRES, "That moment is over.")
    return moment


def upcoming(rule: Rule, after: datetime, n: int) -> tuple[datetime, ...]:
    """The next `n` moments, fewer if there are no more."""
    found: list[datetime] = []
    while len(found) < n and (moment := rule.next(found[-1] if found else after)):
        found.append(moment)
    return tuple(found)
