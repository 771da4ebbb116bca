"""The three ways to say when beside each other, and what an expression is in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from random import Random
from time import perf_counter

import pytest

from services.scheduler.cron import At, CronError, Every, describe, first, rule, upcoming
from tests.unit.cron_kit import DAY, ZONES, a_taken_expression

NEW_YEAR = datetime(2027, 1, 1, tzinfo=UTC)


def case(sentence: str, *values: object) -> object:
    return pytest.param(*values, id=sentence)


def test_an_interval_is_elapsed_time_from_its_anchor() -> None:
    """C-C5: also over the night in which Berlin's clocks go on."""
    anchor = datetime(2027, 3, 27, 12, 0, 0, 250_000, tzinfo=UTC)
    daily = rule(every_s=86_400, timezone="Europe/Berlin", created_at=anchor)
    assert upcoming(daily, anchor, 3) == tuple(anchor + k * DAY for k in (1, 2, 3))


@pytest.mark.parametrize(
    ("after_s", "expected_s"),
    [
        case("before its anchor, the first is one period after it", -100.0, 3),
        case("at its anchor", 0.0, 3),
        case("just before a fire", 2.999, 3),
        case("at a fire, the next one", 3.0, 6),
        case("just after a fire", 3.001, 6),
        case("years later, without walking there", 1e9, 1_000_000_002),
    ],
)
def test_the_next_fire_of_an_interval(after_s: float, expected_s: int) -> None:
    every = Every(3, NEW_YEAR)
    assert every.next(NEW_YEAR + timedelta(seconds=after_s)) == NEW_YEAR + timedelta(seconds=expected_s)


def test_a_moment_comes_once() -> None:
    at = rule(at=datetime(2027, 3, 28, 9, tzinfo=timezone(timedelta(hours=2))), created_at=NEW_YEAR)
    moment = datetime(2027, 3, 28, 7, tzinfo=UTC)
    assert at == At(moment)
    assert upcoming(at, NEW_YEAR, 5) == (moment,)
    assert at.next(moment) is None
    assert first(at, moment - timedelta(microseconds=1)).tzinfo is UTC


@pytest.mark.parametrize(
    ("given", "code", "part"),
    [
        case("nothing", {}, "not_one_rule", "one of cron, every_s and at"),
        case("two at once", {"cron": "* * * * *", "every_s": 5}, "not_one_rule", "one of cron, every_s and at"),
        case("an interval of 0", {"every_s": 0}, "out_of_range", "1 to"),
        case("a negative interval", {"every_s": -1}, "out_of_range", "1 to"),
        case("an interval beyond 50 years", {"every_s": 50 * 366 * 86_400 + 1}, "out_of_range", "50 years"),
        case("a moment without its offset", {"at": datetime(2028, 1, 1)}, "not_understood", "with its offset"),  # noqa: DTZ001 - the case
        case("a moment that is over", {"at": NEW_YEAR}, "never_fires", "over"),
        case("an interval in no zone", {"every_s": 5, "timezone": "Mars/Olympus"}, "unknown_zone", "Mars/Olympus"),
    ],
)
def test_a_rule_that_is_none_is_refused(given: dict[str, object], code: str, part: str) -> None:
    with pytest.raises(CronError, match=part) as refused:
        first(rule(created_at=NEW_YEAR, **given), NEW_YEAR)  # type: ignore[arg-type]
    assert refused.value.code == code


def test_ten_thousand_schedules_due_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """What the moment after it costs, printed."""
    random = Random(1)
    texts = [a_taken_expression(random, dense=index % 4 > 0).text for index in range(2_500)]
    rules = [rule(cron=text, timezone=random.choice(ZONES), created_at=NEW_YEAR) for text in texts]
    rules += [rule(cron="*/30 * * * *", timezone=random.choice(ZONES), created_at=NEW_YEAR) for _ in range(7_500)]
    for round_ in ("first", "second"):
        started = perf_counter()
        moments = [each.next(NEW_YEAR) for each in rules]
        spent_s = perf_counter() - started
        assert all(moment is None or moment > NEW_YEAR for moment in moments)
        with capsys.disabled():
            print(f"\n{round_} round: {spent_s / len(rules) * 1e6:.1f} µs for each next", end=" ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("*/30 * * * *", "Every 30 minutes"),
        ("0 9 * * 1-5", "At 09:00, Monday through Friday"),
        ("@daily", "At 00:00"),
        ("*,5 * * * *", "Every minute"),
        ("5,*/20 3 * * *", "At 0, 5, 20, and 40 minutes past the hour, at 03:00"),
        ("0 0 1,15 * 5", "At 00:00, on day 1 and 15 of the month, or on Friday"),
        ("0 0 */2 * 5", "At 00:00, every 2 days, but only on Friday"),
        ("0 0 1,L * *", "At 00:00, on day 1 of the month and on the last day of the month"),
        ("0 0 * * mon#1,mon#3", "At 00:00, on the first Monday of the month and on the third Monday of the month"),
        ("0 0 * * friL", "At 00:00, on the last Friday of the month"),
        ("0 0 * * */2", "At 00:00, on Sunday, Tuesday, Thursday, and Saturday"),
        ("0 0 13 jul *", "At 00:00, on day 13 of the month, in July"),
    ],
)
def test_in_words(text: str, words: str) -> None:
    assert describe(text) == words


def test_whatever_is_taken_has_words() -> None:
    random = Random(1)
    for _ in range(300):
        text = a_taken_expression(random).text
        words = describe(text)
        assert words[0].isupper(), text
        assert "*" not in words, text
