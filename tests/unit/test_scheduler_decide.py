"""What is due and what becomes of it (policies §4). T0 is a moment of the rule; the rows say what has passed since."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from services.scheduler.decide import (
    Outcome,
    Schedule,
    Several,
    bounced,
    bounded,
    due,
    edited,
    first_fire,
    gives_back,
    offset,
    overdue,
    ran_at,
    upcoming,
)
from tests.unit.scheduler_kit import T0, Steps, jitter_of, schedule

MS = timedelta(milliseconds=1)
S = timedelta(seconds=1)
MIN = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def at(*minutes: float) -> list[object]:
    return [T0 + each * MIN for each in minutes]


@pytest.mark.parametrize(
    ("passed", "fire", "merged", "missed", "following"),
    [
        pytest.param(-MS, None, 0, 0, 0, id="not yet"),
        pytest.param(0 * S, 0, 0, 0, 30, id="at its moment"),
        pytest.param(MS, 0, 0, 0, 30, id="a little late"),
        pytest.param(30 * MIN - MS, 0, 0, 0, 30, id="almost a period late"),
        pytest.param(30 * MIN, 30, 1, 0, 60, id="a period late: both are within the window"),
        pytest.param(30 * MIN + MS, 30, 0, 1, 60, id="more than a period late: the older one is missed"),
        pytest.param(6 * HOUR + MIN, 360, 0, 12, 390, id="six hours away: one runs, twelve are missed (C-D1)"),
    ],
)
def test_within_one_period_they_run_once_and_older_ones_are_missed(
    passed: timedelta, fire: float | None, merged: int, missed: int, following: float
) -> None:
    """C-D1 A-S-19: next is counted from the nominal moment, never from now."""
    found = due(schedule(), Steps(30 * MIN), T0 + passed)
    assert found.fire == (None if fire is None else T0 + fire * MIN)
    assert (found.merged.count if found.merged else 0, found.missed.count if found.missed else 0) == (merged, missed)
    assert found.next_fire_at == T0 + following * MIN


@pytest.mark.parametrize(
    ("period", "window_s", "late", "runs"),
    [
        pytest.param(S, None, 59 * S, True, id="a short period: the window is a minute"),
        pytest.param(30 * DAY, None, DAY, True, id="a long one: a day"),
        pytest.param(30 * DAY, None, DAY + MS, False, id="and not more"),
        pytest.param(30 * DAY, 7 * 86400, 7 * DAY, True, id="unless the schedule says so"),
        pytest.param(HOUR, 10, 10 * S, True, id="its own window"),
        pytest.param(HOUR, 10, 10 * S + MS, False, id="passed"),
    ],
)
def test_the_window_is_a_period_within_bounds_or_what_the_schedule_says(
    period: timedelta, window_s: float | None, late: timedelta, runs: bool
) -> None:
    plan = schedule(catchup_window_s=window_s)
    found = due(plan, Steps(period, count=1 + late // period), T0 + late)
    oldest = found.merged.first if found.merged else found.fire
    assert (oldest == T0) is runs if period > late else found.missed is None
    assert (found.missed is None) is runs


def test_what_comes_once_may_run_a_day_late() -> None:
    assert due(schedule(), Steps(HOUR, count=1), T0 + DAY).fire == T0
    late = due(schedule(), Steps(HOUR, count=1), T0 + DAY + MS)
    assert (late.fire, late.missed, late.next_fire_at) == (None, Several(T0, T0, 1), None)


def test_merged_and_missed_say_first_last_and_count() -> None:
    found = due(schedule(catchup_window_s=180), Steps(MIN), T0 + 10 * MIN)
    assert found.missed == Several(T0, T0 + 6 * MIN, 7)
    assert found.merged == Several(T0 + 7 * MIN, T0 + 9 * MIN, 3)
    assert (found.fire, found.next_fire_at) == (T0 + 10 * MIN, T0 + 11 * MIN)


def test_every_moment_is_shared_out_once_however_long_nobody_looked() -> None:
    """C-V1 C-S4: bounded turns, and together they account for each moment."""
    plan, rule, now = schedule(catchup_window_s=300), Steps(MIN), T0 + 1000 * MIN
    turns, accounted = 0, 0
    while plan.next_fire_at is not None and plan.next_fire_at <= now:
        found = due(plan, rule, now, moments_max=64)
        assert found.looked_at <= 64
        accounted += sum(each.count for each in (found.merged, found.missed) if each) + (found.fire is not None)
        plan = replace(plan, next_fire_at=found.next_fire_at)
        turns += 1
    assert accounted == 1001
    assert turns == 16
    assert rule.asked <= 1001 + turns * 64


def test_a_turn_that_cannot_see_all_lets_the_missed_go_first() -> None:
    """One tick after an outage, not one for each turn that it took."""
    found = due(schedule(catchup_window_s=300), Steps(MIN), T0 + 10 * MIN, moments_max=8)
    assert (found.fire, found.merged) == (None, None)
    assert found.missed == Several(T0, T0 + 4 * MIN, 5)
    assert found.next_fire_at == T0 + 5 * MIN


def test_the_last_run_is_the_last() -> None:
    """C-E10: merged ones are one run."""
    found = due(schedule(remaining_runs=1, catchup_window_s=3600), Steps(MIN), T0 + 5 * MIN)
    assert (found.fire, found.remaining_runs, found.next_fire_at) == (T0 + 5 * MIN, 0, None)
    found = due(schedule(remaining_runs=2), Steps(MIN), T0)
    assert (found.remaining_runs, found.next_fire_at) == (1, T0 + MIN)
    missed = due(schedule(remaining_runs=1, catchup_window_s=1), Steps(HOUR), T0 + MIN)
    assert (missed.remaining_runs, missed.next_fire_at) == (1, T0 + HOUR), "what is missed has taken none"


@pytest.mark.parametrize(("end", "runs"), [(T0 - MS, False), (T0, True), (T0 + MS, True)])
def test_the_end_is_the_last_moment_at_which_it_may_fire(end: object, runs: bool) -> None:
    plan = schedule(ends_at=end)
    assert (bounded(T0, plan.ends_at, None) == T0) is runs
    assert due(plan, Steps(MIN), T0 + 10 * S).next_fire_at in ([None] if runs else [None, T0])


def test_after_an_outage_nothing_fires_beyond_the_end() -> None:
    found = due(schedule(ends_at=T0 + 2 * MIN, catchup_window_s=3600), Steps(MIN), T0 + 10 * MIN)
    assert (found.fire, found.merged, found.next_fire_at) == (T0 + 2 * MIN, Several(T0, T0 + MIN, 2), None)


def test_jitter_is_the_same_everywhere_and_spreads_a_fleet() -> None:
    """A-S-17 C-S5: a hash of the id; the nominal moment stays the name of the fire."""
    offsets = sorted(offset(uuid4(), 100.0).total_seconds() for _ in range(1000))
    assert all(0 <= each < 100 for each in offsets)
    assert all(sum(low <= each < low + 10 for each in offsets) > 60 for low in range(0, 100, 10))
    assert offset(UUID(int=7), 100.0) == timedelta(seconds=42, milliseconds=62)
    assert offset(UUID(int=7), 0.0) == timedelta()


def test_a_fire_with_jitter_is_due_later_and_called_by_its_moment() -> None:
    plan = schedule(jitter_s=100.0)
    assert due(plan, Steps(HOUR), T0 + jitter_of(plan) - MS).fire is None
    found = due(plan, Steps(HOUR), T0 + jitter_of(plan))
    assert (found.fire, found.next_fire_at) == (T0, T0 + HOUR)


def test_a_rule_that_does_not_move_on_is_an_error_and_no_endless_loop() -> None:
    """A-S-03 C-R5."""

    class Stuck:
        def next(self, after: object) -> object:
            return after

    with pytest.raises(ValueError, match="comes after"):
        due(schedule(), Stuck(), T0)  # type: ignore[arg-type]


def test_resuming_never_fires_the_past() -> None:
    """C-E7 A-S-18: 30 days of pause are no 1,440 fires."""
    paused = schedule(paused=True, next_fire_at=None)
    resumed = replace(paused, paused=False)
    now = T0 + 30 * DAY + 10 * S
    assert first_fire(paused, Steps(MIN), now) is None
    assert edited(paused, resumed, Steps(MIN), now) == T0 + 30 * DAY + MIN


@pytest.mark.parametrize(
    ("change", "following"),
    [
        pytest.param({"cron": "0 * * * *"}, T0 + HOUR, id="another rule begins now"),
        pytest.param({"timezone": "Asia/Tokyo"}, T0 + HOUR, id="another zone too (C-E3)"),
        pytest.param({"prompt": "q"}, T0, id="another prompt leaves the calendar as it is"),
        pytest.param({"paused": True}, None, id="a paused one has no moment"),
        pytest.param({"ends_at": T0 - MS}, None, id="an end before it"),
        pytest.param({"ends_at": T0}, T0, id="an end at it"),
        pytest.param({"remaining_runs": 0}, None, id="no run left"),
    ],
)
def test_an_edit_computes_next_anew_where_it_is_about_time(change: dict[str, object], following: object) -> None:
    before = schedule()
    assert edited(before, replace(before, **change), Steps(HOUR), T0 + MIN) == following  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"ends_at": None}, {"remaining_runs": 5}])
def test_a_schedule_that_was_over_goes_on_from_now(change: dict[str, object]) -> None:
    over = schedule(next_fire_at=None, ends_at=T0 if "ends_at" in change else None, remaining_runs=0)
    after = replace(over, **{"remaining_runs": 5, **change})  # type: ignore[arg-type]
    assert edited(over, after, Steps(HOUR), T0 + 90 * MIN) == T0 + 2 * HOUR


def test_what_was_due_when_it_was_changed_is_told_and_not_dropped() -> None:
    assert overdue(schedule(), Steps(30 * MIN), T0 - MS) is None
    assert overdue(schedule(), Steps(30 * MIN), T0 + HOUR) == Several(T0, T0 + HOUR, 3)


def test_a_preview_is_what_then_fires() -> None:
    """C-V4."""
    plan, rule, fired = schedule(ends_at=T0 + 25 * MIN), Steps(MIN), []
    shown = upcoming(plan, rule, T0 - HOUR, 10)
    for moment in at(*range(10)):
        found = due(plan, rule, moment)  # type: ignore[arg-type]
        fired.append(found.fire)
        plan = replace(plan, next_fire_at=found.next_fire_at)
    assert shown == fired == at(*range(10))
    assert len(upcoming(plan, rule, T0, 100)) == 16
    assert len(upcoming(replace(plan, remaining_runs=3), rule, T0, 100)) == 3


@pytest.mark.parametrize(
    ("outcome", "began", "ran", "given_back", "bounce"),
    [
        ("delivered", True, True, False, False),
        ("delivered", False, True, False, False),
        ("ceiling", True, True, False, False),
        ("failed", True, True, False, False),
        ("failed", False, False, False, False),
        ("canceled", True, True, False, False),
        ("canceled", False, False, True, False),
        ("coalesced", False, False, True, True),
        ("skipped", False, False, True, True),
        ("missed", False, False, False, False),
    ],
)
def test_what_ran_what_gives_its_run_back_and_what_bounced(
    outcome: Outcome, began: bool, ran: bool, given_back: bool, bounce: bool
) -> None:
    """A-S-15: runs are told from fires that only happened."""
    moment = ran_at(outcome, T0, T0 + S if began else None)
    assert (moment is not None) is ran
    assert gives_back(outcome, moment) is given_back
    assert bounced(outcome, T0, None) == ([T0] if bounce else [])


def test_the_fire_that_waits_for_another_has_bounced_too() -> None:
    """B-33: of twelve fires in one session one waits for all, and twelve have bounced."""
    assert bounced("coalesced", T0 + MIN, T0) == [T0 + MIN, T0]


def test_the_plan_of_the_tests_is_itself_due_at_t0() -> None:
    plan: Schedule = schedule()
    assert due(plan, Steps(HOUR), T0).fire == T0
