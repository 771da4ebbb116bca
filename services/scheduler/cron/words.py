"""An expression in words for people, by cron-descriptor; the only part of cron that needs a package.

It is asked field by field and only for what it words well: asked for all at once it says "or" where `*/2` and a day of
week must both agree, loses the ordinals in a list of `#`, and fails on a list that holds `*`.
"""

from __future__ import annotations

from collections.abc import Collection

from cron_descriptor import DescriptionTypeEnum as Part
from cron_descriptor import ExpressionDescriptor, Options

from services.scheduler.cron.parse import parse


def describe(text: str) -> str:
    """`30 4 1,15 * 5` is "At 04:30, on day 1 and 15 of the month, or on Friday". Raises CronError."""
    cron = parse(text)
    minute, hour, date, month, weekday = cron.text.upper().split()
    time = f"{_plain(minute, cron.minutes, 60)} {_plain(hour, cron.hours, 24)} * * *"
    dates = [_plain(date, cron.days.dates, 31), *_specials(date)]
    weekdays = [_plain(weekday, cron.days.weekdays, 7), *_specials(weekday)]
    days = [
        " and ".join(filter(None, (_words(f"0 0 {part} * *", Part.DAYOFMONTH) for part in dates))),
        " and ".join(filter(None, (_words(f"0 0 * * {part}", Part.DAYOFWEEK) for part in weekdays))),
    ]
    months = _words(f"0 0 * {_plain(month, cron.months, 12)} *", Part.MONTH)
    both = ", but only " if cron.days.both else ", or "
    return ", ".join(filter(None, (_words(time, Part.FULL), both.join(filter(None, days)), months)))


def _plain(field: str, values: Collection[int], of: int) -> str:
    """What a field holds beside `L` and `#`, in a form that is worded well; empty: nothing."""
    if len(values) == of:
        return "*"
    if _specials(field) or ("," in field and ("/" in field or "*" in field)) or (of == 7 and "/" in field):  # noqa: PLR2004 - the days of a week
        return ",".join(map(str, sorted(values)))
    return field


def _specials(field: str) -> list[str]:
    return [item for item in field.split(",") if "#" in item or (item.endswith("L") and item != "JUL")]


def _words(expression: str, part: Part) -> str:
    fields = expression.split()
    if len(fields) < 5 or (part is not Part.FULL and fields == ["0", "0", "*", "*", "*"]):  # noqa: PLR2004 - nothing to say
        return ""
    options = Options(locale_code="en_US", use_24hour_time_format=True)
    words: str = ExpressionDescriptor(expression, options).get_description(part)
    return words.removeprefix(", ").removeprefix("only ")
