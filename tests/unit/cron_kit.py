"""What cron is held against: expressions that are made from sets instead of parsed, and a walk from minute to minute.

`debian` is the loop of Debian's cron(8) (cron.c, main), with the zone's offset in the place of the machine's clock. It
knows of no stretches, no search and no cache, and shares no line with the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import NamedTuple
from zoneinfo import ZoneInfo

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
LAST = "L"

# Gaps and overlaps of one hour, half of one and two, at midnight, on a Friday, by Ramadan, with a negative summer time;
# zones that gave up their summer time, and zones that have none.
ZONES = (
    *("Europe/Berlin", "Europe/London", "Europe/Dublin", "Europe/Lisbon", "Europe/Athens", "Europe/Chisinau"),
    *("America/New_York", "America/Los_Angeles", "America/St_Johns", "America/Halifax", "America/Mexico_City"),
    *("America/Havana", "America/Santiago", "America/Asuncion", "America/Nuuk", "America/Scoresbysund"),
    *("America/Miquelon", "Africa/Cairo", "Africa/Casablanca", "Africa/El_Aaiun", "Antarctica/Troll"),
    *("Asia/Almaty", "Asia/Beirut", "Asia/Gaza", "Asia/Jerusalem", "Asia/Kathmandu", "Atlantic/Azores"),
    *("Australia/Adelaide", "Australia/Lord_Howe", "Australia/Sydney", "Pacific/Auckland", "Pacific/Chatham"),
    *("Pacific/Easter", "UTC"),
)


@dataclass(frozen=True)
class Expression:
    """An expression and, beside its text, what it means."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    dates: frozenset[int | str]
    months: frozenset[int]
    weekdays: frozenset[int | tuple[int, int | str]]

    @property
    def wildcard(self) -> bool:
        minute, hour, *_ = self.text.split()
        return minute[0] == "*" or hour[0] == "*"

    def on(self, day: date) -> bool:
        _, _, date_text, _, weekday_text = self.text.split()
        weekday = day.isoweekday() % 7
        by_date = day.day in self.dates or (LAST in self.dates and (day + DAY).day == 1)
        by_weekday = (
            bool({weekday, weekday or 7} & self.weekdays)
            or (weekday, 1 + (day.day - 1) // 7) in self.weekdays
            or ((weekday, LAST) in self.weekdays and (day + 7 * DAY).month != day.month)
        )
        if date_text[0] == "*" or weekday_text[0] == "*":
            return day.month in self.months and by_date and by_weekday
        return day.month in self.months and (by_date or by_weekday)

    def at(self, wall: datetime) -> bool:
        return wall.minute in self.minutes and wall.hour in self.hours and self.on(wall.date())


class Look(NamedTuple):
    """Debian's cron looks for jobs: at the minute `at`, as if the clock showed `wall`."""

    at: datetime
    wall: datetime
    wild: bool
    fixed: bool


def debian(zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[Look]:
    """Every look in (begin, end), for a cron that runs since `begin`, where no clock change is near."""
    virtual = begin.astimezone(zone).replace(tzinfo=None)
    at = begin + MINUTE
    while at < end:
        clock = at.astimezone(zone).replace(tzinfo=None)
        ahead = (clock - virtual) // MINUTE
        if 0 < ahead <= 5:
            while virtual < clock:
                virtual += MINUTE
                yield Look(at, virtual, wild=True, fixed=True)
        elif 5 < ahead <= 180:
            yield Look(at, clock, wild=True, fixed=False)
            while virtual < clock:
                virtual += MINUTE
                yield Look(at, virtual, wild=False, fixed=True)
        elif -180 < ahead <= 0:
            yield Look(at, clock, wild=True, fixed=False)
        else:
            virtual = clock
            yield Look(at, clock, wild=True, fixed=True)
        at += MINUTE


def fires(expression: Expression, looks: list[Look]) -> list[datetime]:
    """The moments at which Debian's cron starts this job, each once."""
    wild = expression.wildcard
    return sorted({look.at for look in looks if (look.wild if wild else look.fixed) and expression.at(look.wall)})


def changes(zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[datetime]:
    """The moments at which the zone's clocks change: looked for four times a day, then minute by minute."""
    at = begin
    while at < end:
        step = 6 * 60 * MINUTE
        if at.astimezone(zone).utcoffset() != (at + step).astimezone(zone).utcoffset():
            yield next(
                minute
                for minute in (at + k * MINUTE for k in range(1, 361))
                if minute.astimezone(zone).utcoffset() != at.astimezone(zone).utcoffset()
            )
        at += step


def a_field(random: Random, low: int, high: int, *, dense: bool) -> tuple[str, frozenset[int]]:
    """One field in one of its forms, and what it stands for."""
    kind = random.choice(
        ("star", "step", "list", "range", "range") if dense else ("star", "step", "one", "list", "range")
    )
    start, end = sorted((random.randint(low, high), random.randint(low, high)))
    step = random.randint(1, 7)
    match kind:
        case "star":
            return "*", frozenset(range(low, high + 1))
        case "step":
            return f"*/{step}", frozenset(range(low, high + 1)[::step])
        case "one":
            return str(start), frozenset({start})
        case "range":
            text, values = random.choice(((f"{start}-{end}", 1), (f"{start}-{end}/{step}", step)))
            return text, frozenset(range(start, end + 1)[::values])
        case _:
            parts = [a_field(random, low, high, dense=False) for _ in range(random.randint(2, 3))]
            return ",".join(text for text, _ in parts), frozenset[int]().union(*(values for _, values in parts))


def an_expression(random: Random, *, hours: tuple[int, int] = (0, 23), dense: bool = False) -> Expression:
    """`dense`: it fires on most days, and often between the `hours`, so that a window of a day shows something."""
    minute, minutes = a_field(random, 0, 59, dense=False)
    hour, in_hours = a_field(random, *hours, dense=dense)
    if "*" in hour:
        in_hours = frozenset(value for part in hour.split(",") for value in _hours(part))
    date_text, dates = ("*", frozenset(range(1, 32))) if dense and random.random() < 0.7 else _dates(random)
    month, months = ("*", frozenset(range(1, 13))) if random.random() < 0.8 else a_field(random, 1, 12, dense=True)
    weekday, weekdays = ("*", frozenset(range(8))) if random.random() < 0.6 else _weekdays(random)
    return Expression(f"{minute} {hour} {date_text} {month} {weekday}", minutes, in_hours, dates, months, weekdays)


def _hours(part: str) -> range:
    """A star means all hours, also when the numbers are drawn from a few."""
    span, _, step = part.partition("/")
    if span == "*":
        return range(0, 24, int(step or 1))
    start, _, end = span.partition("-")
    return range(int(start), int(end or start) + 1, int(step or 1))


def _dates(random: Random) -> tuple[str, frozenset[int | str]]:
    text, values = a_field(random, 1, 31, dense=False)
    match random.randrange(4):
        case 0:
            return LAST, frozenset({LAST})
        case 1:
            return f"{text},{LAST}", frozenset({*values, LAST})
        case _:
            return text, frozenset(values)


def _weekdays(random: Random) -> tuple[str, frozenset[int | tuple[int, int | str]]]:
    day, nth = random.randint(0, 6), random.randint(1, 5)
    text, values = a_field(random, 0, 7, dense=False)
    match random.randrange(4):
        case 0:
            return f"{day}#{nth}", frozenset({(day, nth)})
        case 1:
            return f"{day}{LAST}", frozenset({(day, LAST)})
        case 2:
            return f"{text},{day}#{nth},{day}{LAST}", frozenset({*values, (day, nth), (day, LAST)})
        case _:
            return text, frozenset(values)


def a_taken_expression(random: Random, *, hours: tuple[int, int] = (0, 23), dense: bool = False) -> Expression:
    """One that has a date."""
    while True:
        expression = an_expression(random, hours=hours, dense=dense)
        if any(expression.on(date(2000, 1, 1) + k * DAY) for k in range(28 * 366)):
            return expression
