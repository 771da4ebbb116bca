"""How long an agent may be silent, how soon it is restarted, and what becomes of an order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.liveness.decide.budget import BUDGET, STABLE_S, fleet_max, plan, retry_s
from services.liveness.decide.judge import Reason
from services.liveness.decide.life import Life, Status
from services.liveness.decide.orders import Ruling, rule
from services.liveness.decide.window import CEILING_S, FLOOR_S, Gaps, learn, window_s

NOW = datetime(2026, 4, 16, 8, 33, 46, tzinfo=UTC)


@pytest.mark.parametrize(
    ("declared_s", "gaps", "expected_s"),
    [
        (30.0, [], 60.0),
        (30.0, [30.0], 60.0),
        (5.0, [], 15.0),
        (90.0, [], 120.0),
        (30.0, [10.0] * 40, 20.0),
        (5.0, [60.0] * 40, 120.0),
        (30.0, [1.0] * 40, 15.0),
    ],
    ids=[
        "as declared until three beats are in", "two beats are not three", "never below 15 s", "never above 120 s",
        "a steady cadence is learnt", "a cadence that was wrongly declared is learnt too", "a quick one has the floor",
    ],
)  # fmt: skip
def test_the_window_follows_the_cadence(declared_s: float, gaps: list[float], expected_s: float) -> None:
    """A-L-02, A-L-04: 15 s with a cadence of 30 s missed a healthy agent half the time."""
    learnt = learn(Gaps(), None)
    for gap_s in gaps:
        learnt = learn(learnt, gap_s)
    assert window_s(learnt, declared_s) == pytest.approx(expected_s, abs=0.5)


def test_an_uneven_cadence_widens_the_window() -> None:
    even = uneven = learn(Gaps(), None)
    for turn in range(40):
        even, uneven = learn(even, 20.0), learn(uneven, 10.0 if turn % 2 else 30.0)
    assert window_s(uneven, 30.0) > window_s(even, 30.0) + 20


@given(st.lists(st.floats(-10, 1e6), max_size=50), st.floats(0.1, 1e4))
def test_the_window_stays_within_its_limits_whatever_came(gaps: list[float], declared_s: float) -> None:
    """D-S24: also where a clock went backwards."""
    learnt = learn(Gaps(), None)
    for gap_s in gaps:
        learnt = learn(learnt, gap_s)
    assert FLOOR_S <= window_s(learnt, declared_s) <= CEILING_S


def life(**about: Any) -> Life:
    return Life("w1", 1, 3, driver="process", **about)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("was", "recent", "after_s", "backoffs"),
    [
        (life(), 0, 0, 0),
        (life(restarted_at=ago(STABLE_S), backoffs=4), 0, 0, 0),
        (life(restarted_at=ago(STABLE_S - 1), backoffs=0), 1, 0, 1),
        (life(restarted_at=ago(4), backoffs=0), 1, 6, 1),
        (life(restarted_at=ago(4), backoffs=1), 2, 16, 2),
        (life(restarted_at=ago(4), backoffs=9), 4, 296, 10),
        (life(restarted_at=ago(4), backoffs=3), BUDGET, None, 3),
        (life(restarted_at=ago(4), unheard=BUDGET), 0, None, 0),
    ],
    ids=[
        "the first", "stable for ten minutes", "not quite stable", "the second within ten seconds", "doubled",
        "at most 300 s", "five in 600 s", "five starts that were never heard",
    ],
)  # fmt: skip
def test_backoff_and_budget(was: Life, recent: int, after_s: float | None, backoffs: int) -> None:
    """A-L-17, D-S10, D-S11."""
    planned = plan(was, Reason.STOPPED, recent, NOW)
    assert planned.due_at == (None if after_s is None else NOW + timedelta(seconds=after_s))
    assert planned.life.backoffs == backoffs


@pytest.mark.parametrize("reason", [Reason.CEILING, Reason.OPERATOR])
def test_an_order_waits_for_no_backoff_and_spends_no_budget(reason: Reason) -> None:
    assert plan(life(restarted_at=ago(1), backoffs=9, unheard=9), reason, 9, NOW).due_at == NOW


def test_a_looper_ends_given_up() -> None:
    """D-S10: it dies the moment it is up, for ever."""
    at, looper = NOW, life()
    starts: list[datetime] = []
    while (
        planned := plan(looper, Reason.STOPPED, sum(at - each < timedelta(seconds=600) for each in starts), at)
    ).due_at:
        starts.append(at := planned.due_at)
        looper = Life("w1", 1, 3, driver="process", restarted_at=at, backoffs=planned.life.backoffs)
        at += timedelta(seconds=1)
    assert len(starts) == BUDGET
    assert (starts[-1] - NOW).total_seconds() == 10 + 20 + 40 + 80


@pytest.mark.parametrize(("agents", "most"), [(1, 2), (8, 2), (12, 3), (20, 5), (60, 15)])
def test_the_cap_of_a_fleet(agents: int, most: int) -> None:
    """D-S15."""
    assert fleet_max(agents) == most


def test_a_failed_call_is_made_again_later_each_time() -> None:
    """D-S20."""
    assert [retry_s(tries) for tries in (1, 2, 3, 6, 99)] == [10, 20, 40, 300, 300]


ORDERS: list[tuple[str, Life | None, dict[str, Any], Ruling]] = [
    ("unknown", None, {}, Ruling.NOT_KILLABLE),
    ("external", Life("w1", 1, 3), {}, Ruling.NOT_KILLABLE),
    ("of a driver that may not act", life(), {"drivers": ()}, Ruling.NOT_KILLABLE),
    ("of an older life", life(), {"incarnation": 2}, Ruling.STALE),
    ("of an older life and late", life(), {"incarnation": 2, "expires_at": ago(1)}, Ruling.STALE),
    ("removed", life(removed=True), {}, Ruling.ALREADY_ENDED),
    ("killed before", life(), {"was_killed": True}, Ruling.ALREADY_ENDED),
    ("late", life(), {"expires_at": ago(1)}, Ruling.EXPIRED),
    ("just late", life(), {"expires_at": NOW}, Ruling.EXPIRED),
    ("during a restart", life(status=Status.OFFLINE), {"is_opened": True}, Ruling.JOIN),
    ("started and not heard yet", life(status=Status.RESTARTING), {}, Ruling.ALREADY_ENDED),
    ("of a life that only its order knows", life(status=Status.RESTARTING), {"incarnation": 4}, Ruling.KILL),
    ("of before its last start", life(restarted_at=ago(2)), {"ordered_at": ago(2.1)}, Ruling.STALE),
    ("of before its last start, late", life(restarted_at=NOW), {"expires_at": ago(1)}, Ruling.STALE),
    ("of before its last start, dead again", life(restarted_at=NOW), {"is_opened": True}, Ruling.STALE),
    ("of the moment of its last start", life(restarted_at=ago(2)), {"ordered_at": ago(2)}, Ruling.KILL),
    ("of after its last start", life(restarted_at=ago(2)), {"ordered_at": ago(1.9)}, Ruling.KILL),
    ("alive", life(), {}, Ruling.KILL),
    ("alive and paused", life(paused=True, status=Status.PAUSED), {}, Ruling.KILL),
]


@pytest.mark.parametrize(("was", "about", "ruling"), [row[1:] for row in ORDERS], ids=[row[0] for row in ORDERS])
def test_orders(was: Life | None, about: dict[str, Any], ruling: Ruling) -> None:
    plain: dict[str, Any] = {
        "incarnation": 3, "ordered_at": ago(1), "expires_at": NOW + timedelta(seconds=60), "is_opened": False,
        "was_killed": False, "drivers": ("process",), "now": NOW,
    }  # fmt: skip
    assert rule(was, **{**plain, **about}) is ruling
