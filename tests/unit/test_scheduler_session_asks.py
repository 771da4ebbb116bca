"""Who is asked to make room for a tick that waits, and for CRITICAL (policies §5). T0 is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from services.scheduler.decide import Ask, Rules, Session, State, Waiting, early
from tests.unit.scheduler_kit import T0
from tests.unit.session_kit import MS, Course, S, session, words

SCHEDULE = UUID(int=7)
OLD = session(started_at=T0 - 600 * S)


def tick(waited_s: float, period_s: float | None = 60.0) -> Waiting:
    return Waiting("tick", T0 - waited_s * S, period_s)


def asked(found: Session, ticks: Sequence[Waiting] = (), critical: datetime | None = None, **rules: Any) -> list[str]:
    _, says = early(found, replace(Rules(), **rules), T0, ticks=ticks, critical_since=critical)
    return [words(say) for say in says]


@pytest.mark.parametrize(
    ("preempts", "kind", "schedule_id", "is_asked"),
    [
        pytest.param("ticks", "delivery", SCHEDULE, True, id="ticks ask ticks"),
        pytest.param("ticks", "foreign", None, True, id="and foreign work"),
        pytest.param("ticks", "delivery", None, False, id="no message of a caller"),
        pytest.param("ticks", "forward", None, False, id="no forward"),
        pytest.param("all", "delivery", None, True, id="all: a message too"),
        pytest.param("all", "forward", None, True, id="all: a forward too"),
        pytest.param("none", "delivery", SCHEDULE, False, id="none: no tick"),
        pytest.param("none", "foreign", None, False, id="none: no foreign work"),
    ],
)
def test_whom_a_waiting_tick_asks(preempts: str, kind: Any, schedule_id: UUID | None, is_asked: bool) -> None:
    found = asked(replace(OLD, kind=kind, schedule_id=schedule_id), [tick(60)], tick_preempts=preempts)
    assert found == (["checkpoint tick_waiting"] if is_asked else [])


@pytest.mark.parametrize(
    ("waited_s", "period_s", "is_asked"),
    [
        pytest.param(59.999, 60.0, False, id="less than its period"),
        pytest.param(60.0, 60.0, True, id="its period"),
        pytest.param(60.001, 60.0, True, id="more"),
        pytest.param(899.999, 3600.0, False, id="an hour's, before a quarter of one"),
        pytest.param(900.0, 3600.0, True, id="an hour's, after a quarter of one"),
        pytest.param(899.999, None, False, id="it fires once: before"),
        pytest.param(900.0, None, True, id="it fires once: after"),
    ],
)
def test_how_long_a_tick_waits_before_it_asks(waited_s: float, period_s: float | None, is_asked: bool) -> None:
    assert bool(asked(replace(OLD, schedule_id=SCHEDULE), [tick(waited_s, period_s)])) is is_asked


@pytest.mark.parametrize(
    ("age", "is_asked"), [(600 * S - MS, False), (600 * S, True), (600 * S + MS, True)], ids=["younger", "at", "older"]
)
def test_how_old_a_session_is_before_a_tick_asks_it(age: timedelta, is_asked: bool) -> None:
    assert bool(asked(session(started_at=T0 - age, schedule_id=SCHEDULE), [tick(60)])) is is_asked


@pytest.mark.parametrize(
    ("age", "is_asked"), [(60 * S - MS, False), (60 * S, True), (60 * S + MS, True)], ids=["younger", "at", "older"]
)
def test_how_old_a_session_is_before_critical_asks_it(age: timedelta, is_asked: bool) -> None:
    found = asked(session(started_at=T0 - age), critical=T0 - S, tick_preempts="none")
    assert found == (["checkpoint critical_waiting"] if is_asked else [])


def test_it_is_asked_once_for_each_thing_that_waits_and_nothing_follows() -> None:
    first, says = early(OLD, Rules(tick_preempts="all"), T0, ticks=[tick(60)], critical_since=T0)
    assert [words(say) for say in says] == ["checkpoint critical_waiting", "checkpoint tick_waiting"]
    again, says = early(first, Rules(tick_preempts="all"), T0 + 900 * S, ticks=[tick(60)], critical_since=T0)
    assert (again, says) == (first, ())
    other = Waiting("another tick", T0, 60.0)
    third, says = early(first, Rules(tick_preempts="all"), T0 + 60 * S, ticks=[tick(60), other], critical_since=T0 + S)
    assert [words(say) for say in says] == ["checkpoint critical_waiting", "checkpoint tick_waiting"]
    course = Course(replace(third, started_at=T0), Rules(ceiling_s=1_000.0), due_at=T0 + 70 * S)
    said = course.until(749.0)
    assert {at for at, _ in said} == set(range(70, 180, 10)), "until the last of their deadlines, and no longer"
    assert len({say for _, say in course.said}) == 4, "the same four, however often"
    assert course.session.state is State.RUNNING


def test_who_did_not_hear_a_hundred_will_not_hear_the_next() -> None:
    deaf = replace(OLD, asks=tuple(Ask("tick_waiting", str(each), T0, T0) for each in range(99)))
    ninety_nine, says = early(deaf, Rules(tick_preempts="all"), T0, ticks=[tick(60)])
    assert len(says) == 1
    assert early(ninety_nine, Rules(tick_preempts="all"), T0, critical_since=T0)[1] == ()
    many = [Waiting(str(each), T0 - 60 * S, 60.0) for each in range(1000)]
    hundred, says = early(OLD, Rules(tick_preempts="all"), T0, ticks=many, critical_since=T0)
    assert (len(hundred.asks), len(says)) == (100, 100), "a schedule that keeps all its ticks asks no more at once"
    assert words(says[0]) == "checkpoint critical_waiting"


@pytest.mark.parametrize("state", [State.CHECKPOINT_SENT, State.STOP_SENT, State.KILL_ORDERED])
def test_a_session_that_is_being_ended_is_asked_for_nothing_else(state: State) -> None:
    assert asked(replace(OLD, state=state, schedule_id=SCHEDULE), [tick(900)], T0) == []
