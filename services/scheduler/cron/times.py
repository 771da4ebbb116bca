"""An expression's moments: which days and minutes a wall clock shows, and which instants those are in a zone.

The rules are those of Debian's cron. If its minute or hour begins with `*`, an expression is a wildcard and follows the
wall clock: what a gap leaves out is left out, what an overlap repeats is repeated. Any other is for fixed times: those
in a gap of less than three hours are one fire at its end, and an overlap of up to three hours repeats none of them.
Day of month and day of week must both agree if one begins with `*` (also `*/2`), otherwise either is enough.
"""

from __future__ import annotations

from bisect import bisect_left
from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from services.scheduler.cron.zones import stretch_at

LAST = -1
"""The n of the last weekday of a month."""

SEARCH_YEARS = 50
"""The rarest dates there are, 29 February on a given weekday around 2100, come again after 40."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_ORDINAL = _EPOCH.toordinal()
_SECOND = timedelta(seconds=1)
_DAY_MIN = 24 * 60
_DECEMBER = 12
_CALENDAR_END = (datetime(9999, 1, 1, tzinfo=UTC) - _EPOCH) // _SECOND  # a year before that of datetime, for the zones


@dataclass(frozen=True, slots=True)
class Days:
    """The days of an expression, whatever the month. Weekdays: 0 is Sunday."""

    dates: frozenset[int]
    last_date: bool
    weekdays: frozenset[int]
    nth_weekdays: frozenset[tuple[int, int]]
    """(weekday, n-th or LAST)"""
    both: bool
    """Dates and weekdays must agree."""


@lru_cache(maxsize=16_384)
def _matching(days: Days, weekday_first: int, length: int) -> tuple[int, ...]:
    """The days of a month that is `length` long and begins on `weekday_first`; there are 28 such months."""
    return tuple(day for day in range(1, length + 1) if _matches(days, day, (weekday_first + day - 1) % 7, length))


def _matches(days: Days, day: int, weekday: int, length: int) -> bool:
    by_date = day in days.dates or (days.last_date and day == length)
    by_weekday = weekday in days.weekdays or (
        bool(days.nth_weekdays)
        and (
            (weekday, (day + 6) // 7) in days.nth_weekdays
            or (day + 7 > length and (weekday, LAST) in days.nth_weekdays)
        )
    )
    return (by_date and by_weekday) if days.both else (by_date or by_weekday)


@dataclass(frozen=True, slots=True)
class Cron:
    text: str
    """The five fields, in lower case."""
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    months: frozenset[int]
    days: Days
    wildcard: bool

    def next(self, after: datetime, zone: ZoneInfo) -> datetime | None:
        """The first moment later than `after`, in UTC; None: there is none in 50 years.

        A zone's time is a row of stretches with one offset each, in which the wall clock just runs. Per stretch: the
        first minute that matches, if it lies in it (1); else what the gap behind it leaves out (2); else the next one.
        """
        at = (after - _EPOCH) // _SECOND + 1
        search_end = min(at + SEARCH_YEARS * 366 * 86_400, _CALENDAR_END)
        while at < search_end:
            stretch = stretch_at(zone, at)
            wall = at + stretch.offset
            if not self.wildcard:
                wall = max(wall, stretch.already_shown)
            found = self._first(-(-wall // 60), until=-(-stretch.wall_gap_end // 60))
            if found * 60 < stretch.wall_end:
                return _EPOCH + timedelta(seconds=found * 60 - stretch.offset)  # (1)
            if not self.wildcard and found * 60 < stretch.wall_gap_end:
                return _EPOCH + timedelta(seconds=stretch.end)  # (2)
            at = stretch.end
        return None

    def has_a_date(self) -> bool:
        """Whether any year has such a day: 28 years hold every kind of month."""
        return any(self._days(year, month) for year in range(2000, 2028) for month in self.months)

    def _first(self, minute: int, *, until: int) -> int:
        """The first minute from `minute` on that matches, counted on a wall clock from 1970.

        The search ends with the month of `until`; a minute at or beyond `until` says that there is none before.
        """
        number, rest = divmod(minute, _DAY_MIN)
        today = date.fromordinal(_EPOCH_ORDINAL + number)
        year, month, day = today.year, today.month, today.day
        days = self._days(year, month)
        place = bisect_left(days, day)
        if place < len(days) and days[place] == day:
            if (later := self._time(rest)) is not None:
                return number * _DAY_MIN + later
            place += 1
        begin = number - day  # the day before the month's first
        while place == len(days):
            begin += monthrange(year, month)[1]
            if (begin + 1) * _DAY_MIN >= until:
                return max(until, minute)
            year, month = (year, month + 1) if month < _DECEMBER else (year + 1, 1)
            days, place = self._days(year, month), 0
        return (begin + days[place]) * _DAY_MIN + self.hours[0] * 60 + self.minutes[0]

    def _days(self, year: int, month: int) -> tuple[int, ...]:
        if month not in self.months:
            return ()
        weekday, length = monthrange(year, month)
        return _matching(self.days, (weekday + 1) % 7, length)

    def _time(self, minute: int) -> int | None:
        """The first time of day from `minute` on; None: this day has no more."""
        hour, rest = divmod(minute, 60)
        place = bisect_left(self.hours, hour)
        if place < len(self.hours) and self.hours[place] == hour:
            later = bisect_left(self.minutes, rest)
            if later < len(self.minutes):
                return hour * 60 + self.minutes[later]
            place += 1
        return self.hours[place] * 60 + self.minutes[0] if place < len(self.hours) else None
