"""The text of an expression: what is understood, and a sentence for each thing that is not.

`*`, lists, ranges, steps (`*/15`, `8-18/2`) and names as in Debian's cron; Sunday is 0 and 7. Beyond it: `L` as the
last day of the month, `5L` as the last Friday, `mon#2` as the second Monday. Not taken: what other dialects read in
other ways (`?`, `W`, `5/15`, `L-3`, a sixth field), ranges that run backwards, and steps wider than their field: `*/90`
in the minute would be every hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from services.scheduler.cron.refusals import CronError, Refusal
from services.scheduler.cron.times import LAST, Cron, Days

LENGTH_MAX = 256

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()
    """The first stands for `low`."""


_MINUTE = _Field("minute", 0, 59)
_HOUR = _Field("hour", 0, 23)
_DAY = _Field("day of month", 1, 31)
_MONTH = _Field("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"))
_WEEKDAY = _Field("day of week", 0, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat"))
FIELDS = (_MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY)


class _Set(NamedTuple):
    """What one field holds."""

    values: frozenset[int]
    special: frozenset[tuple[int, int]] = frozenset()
    """(weekday, its n-th or LAST of the month); (0, LAST) in the day of month is its last day."""


@lru_cache(maxsize=16_384)  # a parse costs some 30 moments; at 1 KB each, what a service holds at most is 16 MB
def parse(text: str) -> Cron:
    """The expression as what can be asked for moments. Raises CronError."""
    minute, hour, day, month, weekday = fields = split(text)
    sets = [_field(field, part) for field, part in zip(FIELDS, fields, strict=True)]
    starred = day.startswith("*") or weekday.startswith("*")
    days = Days(
        dates=sets[2].values,
        last_date=bool(sets[2].special),
        weekdays=frozenset(value % 7 for value in sets[4].values),
        nth_weekdays=sets[4].special,
        both=starred,
    )
    cron = Cron(
        text=" ".join(fields),
        minutes=tuple(sorted(sets[0].values)),
        hours=tuple(sorted(sets[1].values)),
        months=sets[3].values,
        days=days,
        wildcard=minute.startswith("*") or hour.startswith("*"),
    )
    if not cron.has_a_date():
        raise CronError(
            Refusal.NEVER_FIRES, f"No year has a day of month {day} in month {month}, day of week {weekday}."
        )
    return cron


def split(text: str) -> tuple[str, ...]:
    """The five fields in lower case, with an alias written out. Raises CronError."""
    if len(text) > LENGTH_MAX:
        raise CronError(
            Refusal.TOO_LONG, f"An expression has at most {LENGTH_MAX} characters; this one has {len(text)}."
        )
    # Beyond ASCII, too: int() reads the digits of every script, and nobody else does.
    if not (text.isascii() and text.isprintable()):
        raise CronError(
            Refusal.CONTROL_CHARACTERS, "An expression is printable ASCII: no tab, no line break, no control character."
        )
    text = text.strip().lower()
    if text == "@reboot":
        raise CronError(Refusal.REBOOT, "@reboot is no moment of the calendar; give a time or an interval.")
    if text.startswith("@") and text not in ALIASES:
        raise CronError(Refusal.UNKNOWN_NAME, f"{text!r} is none of {', '.join(ALIASES)}.")
    fields = tuple(ALIASES.get(text, text).split())
    if len(fields) != len(FIELDS):
        raise CronError(
            Refusal.WRONG_FIELD_COUNT,
            f"An expression has five fields (minute, hour, day of month, month, day of week); this has {len(fields)}.",
        )
    return fields


def _field(field: _Field, text: str) -> _Set:
    values: set[int] = set()
    special: set[tuple[int, int]] = set()
    for item in text.split(","):
        if field is _DAY and item == "l":
            special.add((0, LAST))
        elif field is _WEEKDAY and (item.endswith("l") or "#" in item):
            special.add(_nth_weekday(item))
        else:
            values.update(_range(field, item))
    return _Set(frozenset(values), frozenset(special))


def _nth_weekday(item: str) -> tuple[int, int]:
    """`5l`, `fril`, `mon#2`."""
    if "#" not in item:
        if item == "l":
            raise CronError(Refusal.NOT_UNDERSTOOD, "L alone is no day of week; 5L is the last Friday, 6 is Saturday.")
        return _value(_WEEKDAY, item[:-1]) % 7, LAST
    day, _, nth = item.partition("#")
    if nth not in {"1", "2", "3", "4", "5"}:
        raise CronError(Refusal.OUT_OF_RANGE, f"{item!r}: a month has a first to a fifth of a weekday, #1 to #5.")
    return _value(_WEEKDAY, day) % 7, int(nth)


def _range(field: _Field, item: str) -> range:
    """`*`, `a`, `a-b`, and the first and last of them with a step."""
    span, slash, step_text = item.partition("/")
    start, dash, end = span.partition("-")
    step = _step(field, item, step_text) if slash else 1
    if span == "*":
        return range(field.low, field.high + 1, step)
    low = high = _value(field, start)
    if slash and not dash:
        raise CronError(
            Refusal.NOT_UNDERSTOOD, f"{item!r}: a step follows * or a range; write {low}-{field.high}/{step}."
        )
    if dash:
        # A week may end on Sunday by its name: fri-sun is 5-7.
        high = 7 if field is _WEEKDAY and end == "sun" and low else _value(field, end)
    if low > high:
        raise CronError(Refusal.BACKWARD_RANGE, f"{item!r} runs backwards; write the two parts of it as a list.")
    return range(low, high + 1, step)


def _step(field: _Field, item: str, text: str) -> int:
    step = _number(field, item, text)
    if step == 0:
        raise CronError(Refusal.ZERO_STEP, f"{item!r}: a step of 0 leads nowhere.")
    width = 7 if field is _WEEKDAY else field.high - field.low + 1
    if step > width:
        raise CronError(
            Refusal.OUT_OF_RANGE,
            f"{item!r}: a step in the {field.name} is 1 to {width}, for it begins anew with each round of the field.",
        )
    return step


def _value(field: _Field, text: str) -> int:
    if text in field.names:
        return field.low + field.names.index(text)
    value = _number(field, text, text)
    if not field.low <= value <= field.high:
        raise CronError(Refusal.OUT_OF_RANGE, f"{text!r}: the {field.name} is {field.low} to {field.high}.")
    return value


def _number(field: _Field, item: str, text: str) -> int:
    if text.isdecimal():
        return int(text)
    if text.isalpha():
        known = f"known are {' '.join(field.names)}" if field.names else "it has no names"
        raise CronError(Refusal.UNKNOWN_NAME, f"{text!r} is no {field.name}; {known}.")
    raise CronError(Refusal.NOT_UNDERSTOOD, f"{item!r} is no {field.name}: take *, 5, 1-5, 1,3,5, */5 or 1-9/2.")
