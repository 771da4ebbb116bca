"""When a container may be ended for a session's sake (policies §5): what else would die with it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from services.scheduler.decide import Began, Flight, Held, Hold, Session, State, held_by
from tests.unit.scheduler_kit import T0
from tests.unit.session_kit import MS, Course, S, closing, session

GRACED = T0 + 130 * S
NOW = T0 + 140 * S
TIMES: dict[str, Any] = {"noted_at": T0, "graced_until": GRACED, "fresh_s": 10.0}
BELOW = Held(Hold.BELOW_CEILING, "q:2")
NONE = Held(Hold.NO_CEILING, "q:2")
OTHER = Began("q:2", T0 + 100 * S)
"""40 s old: below the workspace's ceiling."""


@pytest.mark.parametrize(
    ("changes", "others", "held"),
    [
        pytest.param({}, {}, None, id="all is well"),
        pytest.param({"at": NOW - 10 * S + MS}, {}, None, id="the word is almost ten seconds old"),
        pytest.param({"at": NOW - 10 * S}, {}, None, id="it is ten"),
        pytest.param({"at": NOW - 10 * S - MS}, {}, Held(Hold.GATE), id="it is stale"),
        pytest.param({"until": NOW + MS}, {}, None, id="the gate is about to open"),
        pytest.param({"until": NOW}, {}, Held(Hold.GATE), id="it opens now"),
        pytest.param({"until": NOW - MS}, {}, Held(Hold.GATE), id="it has opened"),
        pytest.param({"beat_at": GRACED + MS}, {}, None, id="a beat from after the grace"),
        pytest.param({"beat_at": GRACED}, {}, Held(Hold.HEARTBEAT), id="a beat from its last moment"),
        pytest.param({"beat_at": GRACED - MS}, {}, Held(Hold.HEARTBEAT), id="a beat from before: not heard yet"),
        pytest.param({"beat_at": None}, {}, Held(Hold.HEARTBEAT), id="never heard"),
        pytest.param({"beat_at": None, "cadence_s": 10.001}, {}, Held(Hold.HEARTBEAT), id="none, almost for a cadence"),
        pytest.param({"beat_at": None, "cadence_s": 10.0}, {}, None, id="none for a cadence"),
        pytest.param({"beat_at": GRACED - S, "cadence_s": 9.999}, {}, None, id="none for more than a cadence"),
        pytest.param({"in_flight": ()}, {}, Held(Hold.ENDED), id="it is no longer in flight"),
        pytest.param({"in_flight": (OTHER,)}, {}, Held(Hold.ENDED), id="another is instead"),
        pytest.param(
            {"in_flight": (Began("q:1", T0), OTHER)}, {}, BELOW, id="with one that nobody knows, below its ceiling"
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), replace(OTHER, started_at=T0 + 40 * S))}, {}, None,
            id="with one that nobody knows, at its ceiling",
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), replace(OTHER, started_at=T0 + 40 * S + MS))}, {}, BELOW,
            id="with one that nobody knows, just below it",
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), replace(OTHER, ceiling_s=40.0))}, {}, None,
            id="with one that nobody knows, over a ceiling of its own",
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), replace(OTHER, started_at=T0, ceiling_s=0.0))}, {}, NONE,
            id="with one that nobody knows and that has no ceiling",
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), OTHER)}, {"q:2": Flight(is_foreign=False, is_over=True)}, None,
            id="with one that is over, or was stopped by an operator",
        ),
        pytest.param(
            {"in_flight": (Began("q:1", T0), OTHER)}, {"q:2": Flight(is_foreign=False, is_over=False)}, BELOW,
            id="with one that is not",
        ),
        pytest.param(
            {}, {"q:2": Flight(is_foreign=False, is_over=False)}, BELOW, id="with one that only the scheduler knows"
        ),
        pytest.param(
            {}, {"q:2": Flight(is_foreign=False, is_over=False, has_ceiling=False)}, NONE,
            id="with one that has no ceiling",
        ),
        pytest.param(
            {"at": NOW - 60 * S}, {"q:2": Flight(is_foreign=False, is_over=False)}, BELOW,
            id="what lasts is said before what passes",
        ),
        pytest.param(
            {}, {"q:1": Flight(is_foreign=False, is_over=False), "a": Flight(is_foreign=False, is_over=False)},
            Held(Hold.OWN_CEILING), id="its own ceiling was raised",
        ),
        pytest.param({"foreign": 1}, {}, Held(Hold.FOREIGN), id="with foreign work that nobody knows yet"),
        pytest.param(
            {"foreign": 1}, {"f": Flight(is_foreign=True, is_over=False)}, Held(Hold.BELOW_CEILING, "f"),
            id="foreign work below its ceiling",
        ),
        pytest.param({"foreign": 1}, {"f": Flight(is_foreign=True, is_over=True)}, None, id="foreign work over it"),
    ],
)  # fmt: skip
def test_when_a_container_may_be_ended(changes: dict[str, Any], others: dict[str, Flight], held: Held | None) -> None:
    flights = {"q:1": Flight(is_foreign=False, is_over=True), **others}
    word = closing(NOW, **changes)
    assert held_by("q:1", word, flights, 100.0, NOW, **TIMES) == held


