"""How a session comes to its end (policies §5). Ceiling 100 s, checkpoint 20 s, stop 10 s; T0 is its start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.scheduler import decide
from services.scheduler.decide import Closing, Directive, Gate, Rules, Session, State
from tests.unit.scheduler_kit import T0
from tests.unit.session_kit import MS, PACE, RULES, Course, S, closing, session, words

STOPPED = ["cancel ceiling", "gate"]
"""Its holder hears first; the agent itself half a second later."""


@pytest.mark.parametrize(
    ("at_s", "state", "says"),
    [
        pytest.param(74.999, State.RUNNING, [], id="before three quarters"),
        pytest.param(75.0, State.RUNNING, ["checkpoint ceiling_near"], id="at three quarters"),
        pytest.param(75.001, State.RUNNING, ["checkpoint ceiling_near"], id="after them"),
        pytest.param(99.999, State.RUNNING, ["checkpoint ceiling_near"], id="almost at the ceiling"),
        pytest.param(100.0, State.CHECKPOINT_SENT, ["checkpoint ceiling"], id="at the ceiling"),
        pytest.param(100.001, State.CHECKPOINT_SENT, ["checkpoint ceiling"], id="over it"),
        pytest.param(99_999.0, State.CHECKPOINT_SENT, ["checkpoint ceiling"], id="far over it"),
    ],
)
def test_a_session_that_is_seen_first_is_where_its_age_says(at_s: float, state: State, says: list[str]) -> None:
    course = Course()
    assert course.turn(at_s) == says
    assert course.session.state is state


@pytest.mark.parametrize("late_s", [100.0, 500.0, 99_999.0], ids=["at its ceiling", "five times it", "a day old"])
def test_a_session_older_than_its_ceiling_at_first_sight_gets_each_grace_whole(late_s: float) -> None:
    """C-K15: whoever comes late gives the grace that follows whole."""
    course = Course()
    assert course.turn(late_s) == ["checkpoint ceiling"]
    assert course.session.deadline_at == T0 + (late_s + 20) * S
    assert course.turn(late_s + 19.999)[-1] == "checkpoint ceiling"
    assert course.turn(late_s + 500) == STOPPED
    assert course.session.deadline_at == T0 + (late_s + 510) * S
    course.session = replace(course.session, closing=closing(T0 + (late_s + 509) * S))
    assert not any(word.startswith("kill") for word in course.turn(late_s + 509.999))


@pytest.mark.parametrize(
    ("at_s", "state", "says"),
    [
        pytest.param(119.999, State.CHECKPOINT_SENT, ["checkpoint ceiling"], id="in its grace"),
        pytest.param(120.0, State.STOP_SENT, STOPPED, id="its grace is over"),
        pytest.param(120.001, State.STOP_SENT, STOPPED, id="and past"),
    ],
)
def test_it_is_stopped_when_its_checkpoint_is_over(at_s: float, state: State, says: list[str]) -> None:
    course = Course()
    course.turn(100.0)
    assert course.turn(at_s) == says
    assert course.session.state is state


@pytest.mark.parametrize(
    ("at_s", "killed"),
    [
        pytest.param(129.999, False, id="in the grace of its stop"),
        pytest.param(130.0, False, id="at its end: no beat is from after it"),
        pytest.param(130.001, True, id="after it"),
    ],
)
def test_it_is_killed_after_the_grace_of_its_stop_and_a_word_of_the_gate(at_s: float, killed: bool) -> None:
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    assert not any(word.startswith("kill") for word in course.turn(at_s)), "never without the gate's word"
    course.session = replace(course.session, closing=closing(T0 + at_s * S))
    assert ("kill 1" in course.turn(at_s)) is killed
    if killed:
        assert course.session.state is State.KILL_ORDERED
        assert course.session.deadline_at == T0 + (at_s + 120) * S, "the order is void when the gate may open"


def test_what_has_no_answer_is_said_again_every_ten_seconds_and_is_the_same() -> None:
    course = Course()
    assert course.turn(3.0) == []
    said = course.until(150.0)
    assert [at for at, word in said if word == "checkpoint ceiling_near"] == [75, 85, 95]
    assert [at for at, word in said if word == "checkpoint ceiling"] == [100, 110]
    assert [at for at, word in said if word == "cancel ceiling"] == [120, 120.5, 130.5, 140.5]
    assert [at for at, word in said if word == "stop ceiling"] == [120.5, 130.5, 140.5]
    assert [at for at, word in said if word == "gate"] == [120, 125, *range(130, 151)], "late, it waits for an answer"
    directives = {say for _, say in course.said if isinstance(say, Directive)}
    assert len(directives) == 3, "one each, however often it was said"


def test_the_gate_is_asked_to_stay_closed_for_two_minutes_from_each_word() -> None:
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    course.until(129.0)
    gates = [(at, say.until) for at, say in course.said if isinstance(say, Gate)]
    assert gates == [(at, T0 + (at + 120) * S) for at in (120, 125)]


def test_an_order_that_nobody_answered_in_time_is_void_and_another_needs_new_signs() -> None:
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    course.session = replace(course.session, closing=closing(T0 + 131 * S, until=T0 + 140 * S))
    assert "kill 1" in course.turn(131.0)
    assert not any(word.startswith("kill") for word in course.turn(139.999))
    course.session = replace(course.session, closing=closing(T0 + 139 * S))
    assert not any(word.startswith("kill") for word in course.turn(140.0))
    assert course.session.state is State.STOP_SENT
    course.session = replace(course.session, closing=closing(T0 + 141 * S))
    assert "kill 2" in course.turn(141.0)


@pytest.mark.parametrize(
    ("own", "workspaces", "ends"),
    [
        pytest.param(None, 0.0, None, id="the workspace has none"),
        pytest.param(0.0, 100.0, None, id="it has none of its own"),
        pytest.param(None, 100.0, 100, id="the workspace's"),
        pytest.param(50.0, 100.0, 50, id="its own is shorter"),
        pytest.param(500.0, 100.0, 500, id="its own is longer"),
        pytest.param(50.0, 0.0, 50, id="its own where the workspace has none"),
    ],
)
def test_the_ceiling_is_its_own_or_its_workspaces(own: float | None, workspaces: float, ends: float | None) -> None:
    course = Course(session(ceiling_s=own), replace(RULES, ceiling_s=workspaces))
    course.turn(0.0)
    reached = [at for at, word in course.until(10_000.0) if word == "checkpoint ceiling"]
    assert (reached[0] if reached else None) == ends
    if ends is None:
        assert course.due_at is None
        assert course.turn(1e6) == []


# ── the ceiling changes while it runs (C-K9) ──────────────────────────────────────────────────────────────────────────


def test_a_lowered_ceiling_reaches_what_runs() -> None:
    """C-K9."""
    course = Course()
    course.turn(60.0)
    course.rules = replace(RULES, ceiling_s=80.0)
    assert course.turn(60.0) == ["checkpoint ceiling_near"], "three quarters of the new one"
    assert course.turn(80.0) == ["checkpoint ceiling"]


def test_a_raised_ceiling_takes_back_the_checkpoint_and_asks_anew_at_the_new_one() -> None:
    """C-K9: what was said of the old one is not said again, and the new question is another."""
    course = Course()
    course.turn(75.0)
    course.turn(100.0)
    course.rules = replace(RULES, ceiling_s=200.0)
    assert course.turn(110.0) == []
    assert (course.session.state, course.session.deadline_at) == (State.RUNNING, None)
    assert course.until(149.999) == []
    assert course.turn(150.0) == ["checkpoint ceiling_near"]
    assert course.turn(200.0) == ["checkpoint ceiling"]
    assert course.session.deadline_at == T0 + 220 * S
    about = {(say.reason, say.about): say.deadline_at for _, say in course.said if isinstance(say, Directive)}
    assert len(about) == 4
    assert sorted(about.values(), key=str) == [T0 + each * S for each in (100, 120, 200, 220)]


@pytest.mark.parametrize("changed", [0.0, 200.0], ids=["turned off", "raised"])
def test_what_was_said_of_an_old_ceiling_is_not_said_again(changed: float) -> None:
    """C-K9."""
    course = Course()
    assert course.turn(75.0) == ["checkpoint ceiling_near"]
    course.rules = replace(RULES, ceiling_s=changed)
    assert course.turn(85.0) == []
    assert course.until(99.0) == []
    course.rules = RULES
    assert course.turn(95.0) == ["checkpoint ceiling_near"], "it holds again: the same question"
    assert len({say for _, say in course.said}) == 1


def test_a_stopped_session_stays_stopped_under_a_raised_ceiling_but_is_not_killed() -> None:
    """C-K9: nothing is ended that is below its ceiling, unless an operator says so."""
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    course.rules = replace(RULES, ceiling_s=1000.0)
    course.session = replace(course.session, closing=closing(T0 + 131 * S))
    assert course.turn(131.0) == ["cancel ceiling", "stop ceiling", "gate"]
    assert course.session.state is State.STOP_SENT
    deadline_at = course.session.deadline_at
    taken = decide.stop(course.session, course.rules, T0 + 132 * S, "operator", PACE)
    assert [words(say) for say in taken.says] == ["cancel operator", "stop operator"]
    assert taken.session.deadline_at == deadline_at, "its grace does not begin anew"
    course.session = taken.session
    assert "kill 1" in course.turn(133.0)


# ── an operator ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ceiling_s", [100.0, 0.0], ids=["below its ceiling", "with none"])
def test_an_operators_stop_goes_its_whole_way(ceiling_s: float) -> None:
    course = Course(rules=replace(RULES, ceiling_s=ceiling_s))
    course.turn(5.0)
    taken = decide.stop(course.session, course.rules, T0 + 5 * S, "operator", PACE)
    assert [words(say) for say in taken.says] == ["cancel operator", "gate"]
    course.session = replace(taken.session, closing=closing(T0 + 15 * S + MS))
    assert not any(word.startswith("kill") for word in course.turn(14.999))
    assert "kill 1" in course.turn(15.001)


def test_a_checkpoint_by_hand_is_said_again_until_it_is_past_and_ends_nothing() -> None:
    taken = decide.ask_by_hand(session(), RULES, T0 + 5 * S, "question", PACE)
    assert [words(say) for say in taken.says] == ["checkpoint operator"]
    course = Course(taken.session, due_at=taken.due_at)
    assert course.until(74.0) == [(15, "checkpoint operator")]
    assert course.session.state is State.RUNNING


def test_nobody_can_end_its_container() -> None:
    """It is told to stop for ever, and keeps its gate closed, whether its order was still good or not."""
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    course.session = replace(course.session, closing=closing(T0 + 131 * S, until=T0 + 135 * S))
    course.turn(131.0)
    for late_s in (134.0, 135.0):
        course.turn(late_s)
        refused = Course(decide.kill_refused(course.session))
        assert refused.session.unenforceable
        refused.turn(late_s)
        said = refused.until(155.0)
        assert not any(word.startswith("kill") for _, word in said)
        assert {word for _, word in said} == {*STOPPED, "stop ceiling"}
        assert decide.next_step(refused.session, RULES) is None


@pytest.mark.parametrize("at_s", [50.0, 100.0], ids=["running", "asked to save"])
def test_a_refused_kill_of_a_session_that_was_not_stopped_says_nothing(at_s: float) -> None:
    course = Course()
    course.turn(at_s)
    assert decide.kill_refused(course.session) == course.session


@pytest.mark.parametrize(
    ("at_s", "following"),
    [
        pytest.param(1.0, ("checkpoint", 100), id="running"),
        pytest.param(100.0, ("stop", 120), id="asked to save"),
        pytest.param(120.0, ("kill", 130), id="stopped"),
    ],
)
def test_what_comes_next_and_when(at_s: float, following: tuple[str, float]) -> None:
    course = Course()
    for moment in (1.0, 100.0, 120.0):
        if moment <= at_s:
            course.turn(moment)
    assert decide.next_step(course.session, RULES) == (following[0], T0 + following[1] * S)
    assert decide.next_step(session(), replace(RULES, ceiling_s=0.0)) is None


def test_nothing_but_time_and_words_about_it_moves_a_session() -> None:
    """C-K7: what an agent reports of its progress is in nothing that a step is taken from."""
    taken_from = {name for each in (Session, Rules, Closing) for name in each.__dataclass_fields__}
    assert not [name for name in taken_from if "progress" in name or "extend" in name]
    course = Course()
    course.turn(100.0)
    course.turn(120.0)
    deadline_at = course.session.deadline_at
    for at_s in range(120, 130):
        course.session = replace(course.session, closing=closing(T0 + at_s * S))
        course.turn(at_s)
        assert course.session.deadline_at == deadline_at
    course.session = replace(course.session, closing=closing(T0 + 131 * S))
    assert "kill 1" in course.turn(131.0)
