"""What holds for every expression, zone and moment. Walks from minute to minute are cron_kit.py's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cron import Calendar, parse, upcoming, zone
from tests.unit.cron_kit import DAY, MINUTE, ZONES, Expression, a_taken_expression, debian, fires

HOUR = timedelta(hours=1)

randoms = st.randoms(use_true_random=False)
zones = st.sampled_from(ZONES).map(zone)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2060, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the bounds are naive
property_of = settings(max_examples=100, deadline=None, derandomize=True)


def calendar(expression: Expression, place: ZoneInfo) -> Calendar:
    return Calendar(parse(expression.text), place)


@property_of
@given(randoms, zones, moments)
def test_the_next_moment_is_later_and_nothing_lies_between(random: Random, place: ZoneInfo, after: datetime) -> None:
    expression = a_taken_expression(random)
    found = calendar(expression, place).next(after)
    if found is None:
        return  # the zone's clocks never show it
    assert found > after
    assert found.tzinfo is UTC
    between = [after + (found - after) * k / 7 for k in range(1, 7)]
    assert {calendar(expression, place).next(at) for at in between} == {found}
    assert calendar(expression, place).next(found - timedelta(microseconds=1)) == found


@property_of
@given(randoms, zones, moments)
def test_a_day_holds_what_a_walk_from_minute_to_minute_finds(random: Random, place: ZoneInfo, after: datetime) -> None:
    """C-C3."""
    expression = a_taken_expression(random, dense=True)
    after = after.replace(second=0, microsecond=0)
    looks = list(debian(place, after - 5 * HOUR, after + DAY))
    expected = [at for at in fires(expression, looks) if at > after]
    assert [*upcoming(calendar(expression, place), after, len(expected))] == expected
    beyond = calendar(expression, place).next(after + DAY - MINUTE)
    assert beyond is None or beyond >= after + DAY


@property_of
@given(randoms, moments)
def test_the_next_day_is_what_a_walk_from_day_to_day_finds(random: Random, after: datetime) -> None:
    """C-C4."""
    expression = a_taken_expression(random)
    found = calendar(expression, zone("UTC")).next(after)
    assert found is not None
    assert expression.at(found.replace(tzinfo=None))
    day = after.date() + DAY
    while not expression.on(day):
        day += DAY
    assert found.date() in {after.date(), day}


@property_of
@given(randoms, zones, st.lists(moments, min_size=2, max_size=8))
def test_who_asks_later_is_told_nothing_earlier(random: Random, place: ZoneInfo, asked: list[datetime]) -> None:
    expression = a_taken_expression(random)
    told = [calendar(expression, place).next(at) for at in sorted(asked)]
    known = [at for at in told if at is not None]
    assert known == sorted(known)


@property_of
@given(randoms, moments)
def test_without_clock_changes_a_moment_shows_the_expression(random: Random, after: datetime) -> None:
    expression = a_taken_expression(random)
    kathmandu = zone("Asia/Kathmandu")
    for at in upcoming(calendar(expression, kathmandu), after, 5):
        assert expression.at(at.astimezone(kathmandu).replace(tzinfo=None))
