"""What clock changes do to cron: each kind of gap and overlap, by example."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from zoneinfo import ZoneInfo

import pytest

from services.scheduler.cron import Calendar, CronError, first, parse, rule, upcoming, zone
from services.scheduler.cron.zones import _stretches

NEW_YEAR = datetime(2027, 1, 1, tzinfo=UTC)


def case(sentence: str, *values: object) -> object:
    return pytest.param(*values, id=sentence)


def walls(text: str, name: str, after: str, n: int) -> str:
    """The next `n` moments as the zone's clocks show them."""
    place = zone(name)
    begin = datetime.fromisoformat(after).replace(tzinfo=place)
    found = upcoming(Calendar(parse(text), place), begin, n)
    assert all(at.tzinfo is UTC for at in found)
    return ", ".join(f"{at.astimezone(place):%a %d %H:%M %z}" for at in found)


CHANGES = [
    case("Berlin, gap: a fixed time in it runs once at its end",
         "30 2 * * *", "Europe/Berlin", "2027-03-27 12:00", "Sun 28 03:00 +0200, Mon 29 02:30 +0200"),
    case("Berlin, gap: several fixed times in it run once at its end",
         "0,20,40 2 * * *", "Europe/Berlin", "2027-03-27 12:00", "Sun 28 03:00 +0200, Mon 29 02:00 +0200"),
    case("Berlin, gap: a fixed time at its end does not run twice",
         "0 2,3 * * *", "Europe/Berlin", "2027-03-28 00:00", "Sun 28 03:00 +0200, Mon 29 02:00 +0200"),
    case("Berlin, gap: half-hourly follows the clock",
         "*/30 * * * *", "Europe/Berlin", "2027-03-28 01:00",
         "Sun 28 01:30 +0100, Sun 28 03:00 +0200, Sun 28 03:30 +0200"),
    case("Berlin, gap: a wildcard in it does not run",
         "*/30 2 * * *", "Europe/Berlin", "2027-03-27 12:00", "Mon 29 02:00 +0200, Mon 29 02:30 +0200"),
    case("Berlin, overlap: a fixed time runs in the first pass",
         "30 2 * * *", "Europe/Berlin", "2027-10-30 12:00", "Sun 31 02:30 +0200, Mon 01 02:30 +0100"),
    case("Berlin, overlap: half-hourly runs in both passes",
         "*/30 2 * * *", "Europe/Berlin", "2027-10-30 12:00",
         "Sun 31 02:00 +0200, Sun 31 02:30 +0200, Sun 31 02:00 +0100, Sun 31 02:30 +0100, Mon 01 02:00 +0100"),
    case("Berlin, overlap: hourly runs in both passes",
         "@hourly", "Europe/Berlin", "2027-10-31 01:30", "Sun 31 02:00 +0200, Sun 31 02:00 +0100, Sun 31 03:00 +0100"),
    case("Berlin, overlap: a fixed time right after it runs once",
         "0 3 * * *", "Europe/Berlin", "2027-10-30 12:00", "Sun 31 03:00 +0100, Mon 01 03:00 +0100"),
    case("New York, gap: a fixed time runs at its end",
         "15 2 * * *", "America/New_York", "2027-03-13 12:00", "Sun 14 03:00 -0400, Mon 15 02:15 -0400"),
    case("New York, gap: what spring-forward must not skip is the next day",
         "30 9 * * *", "America/New_York", "2027-03-13 12:00", "Sun 14 09:30 -0400, Mon 15 09:30 -0400"),
    case("New York, overlap: a fixed time runs once",
         "15 1 * * *", "America/New_York", "2027-11-06 12:00", "Sun 07 01:15 -0400, Mon 08 01:15 -0500"),
    case("Lord Howe, gap of half an hour: a fixed time runs at its end",
         "15 2 * * *", "Australia/Lord_Howe", "2027-10-02 12:00", "Sun 03 02:30 +1100, Mon 04 02:15 +1100"),
    case("Lord Howe, gap of half an hour: a wildcard keeps to the minutes that are shown",
         "*/15 2 * * *", "Australia/Lord_Howe", "2027-10-02 12:00",
         "Sun 03 02:30 +1100, Sun 03 02:45 +1100, Mon 04 02:00 +1100"),
    case("Lord Howe, overlap of half an hour: a fixed time runs once",
         "45 1 * * *", "Australia/Lord_Howe", "2027-04-03 12:00", "Sun 04 01:45 +1100, Mon 05 01:45 +1030"),
    case("Lord Howe, overlap of half an hour: a wildcard runs in both passes",
         "45 * * * *", "Australia/Lord_Howe", "2027-04-04 01:00",
         "Sun 04 01:45 +1100, Sun 04 01:45 +1030, Sun 04 02:45 +1030"),
    case("Chatham, overlap from 03:45 to 02:45: three-hourly is shown once and no search loops",
         "59 */3 * * *", "Pacific/Chatham", "2027-04-04 00:00",
         "Sun 04 00:59 +1345, Sun 04 03:59 +1245, Sun 04 06:59 +1245"),
    case("Chatham, gap from 02:45 to 03:45: three-hourly comes right after it",
         "59 */3 * * *", "Pacific/Chatham", "2027-09-26 00:00",
         "Sun 26 00:59 +1245, Sun 26 03:59 +1345, Sun 26 06:59 +1345"),
    case("Chatham, gap from 02:45 to 03:45: a fixed time runs at its end",
         "0 3 * * *", "Pacific/Chatham", "2027-09-25 12:00", "Sun 26 03:45 +1345, Mon 27 03:00 +1345"),
    case("Chatham, overlap: the quarter of an hour before the full hour comes again",
         "50 * * * *", "Pacific/Chatham", "2027-04-04 02:00",
         "Sun 04 02:50 +1345, Sun 04 02:50 +1245, Sun 04 03:50 +1245"),
    case("Casablanca, the clock goes back for Ramadan: a fixed time runs once",
         "30 2 * * *", "Africa/Casablanca", "2024-03-09 12:00", "Sun 10 02:30 +0100, Mon 11 02:30 +0000"),
    case("Casablanca, the clock goes on after Ramadan: a fixed time runs at the gap's end",
         "30 2 * * *", "Africa/Casablanca", "2024-04-13 12:00", "Sun 14 03:00 +0100, Mon 15 02:30 +0100"),
    case("Troll, gap of two hours: all fixed times in it run once at its end",
         "30 1,2 * * *", "Antarctica/Troll", "2027-03-27 12:00", "Sun 28 03:00 +0200, Mon 29 01:30 +0200"),
    case("Troll, overlap of two hours: a fixed time runs once",
         "30 1,2 * * *", "Antarctica/Troll", "2027-10-30 12:00",
         "Sun 31 01:30 +0200, Sun 31 02:30 +0200, Mon 01 01:30 +0000"),
    case("Cairo, gap at midnight: the day's first job runs at 01:00",
         "@daily", "Africa/Cairo", "2024-04-25 12:00", "Fri 26 01:00 +0300, Sat 27 00:00 +0300"),
    case("Cairo, overlap at midnight: the evening's job runs once",
         "30 23 * * 4", "Africa/Cairo", "2024-10-31 12:00", "Thu 31 23:30 +0300, Thu 07 23:30 +0200"),
    case("Havana, gap at midnight: the date of what it left out counts",
         "30 0 9 3 *", "America/Havana", "2025-03-08 12:00", "Sun 09 01:00 -0400"),
    case("Santiago, overlap at midnight: the day before comes again for a wildcard alone",
         "*/30 23 * * *", "America/Santiago", "2025-04-05 23:00",
         "Sat 05 23:30 -0300, Sat 05 23:00 -0400, Sat 05 23:30 -0400, Sun 06 23:00 -0400"),
    case("Kathmandu, three quarters of an hour and no change",
         "0 0 * * *", "Asia/Kathmandu", "2027-03-28 00:00", "Mon 29 00:00 +0545, Tue 30 00:00 +0545"),
    case("Tokyo, no change",
         "30 2 * * *", "Asia/Tokyo", "2027-03-27 12:00", "Sun 28 02:30 +0900, Mon 29 02:30 +0900"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "after", "expected"), CHANGES)