@pytest.mark.parametrize(("foreign_tasks", "may"), [(0, False), (1, True)], ids=["it is gone", "it goes on"])
def test_a_foreign_session_is_in_flight_while_something_is_unexplained(foreign_tasks: int, may: bool) -> None:
    word = closing(NOW, in_flight=(), foreign=foreign_tasks)
    flights = {"f": Flight(is_foreign=True, is_over=True)}
    assert (held_by("f", word, flights, 100.0, NOW, **TIMES) is None) is may


@pytest.mark.parametrize(("noted", "may"), [(-MS, True), (0 * S, True), (MS, False)], ids=["before", "at", "after"])
def test_no_word_of_the_gate_counts_that_is_older_than_the_sight_of_the_session(noted: timedelta, may: bool) -> None:
    """Thought gone, it has left the gate: what began meanwhile is in no list of before."""
    flights = {"q:1": Flight(is_foreign=False, is_over=True)}
    word = closing(NOW - S, beat_at=NOW - S)
    noted_at = NOW - S + noted
    times = {**TIMES, "noted_at": noted_at}
    assert (held_by("q:1", word, flights, 100.0, NOW, **times) is None) is may


@pytest.mark.parametrize(
    ("sibling", "killed"),
    [
        pytest.param(session(session_id="q:2", started_at=T0 + 32 * S), False, id="below its ceiling"),
        pytest.param(session(session_id="q:2", started_at=T0 + 31 * S), True, id="at its ceiling"),
        pytest.param(session(session_id="q:2", ceiling_s=0.0), False, id="its ceiling is off"),
        pytest.param(session(session_id="f", kind="foreign", started_at=T0 + 90 * S), False, id="foreign and young"),
        pytest.param(
            session(session_id="q:2", ceiling_s=0.0, state=State.STOP_SENT, stop_reason="operator"), True,
            id="stopped by an operator",
        ),
    ],
)  # fmt: skip
def test_the_kill_waits_for_what_would_die_with_it(sibling: Session, killed: bool) -> None:
    course = Course(siblings=[sibling])
    course.turn(100.0)
    course.turn(120.0)
    course.session = replace(course.session, closing=closing(T0 + 131 * S))
    assert ("kill 1" in course.turn(131.0)) is killed


def test_what_dies_of_the_kill_and_was_not_stopped_is_told_before_it() -> None:
    """Policies §2: what our own kill ended has failed; sent again it would be the same session once more."""
    older = T0 + 10 * S
    siblings = [
        session(session_id="q:2", started_at=older, state=State.CHECKPOINT_SENT, deadline_at=T0 + 140 * S),
        session(session_id="q:3", started_at=T0, state=State.STOP_SENT, stop_reason="ceiling"),
        session(session_id="f", kind="foreign", started_at=older),
    ]
    course = Course(siblings=siblings)
    course.turn(100.0)
    course.turn(120.0)
    in_flight = tuple(Began(name, older) for name in ("q:1", "q:2", "q:3", "nobody knows it yet"))
    course.session = replace(course.session, closing=closing(T0 + 131 * S, in_flight=in_flight))
    said = course.turn(131.0)
    assert said[-3:] == ["cancel nobody knows it yet", "cancel q:2", "kill 1"]


def test_without_a_word_of_the_gate_nothing_is_killed() -> None:
    flights = {"q:1": Flight(is_foreign=False, is_over=True)}
    assert held_by("q:1", None, flights, 100.0, NOW, **TIMES) == Held(Hold.GATE)
