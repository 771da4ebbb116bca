"""A zone's time as stretches with one offset each, cut where its clocks change. Offsets and times are in seconds.

zoneinfo answers what the offset is at a moment and not when it changes; so a year is asked day by day, once, and kept.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from services.scheduler.cron.refusals import CronError, Refusal

_DAY_S = 86_400
_THREE_HOURS_S = 3 * 3600
"""Debian's cron takes a clock that goes further for one that was set, and follows it."""

_LONG_AGO = -(10**12)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_ZONES = frozenset(
    {"localtime", "Factory"}
)  # what the machine is set to, and what it is called when it is set to nothing


class Stretch(NamedTuple):
    end: int
    """The moment at which the clocks change, or the year's end."""
    offset: int
    wall_end: int
    """What the clock would show at the end."""
    wall_gap_end: int
    """What it shows at the end after a gap that counts; without one, `wall_end`."""
    already_shown: int
    """Up to here the clock had come before the overlap with which the stretch began."""


class _Change(NamedTuple):
    at: int
    before: int
    after: int


def zone(name: str) -> ZoneInfo:
    """The IANA zone of this name. Raises CronError."""
    # Asking for the name in the list, and not for its file: there are files that are no zones, or zones of another kind
    # (right/… counts leap seconds).
    if name not in _zone_names():
        raise CronError(
            Refusal.UNKNOWN_ZONE, f"There is no time zone {name[:64]!r}; IANA's are written like Europe/Berlin."
        )
    return ZoneInfo(name)


@cache
def _zone_names() -> frozenset[str]:
    return frozenset(available_timezones()) - _NO_ZONES


def stretch_at(zone: ZoneInfo, at: int) -> Stretch:
    """The stretch in which the moment `at` lies (Unix time)."""
    ends, stretches = _stretches(zone, (_EPOCH + timedelta(seconds=at)).year)
    return stretches[bisect_right(ends, at)]


@lru_cache(maxsize=8192)  # one year of one zone is 0.5 KB and costs 0.4 ms, once
def _stretches(zone: ZoneInfo, year: int) -> tuple[tuple[int, ...], tuple[Stretch, ...]]:
    """The stretches that lie in a year, the first from where it began in the year before."""
    earlier, changes = _changes(zone, year - 1), _changes(zone, year)
    last = earlier[-1] if earlier else None
    end = _new_year(year + 1)
    offset = _offset(zone, end - 1)
    found = []
    for change in (*changes, _Change(end, offset, offset)):
        widened = change.after - change.before
        found.append(
            Stretch(
                end=change.at,
                offset=change.before,
                wall_end=change.at + change.before,
                wall_gap_end=change.at + (change.after if 0 < widened < _THREE_HOURS_S else change.before),
                already_shown=last.at + last.before
                if last and 0 < last.before - last.after <= _THREE_HOURS_S
                else _LONG_AGO,
            )
        )
        last = change
    return tuple(stretch.end for stretch in found), tuple(found)


@lru_cache(maxsize=8192)
def _changes(zone: ZoneInfo, year: int) -> tuple[_Change, ...]:
    """The moments at which the offset changes, from after a year's beginning up to its end, which is the next one's.

    Day by day will do: no stretch of any zone since 1971 is shorter than 95 hours.
    """
    found = []
    day, end = _new_year(year), _new_year(year + 1)
    before = _offset(zone, day)
    while day < end:
        after = _offset(zone, day + _DAY_S)
        if after != before:
            found.append(_Change(_change_between(zone, day, day + _DAY_S, before), before, after))
        before, day = after, day + _DAY_S
    return tuple(found)


def _change_between(zone: ZoneInfo, low: int, high: int, before: int) -> int:
    """The first moment in (low, high] at which the offset is another than `before`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _offset(zone, middle) == before else (low, middle)
    return high


def _offset(zone: ZoneInfo, at: int) -> int:
    offset = datetime.fromtimestamp(at, zone).utcoffset()
    assert offset is not None, "a ZoneInfo knows its offset at every moment"
    return int(offset.total_seconds())


def _new_year(year: int) -> int:
    return int((datetime(year, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds())