def test_where_the_clocks_change(text: str, name: str, after: str, expected: str) -> None:
    """C-C3."""
    assert walls(text, name, after, len(expected.split(","))) == expected


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        case("in the first pass the fixed time is still to come", 0, "Sun 31 02:45 +0200"),
        case("in the second it is over", 1, "Mon 01 02:45 +0100"),
    ],
)
def test_asked_within_an_overlap(fold: int, expected: str) -> None:
    """C-C3."""
    berlin = zone("Europe/Berlin")
    after = datetime(2027, 10, 31, 2, 30, tzinfo=berlin, fold=fold)
    found = parse("45 2 * * *").next(after.astimezone(UTC), berlin)
    assert found is not None
    assert f"{found.astimezone(berlin):%a %d %H:%M %z}" == expected


def test_a_changed_zone_file_changes_the_moments_and_not_what_was_told_before() -> None:
    """C-C3: the zone is the data that was loaded, not its name."""
    zones = files("tzdata.zoneinfo")
    with (
        zones.joinpath("Europe", "Berlin").open("rb") as summer,
        zones.joinpath("Africa", "Lagos").open("rb") as without,
    ):
        old, new = ZoneInfo.from_file(summer, key="Europe/Berlin"), ZoneInfo.from_file(without, key="Europe/Berlin")
    july = datetime(2027, 7, 1, 12, tzinfo=UTC)
    noon = parse("0 12 * * *")
    assert noon.next(july, old) == datetime(2027, 7, 2, 10, tzinfo=UTC)
    assert noon.next(july, new) == datetime(2027, 7, 2, 11, tzinfo=UTC)


def test_what_only_a_gap_would_show_is_refused_by_its_zone() -> None:
    """C-C4: the last Sunday of March, between two and three."""
    in_berlin = rule(cron="* 2 */1 3 7L", timezone="Europe/Berlin", created_at=NEW_YEAR)
    with pytest.raises(CronError, match="The clocks of Europe/Berlin show no such moment within 50 years") as refused:
        first(in_berlin, NEW_YEAR)
    assert refused.value.code == "never_fires"
    assert first(rule(cron="* 2 */1 3 7L", created_at=NEW_YEAR), NEW_YEAR) == datetime(2027, 3, 28, 2, tzinfo=UTC)


def test_a_search_that_finds_nothing_looks_at_fifty_years_and_ends() -> None:
    """C-C4."""
    vienna = zone("Europe/Vienna")
    before = _stretches.cache_info()
    assert parse("* 2 */1 3 7L").next(NEW_YEAR, vienna) is None
    after = _stretches.cache_info()
    assert after.misses - before.misses in range(50, 53)
    assert after.hits - before.hits < 4 * 50


def test_the_year_ends_in_its_zone() -> None:
    """C-C5."""
    assert walls("59 23 31 12 *", "Pacific/Auckland", "2026-12-31 23:58", 2) == "Thu 31 23:59 +1300, Fri 31 23:59 +1300"
    assert walls("0 0 1 1 *", "America/Los_Angeles", "2026-12-31 23:59", 1) == "Fri 01 00:00 -0800"
