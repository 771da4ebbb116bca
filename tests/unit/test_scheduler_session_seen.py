"""Which sessions begin and end by what snapshots show (policies §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from services.scheduler import decide
from services.scheduler.decide import Activity, Seen, Session, State, foreign
from tests.unit.scheduler_kit import T0
from tests.unit.session_kit import MS, S, session

SCHEDULE = UUID(int=7)


def seen(session_id: str = "q:1", **changes: Any) -> Seen:
    return replace(Seen(session_id, "delivery", "w", 1, T0), **changes)


def compare(
    known: Sequence[Session],
    there: Sequence[Seen],
    *,
    at: datetime = T0 + 10 * S,
    life: int = 1,
    unexplained: int = 0,
) -> tuple[list[str], list[str], list[str], list[str]]:
    news = decide.compare(known, there, {"w": life}, at, unexplained={"w": unexplained}, note_after_s=1.0)
    begun, gone, outlived, lingering = (
        [each.session_id for each in every] for every in (news.begun, news.gone, news.outlived, news.lingering)
    )
    return begun, gone, outlived, lingering


@pytest.mark.parametrize(
    ("age", "is_noted"), [(S - MS, False), (S, True), (S + MS, True)], ids=["shorter", "a second", "longer"]
)
def test_a_session_is_noted_after_a_second_with_its_true_start(age: timedelta, is_noted: bool) -> None:
    there = seen(started_at=T0 - age, ceiling_s=7.0, schedule_id=SCHEDULE)
    begun = decide.compare([], [there], {}, T0, unexplained={}, note_after_s=1.0).begun
    plain = session(started_at=T0 - age, ceiling_s=7.0, schedule_id=SCHEDULE, noted_at=T0)
    assert begun == ((plain,) if is_noted else ())


@pytest.mark.parametrize(
    ("known", "there", "changes", "begun", "gone", "outlived"),
    [
        pytest.param([session()], [seen()], {}, [], [], [], id="it goes on"),
        pytest.param([session()], [], {}, [], ["q:1"], [], id="its owner has it no more"),
        pytest.param([session()], [seen("q:2")], {}, ["q:2"], ["q:1"], [], id="another has begun"),
        pytest.param([session(noted_at=T0 + 9.999 * S)], [], {}, [], ["q:1"], [], id="noted before this snapshot"),
        pytest.param([session(noted_at=T0 + 10 * S)], [], {}, [], [], [], id="noted by this snapshot"),
        pytest.param([session(noted_at=T0 + 10.001 * S)], [], {}, [], [], [], id="noted by a later one"),
        pytest.param([session(kind="foreign")], [], {}, [], [], [], id="foreign work has no owner"),
        pytest.param([session()], [seen()], {"life": 2}, [], [], ["q:1"], id="its agent has a new life"),
        pytest.param([session(kind="foreign")], [], {"life": 2}, [], [], ["q:1"], id="so has foreign work's"),
        pytest.param([session(incarnation=2)], [seen()], {"life": 1}, [], [], [], id="an old word of an older life"),
    ],
)
def test_who_has_begun_and_who_is_gone(
    known: list[Session],
    there: list[Seen],
    changes: dict[str, Any],
    *,
    begun: list[str],
    gone: list[str],
    outlived: list[str],
) -> None:
    assert compare(known, there, **changes) == (begun, gone, outlived, [])


@pytest.mark.parametrize(
    ("unenforceable", "unexplained", "lingers"),
    [
        pytest.param(True, 1, True, id="nobody can end it, and its agent has something in hand"),
        pytest.param(True, 0, False, id="its agent has nothing in hand"),
        pytest.param(False, 1, False, id="it could be ended: what goes on is something else"),
    ],
)
def test_a_session_that_its_owner_gave_up_lingers(unenforceable: bool, unexplained: int, lingers: bool) -> None:
    """Where nobody can end its container, a hung-up owner is no word that it has ended."""
    known = [session(unenforceable=unenforceable, state=State.KILL_ORDERED)]
    found = compare(known, [], unexplained=unexplained)
    assert found == ([], [] if lingers else ["q:1"], [], ["q:1"] if lingers else [])


@dataclass
class Watch:
    """What snapshots show of foreign work, one after the other."""

    activity: Activity = field(default_factory=lambda: Activity("w"))
    open: Session | None = None

    def see(self, count: int, beat_s: float | None, life: int = 1) -> str:
        beat_at = None if beat_s is None else T0 + beat_s * S
        is_open = self.open is not None
        found = foreign(self.activity, is_open, count=count, beat_at=beat_at, incarnation=life, at=T0)
        self.activity, begun, is_over = found
        if begun is not None:
            self.open = begun
        if is_over:
            self.open = None
        return "begun" if begun is not None else "ended" if is_over else "-"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        pytest.param([(1, 10)], "-", id="one beat is none"),
        pytest.param([(1, 10), (1, 10)], "- -", id="the same beat twice"),
        pytest.param([(1, 10), (1, 20)], "- begun", id="two beats"),
        pytest.param([(1, 20), (1, 10)], "- -", id="the second is older"),
        pytest.param([(1, None), (1, None)], "- -", id="nobody has beaten"),
        pytest.param([(1, 10), (0, 20), (1, 30)], "- - -", id="not in a row"),
        pytest.param([(1, 10), (0, 20), (1, 30), (1, 40)], "- - - begun", id="then in a row"),
        pytest.param([(1, 10), (1, 20), (3, 30)], "- begun -", id="there is one, however many tasks"),
        pytest.param([(1, 10), (1, 20), (0, 30)], "- begun -", id="one snapshot without"),
        pytest.param([(1, 10), (1, 20), (0, 30), (0, 35)], "- begun - ended", id="two snapshots without"),
        pytest.param([(1, 10), (1, 20), (0, 30), (1, 35), (0, 40)], "- begun - - -", id="not two in a row"),
        pytest.param(
            [(1, 10), (1, 20), (0, None), (0, None)], "- begun - ended", id="its workspace is no longer named"
        ),
    ],
)
def test_two_beats_begin_foreign_work_and_two_snapshots_end_it(
    shown: list[tuple[int, float | None]], expected: str
) -> None:
    watch = Watch()
    assert " ".join(watch.see(*each) for each in shown) == expected


def test_foreign_work_has_begun_when_it_was_first_seen_and_has_an_id_of_its_own() -> None:
    watch = Watch()
    watch.see(2, 10)
    watch.see(2, 20)
    assert watch.open is not None
    assert (watch.open.session_id, watch.open.started_at) == ("foreign:w:1:1", T0 + 10 * S)
    for beat_s in (30, 40):
        watch.see(0, beat_s)
    watch.see(1, 50)
    watch.see(1, 60)
    assert watch.open is not None
    assert (watch.open.session_id, watch.open.started_at) == ("foreign:w:1:2", T0 + 50 * S)


def test_another_life_begins_its_foreign_work_anew() -> None:
    watch = Watch()
    watch.see(1, 10)
    assert watch.see(1, 20, life=2) == "-", "the first beat of this life"
    assert watch.see(1, 30, life=2) == "begun"
    assert watch.open is not None
    assert (watch.open.session_id, watch.open.started_at) == ("foreign:w:2:1", T0 + 20 * S)
