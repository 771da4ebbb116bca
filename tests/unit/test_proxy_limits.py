"""How often a caller may do something. Time is passed in; boundaries come in threes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.proxy.copies.limits import Limit

LEAD, OTHER = b"l" * 32, b"o" * 32
NOW = 500_000.0


def spent(limit: Limit, times: int, now: float = NOW) -> Limit:
    for _ in range(times):
        assert limit.take(LEAD, now) == 0
    return limit


@pytest.mark.parametrize(("per_s", "burst"), [(200.0, 2000), (1 / 3, 10), (10 / 60, 10), (7.0, 1), (1e4, 5)])
def test_the_burst_is_whole_and_no_more(per_s: float, burst: int) -> None:
    limit = spent(Limit(per_s, burst), burst)
    assert limit.take(LEAD, NOW) == pytest.approx(1 / per_s, rel=0.01, abs=1e-6)


@pytest.mark.parametrize(("early_s", "allowed"), [(0.01, False), (0.0, True), (-0.01, True)])
def test_whoever_waits_as_long_as_told_is_let_in(early_s: float, *, allowed: bool) -> None:
    limit = spent(Limit(10 / 60, 10), 10)
    wait_s = limit.take(LEAD, NOW)
    assert (limit.take(LEAD, NOW + wait_s - early_s) == 0) is allowed


def test_what_is_refused_costs_nothing() -> None:
    limit = spent(Limit(1.0, 2), 2)
    waits = [limit.take(LEAD, NOW) for _ in range(50)]
    assert len(set(waits)) == 1


def test_one_caller_s_bucket_is_not_another_s() -> None:
    limit = spent(Limit(1.0, 3), 3)
    assert limit.take(LEAD, NOW) > 0
    assert limit.take(OTHER, NOW) == 0


def test_looking_spends_nothing() -> None:
    limit = spent(Limit(1.0, 3), 2)
    assert [limit.wait_s(LEAD, NOW) for _ in range(5)] == [0.0] * 5
    assert limit.take(LEAD, NOW) == 0
    assert limit.wait_s(LEAD, NOW) > 0


def test_zero_is_no_limit_and_remembers_nobody() -> None:
    limit = spent(Limit(0.0, 1), 5000)
    assert limit.wait_s(LEAD, NOW) == 0
    assert not limit._full_at


def test_a_full_bucket_is_forgotten() -> None:
    limit = spent(Limit(1.0, 5), 5)
    limit.take(OTHER, NOW + 4.9)
    assert set(limit._full_at) == {LEAD, OTHER}
    limit.take(OTHER, NOW + 5.0)
    assert set(limit._full_at) == {OTHER}


def test_memory_has_an_end_whatever_names_come() -> None:
    limit = Limit(0.001, 1, remembered_max=100)
    for number in range(10_000):
        limit.take(number.to_bytes(32), NOW)
        assert len(limit._full_at) <= 100
    assert limit.take((9_999).to_bytes(32), NOW) > 0, "who came last is remembered"


@given(
    st.floats(0.1, 1000),
    st.integers(1, 50),
    st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_nobody_gets_more_than_the_burst_and_the_rate(per_s: float, burst: int, gaps: list[float]) -> None:
    limit, now, taken = Limit(per_s, burst), NOW, 0
    for gap in gaps:
        now += gap
        taken += limit.take(LEAD, now) == 0
        assert taken <= burst + (now - NOW) * per_s + 0.01


def test_what_was_not_done_after_all_is_given_back_once() -> None:
    limit = spent(Limit(1.0, 3), 3)
    limit.give_back(LEAD)
    limit.give_back(OTHER)
    assert limit.take(LEAD, NOW) == 0
    assert limit.take(LEAD, NOW) > 0
    spent(limit, 3, NOW + 100)
    limit.give_back(LEAD)
    limit = spent(limit, 1, NOW + 100)
    assert limit.take(LEAD, NOW + 100) > 0
