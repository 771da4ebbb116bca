"""Cron: what is taken and what is not, and which days and minutes an expression means."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.scheduler.cron import Calendar, CronError, parse, rule, upcoming, zone

NEW_YEAR = datetime(2027, 1, 1, tzinfo=UTC)  # a Friday


def case(sentence: str, *values: object) -> object:
    return pytest.param(*values, id=sentence)


def days(text: str, n: int, after: datetime = NEW_YEAR) -> str:
    return ", ".join(f"{at:%a %F}" for at in upcoming(Calendar(parse(text), zone("UTC")), after, n))


REFUSED = [
    case("257 characters are too many", "0" * 249 + " * * * *", "too_long", "256 characters"),
    case("a hostile 25 KB is not even read", "*," * 12_500, "too_long", "25000"),
    case("a tab is a control character", "*\t* * * *", "control_characters", "no tab"),
    case("a line break is a control character", "* * * * *\n", "control_characters", "line break"),
    case("a NUL is a control character", "* * * * *\0", "control_characters", "control character"),
    case("digits of another script are none", "\u0665 * * * *", "control_characters", "ASCII"),
    case("nothing has no fields", "", "wrong_field_count", "has 0"),
    case("four fields are too few", "* * * *", "wrong_field_count", "has 4"),
    case("a sixth field is too much", "0 * * * * *", "wrong_field_count", "has 6"),
    case("30 February never comes", "0 0 30 2 *", "never_fires", "30 in month 2"),
    case("no short month has a 31st", "0 0 31 2,4,6,9,11 *", "never_fires", "31 in month"),
    case("February has no fifth Monday before the 29th", "0 0 */30 2 1#5", "never_fires", "1#5"),
    case("a wrapped range runs backwards", "50-10 * * * *", "backward_range", "'50-10' runs backwards"),
    case("a wrapped range of names runs backwards", "0 0 * nov-feb *", "backward_range", "'nov-feb'"),
    case("a week does not go past Sunday", "0 0 * * sat-mon", "backward_range", "'sat-mon'"),
    case("a month by a name that none has", "0 0 * foo *", "unknown_name", "jan feb mar"),
    case("a weekday in full", "0 0 * * monday", "unknown_name", "sun mon tue"),
    case("a month is no weekday", "0 0 * * jul", "unknown_name", "sun mon tue"),
    case("minutes have no names", "x * * * *", "unknown_name", "it has no names"),
    case("an alias that there is not", "@every 5m", "unknown_name", "@hourly"),
    case("@reboot is no moment", "@reboot", "reboot", "no moment"),
    case("minute 60", "60 * * * *", "out_of_range", "0 to 59"),
    case("hour 24", "0 24 * * *", "out_of_range", "0 to 23"),
    case("day 0", "0 0 0 * *", "out_of_range", "1 to 31"),
    case("day 32", "0 0 32 * *", "out_of_range", "1 to 31"),
    case("month 0", "0 0 * 0 *", "out_of_range", "1 to 12"),
    case("month 13", "0 0 * 13 *", "out_of_range", "1 to 12"),
    case("weekday 8", "0 0 * * 8", "out_of_range", "0 to 7"),
    case("the sixth Monday of a month", "0 0 * * mon#6", "out_of_range", "#1 to #5"),
    case("the zeroth Monday of a month", "0 0 * * mon#0", "out_of_range", "#1 to #5"),
    case("a step of 90 minutes would be an hour", "*/90 * * * *", "out_of_range", "1 to 60"),
    case("a step of 0", "*/0 * * * *", "zero_step", "leads nowhere"),
    case("a step after a single number", "5/15 * * * *", "not_understood", "write 5-59/15"),
    case("a list with a hole", "1,,2 * * * *", "not_understood", "'' is no minute"),
    case("a negative number", "-5 * * * *", "not_understood", "no minute"),
    case("a sign", "+5 * * * *", "not_understood", "'+5'"),
    case("an underscore", "1_0 * * * *", "not_understood", "'1_0'"),
    case("a step of a step", "0-9/2/2 * * * *", "not_understood", "'0-9/2/2'"),
    case("a range of three", "1-2-3 * * * *", "not_understood", "'2-3'"),
    case("a question mark of another dialect", "0 0 ? * 1", "not_understood", "'?'"),
    case("the weekday nearest to the 15th, of another dialect", "0 0 15W * *", "not_understood", "'15w'"),
    case("the third day before the last, of another dialect", "0 0 L-3 * *", "unknown_name", "'l'"),
    case("L alone as a weekday means two things", "0 0 * * L", "not_understood", "5L is the last Friday"),
    case("the n-th of a range of weekdays", "0 0 * * mon-fri#1", "not_understood", "'mon-fri'"),
]


@pytest.mark.parametrize(("text", "code", "part"), REFUSED)
def test_what_is_refused_says_why(text: str, code: str, part: str) -> None:
    """C-C4."""
    with pytest.raises(CronError) as refused:
        parse(text)
    assert refused.value.code == code
    sentence = str(refused.value)
    assert part in sentence
    assert len(sentence) < 400
    assert sentence.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Europe/Berlino",
        "europe/berlin",
        "localtime",
        "Factory",
        "right/UTC",
        "posixrules",
        "../UTC",
        "Europe",
        "\0",
        "x" * 9999,
    ],
)
def test_a_zone_that_iana_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(CronError, match="no time zone") as refused:
        rule(cron="0 0 * * *", timezone=name, created_at=NEW_YEAR)
    assert refused.value.code == "unknown_zone"
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        case("@hourly", "@hourly", "0 * * * *"),
        case("@daily", "@daily", "0 0 * * *"),
        case("@midnight", "@midnight", "0 0 * * *"),
        case("@weekly is Sunday", "@weekly", "0 0 * * 0"),
        case("@monthly", "@monthly", "0 0 1 * *"),
        case("@yearly", "@yearly", "0 0 1 1 *"),
        case("@annually", "@annually", "0 0 1 1 *"),
        case("7 is Sunday", "0 0 * * 7", "0 0 * * 0"),
        case("a range may end on 7", "0 0 * * 5-7", "0 0 * * 0,5,6"),
        case("a week may end on Sunday by its name", "0 0 * * fri-sun", "0 0 * * 0,5,6"),
        case("one from Sunday to Sunday is a day", "0 0 * * sun-sun", "0 0 * * 0"),
        case("and begin there", "0 0 * * sun-tue", "0 0 * * 0-2"),
        case("names of months", "0 0 1 jan,mar-may *", "0 0 1 1,3,4,5 *"),
        case("names in any case", "0 0 * JAN Mon", "0 0 * 1 1"),
        case("a step over all", "*/20 * * * *", "0,20,40 * * * *"),
        case("a step over a range begins where it does", "7-30/10 0 * * *", "7,17,27 0 * * *"),
        case("a step over the days begins on the 1st", "0 0 */10 * *", "0 0 1,11,21,31 * *"),
        case("leading zeros", "05 09 * * *", "5 9 * * *"),
        case("any number of spaces", "  5   9 * *   * ", "5 9 * * *"),
        case("the same thing twice in a list", "5,5,4-6 9 * * *", "4,5,6 9 * * *"),
    ],
)
def test_two_ways_to_say_it_mean_the_same(text: str, same_as: str) -> None:
    assert upcoming(Calendar(parse(text), zone("UTC")), NEW_YEAR, 40) == upcoming(
        Calendar(parse(same_as), zone("UTC")), NEW_YEAR, 40
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        case("either is enough when both are given", "0 0 13 * 5", "Fri 2027-01-08, Wed 2027-01-13, Fri 2027-01-15"),
        case(
            "both must agree when the date begins with a star",
            "0 0 */2 * 5",
            "Fri 2027-01-15, Fri 2027-01-29, Fri 2027-02-05",
        ),
        case(
            "both must agree when the weekday begins with a star",
            "0 0 2-3 * */6",
            "Sat 2027-01-02, Sun 2027-01-03, Sat 2027-04-03",
        ),
        case("a range of all dates is no star", "0 0 1-31 * 5", "Sat 2027-01-02, Sun 2027-01-03, Mon 2027-01-04"),
        case("the last day of each month", "0 0 L * *", "Sun 2027-01-31, Sun 2027-02-28, Wed 2027-03-31"),
        case("the last day of a leap February", "0 0 L 2 *", "Sun 2027-02-28, Tue 2028-02-29, Wed 2029-02-28"),
        case("the first and the last day", "0 0 1,L * *", "Sun 2027-01-31, Mon 2027-02-01, Sun 2027-02-28"),
        case("the last Friday", "0 0 * * 5L", "Fri 2027-01-29, Fri 2027-02-26, Fri 2027-03-26"),
        case(
            "the last Sunday by its name and by 7", "0 0 * * sunL,7L", "Sun 2027-01-31, Sun 2027-02-28, Sun 2027-03-28"
        ),
        case("the second Monday", "0 0 * * mon#2", "Mon 2027-01-11, Mon 2027-02-08, Mon 2027-03-08"),
        case("the first Sunday is also 7#1", "0 0 * * 7#1", "Sun 2027-01-03, Sun 2027-02-07, Sun 2027-03-07"),
        case("the fifth Friday, where there is one", "0 0 * * 5#5", "Fri 2027-01-29, Fri 2027-04-30, Fri 2027-07-30"),
        case("the first and third Monday", "0 0 * * 1#1,1#3", "Mon 2027-01-04, Mon 2027-01-18, Mon 2027-02-01"),
        case("29 February in leap years", "0 0 29 2 *", "Tue 2028-02-29, Sun 2032-02-29, Fri 2036-02-29"),
        case(
            "29 February or a fifth Monday of February",
            "0 0 29 2 1#5",
            "Tue 2028-02-29, Sun 2032-02-29, Fri 2036-02-29",
        ),
        case("29 February if it is a Monday", "0 0 */28 2 1#5", "Mon 2044-02-29, Mon 2072-02-29"),
        case("31 only in long months", "0 0 31 * *", "Sun 2027-01-31, Wed 2027-03-31, Mon 2027-05-31"),
    ],
)
def test_the_days_of(text: str, expected: str) -> None:
    """C-C4."""
    assert days(text, len(expected.split(","))) == expected


@pytest.mark.parametrize(
    ("year", "expected"),
    [
        case("2100 is no leap year", 2096, "Wed 2096-02-29, Fri 2104-02-29"),
        case("2000 was one", 1999, "Tue 2000-02-29, Sun 2004-02-29"),
    ],
)
def test_a_century_is_a_leap_year_every_400(year: int, expected: str) -> None:
    """C-C4."""
    assert days("0 0 29 2 *", 2, datetime(year, 1, 1, tzinfo=UTC)) == expected


def test_the_rarest_date_is_found_over_a_century_without_a_leap_day() -> None:
    """C-C4: 40 years, within the search's 50."""
    assert days("0 0 */28 2 1#5", 1, datetime(2072, 3, 1, tzinfo=UTC)) == "Mon 2112-02-29"


def test_the_end_of_the_calendar_is_no_error() -> None:
    assert parse("* * * * *").next(datetime.max.replace(tzinfo=UTC), zone("Pacific/Kiritimati")) is None
    new_year = parse("0 0 1 1 *")
    last = new_year.next(datetime(9998, 6, 1, tzinfo=UTC), zone("Pacific/Kiritimati"))
    assert last == datetime(9998, 12, 31, 10, tzinfo=UTC)
    assert new_year.next(last, zone("Pacific/Kiritimati")) is None
