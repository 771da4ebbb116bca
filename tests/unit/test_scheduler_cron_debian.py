"""Cron against the loop of Debian's cron, minute for minute, around every clock change of 34 zones."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from io import BytesIO
from random import Random
from zoneinfo import ZoneInfo

import pytest

from services.scheduler.cron import Calendar, parse, zone
from tests.unit.cron_kit import ZONES, a_taken_expression, changes, debian, fires

BEFORE, AFTER = timedelta(hours=4), timedelta(hours=5)
PER_CHANGE = 21


def ours(calendar: Calendar, begin: datetime, end: datetime) -> list[datetime]:
    at, found = begin, []
    while (at := calendar.next(at) or end) < end:
        found.append(at)
    return found


def windows(name: str) -> list[datetime]:
    """Each change of 2024 to 2027; for a zone without, a few nights."""
    found = list(changes(zone(name), datetime(2024, 1, 1, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)))
    return found or [datetime(year, 2, 28, 23, tzinfo=UTC) for year in range(2024, 2028)]


def test_the_zones_change_their_clocks_in_every_way_that_there_is() -> None:
    widths = set()
    for name in ZONES:
        for at in changes(zone(name), datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)):
            before, after = (
                (at - step).astimezone(zone(name)).utcoffset() for step in (timedelta(seconds=1), timedelta(0))
            )
            assert before is not None
            assert after is not None
            widths.add((after - before) // timedelta(minutes=1))
    assert widths == {-120, -60, -30, 30, 60, 120}
    assert len(ZONES) == 34


@pytest.mark.parametrize("name", ZONES)
def test_around_a_clock_change_it_fires_as_debian_does(name: str) -> None:
    """C-C3: 5,166 random expressions in all."""
    place, random = zone(name), Random(name)
    for change in windows(name):
        begin, end = change - BEFORE, change + AFTER
        looks = list(debian(place, begin, end))
        around = {look.wall.hour for look in looks}
        hours = (min(around), max(around)) if max(around) - min(around) < 14 else (0, 3)
        for _ in range(PER_CHANGE):
            expression = a_taken_expression(random, hours=hours, dense=True)
            found = ours(Calendar(parse(expression.text), place), begin, end)
            assert found == fires(expression, looks), f"{expression.text} in {name} around {change}"


def an_invented_zone(*, at: datetime, before_s: int, after_s: int) -> ZoneInfo:
    """A zone file (RFC 9636, version 2) with one change of the clocks."""
    first = b"TZif2" + bytes(15) + struct.pack(">6L", 0, 0, 0, 0, 1, 4) + struct.pack(">lBB", 0, 0, 0) + b"AAA\0"
    second = b"TZif2" + bytes(15) + struct.pack(">6L", 0, 0, 0, 1, 2, 4) + struct.pack(">qB", int(at.timestamp()), 1)
    second += struct.pack(">lBBlBB", before_s, 0, 0, after_s, 0, 0) + b"AAA\0"
    return ZoneInfo.from_file(BytesIO(first + second + b"\n\n"), key="Invented/Zone")


@pytest.mark.parametrize(
    ("at", "before_s", "after_s"),
    [
        pytest.param(datetime(2027, 12, 31, 23, 30, tzinfo=UTC), 3600, 0, id="an overlap over the end of the year"),
        pytest.param(datetime(2027, 12, 31, 23, 30, tzinfo=UTC), 0, 3600, id="a gap over the end of the year"),
        pytest.param(datetime(2028, 1, 1, tzinfo=UTC), 3600, 0, id="an overlap that begins with the year"),
        pytest.param(datetime(2028, 1, 1, tzinfo=UTC), 0, 3600, id="a gap that ends with the year"),
        pytest.param(datetime(2027, 12, 31, 23, 59, 59, tzinfo=UTC), 3600, 0, id="a change in the year's last second"),
    ],
)
def test_a_change_at_the_end_of_a_year_is_one_like_any_other(at: datetime, before_s: int, after_s: int) -> None:
    """C-C3: what is kept of a zone is kept by the year."""
    place, random = an_invented_zone(at=at, before_s=before_s, after_s=after_s), Random(before_s)
    begin = datetime(2027, 12, 31, 20, tzinfo=UTC)
    end = begin + AFTER + AFTER
    assert list(changes(place, begin, end)), "the clocks change there"
    looks = list(debian(place, begin, end))
    for _ in range(60):
        expression = a_taken_expression(random, hours=(0, 2), dense=True)
        assert ours(Calendar(parse(expression.text), place), begin, end) == fires(expression, looks), expression.text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("Antarctica/Casey", datetime(2023, 3, 8, 16, tzinfo=UTC), id="three hours back are an overlap"),
        pytest.param(
            "Antarctica/Casey", datetime(2020, 10, 3, 16, 1, tzinfo=UTC), id="three hours on are a clock set anew"
        ),
        pytest.param("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC), id="a day left out at the date line"),
        pytest.param("Pacific/Kwajalein", datetime(1969, 9, 30, 13, tzinfo=UTC), id="a day lived twice before 1970"),
    ],
)
def test_what_is_no_summer_time_is_followed_as_debian_does(name: str, change: datetime) -> None:
    place, random = zone(name), Random(name)
    assert list(changes(place, change - BEFORE, change + BEFORE)), "the clocks change there"
    begin, end = change - BEFORE, change + timedelta(hours=30)
    looks = list(debian(place, begin, end))
    for _ in range(60):
        expression = a_taken_expression(random, hours=(0, 5), dense=True)
        assert ours(Calendar(parse(expression.text), place), begin, end) == fires(expression, looks), expression.text
