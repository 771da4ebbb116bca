"""How sessions end, as a model that is searched through: whatever is late, twice, lost, overtaken, or stops midway.

What it is made of, and how it is kept finite, is in session_model_kit.py. Left out of it:
- foreign work, which no gate can keep from beginning, and containers that nobody can end;
- a proxy that is cut off from the broker for so long that it no longer counts (the variant without
  `every_proxy_is_counted` is what that costs);
- wrong ends: an item that is given up as abandoned, or a forward that no snapshot names any more, while it still runs;
- a ceiling that is raised while a kill is on its way, and how long anything takes.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import pytest

from tests.unit.search_kit import Reached, search, traps
from tests.unit.session_model_kit import steps
from tests.unit.session_state_kit import (
    CHECKPOINT_SENT,
    ENDED,
    KILL_ORDERED,
    LAST_STOPPED,
    RUNNING,
    SESSIONS,
    STOP_SENT,
    TWO_STOPPED,
    Protocol,
    State,
    bit,
    members,
)

PROTOCOL = Protocol()
TIME = bit(0)

UNKNOWN = "a kill hit a session that the gate did not know of"
VARIANTS = {
    "a_stop_names_its_session": (State(), "a stop ended another session"),
    "a_kill_names_its_life": (State(), "a second life was ended for one session"),
    "a_kill_expires": (State(), UNKNOWN),
    "rows_compare_and_set": (State(), UNKNOWN),
    "siblings_are_asked": (State(), "a kill hit a session below its ceiling"),
    "the_gate_closes": (State(), UNKNOWN),
    "the_gate_waits_for_proxies": (State(), UNKNOWN),
    "every_proxy_is_counted": (State(), UNKNOWN),
    "live_forwards_are_listed": (State(), UNKNOWN),
    "a_proxys_word_names_its_closing": (TWO_STOPPED, UNKNOWN),
    "a_gates_word_names_its_session": (TWO_STOPPED, UNKNOWN),
    "the_gate_outlasts_the_order": (State(), UNKNOWN),
    "the_gate_is_never_shortened": (TWO_STOPPED, UNKNOWN),
}
"""Without which protection, from where on, what happens."""
VARIANTS_THAT_STOP_SHORT = ("a_void_order_is_renewed", "a_void_order_ends_nothing")


@pytest.fixture(scope="module")
def everything() -> Reached:
    """What the protocol reaches, from the beginning."""
    return search(State(), partial(steps, PROTOCOL))


def without(protection: str) -> Protocol:
    return replace(PROTOCOL, **{protection: False})


def is_gone(session: int, state: State) -> bool:
    """Whether it has not begun, or is over and its row knows."""
    if session > len(state.rows):
        return True
    return not state.alive & bit(session) and state.rows[session - 1] not in {STOP_SENT, KILL_ORDERED}


def is_open(state: State) -> bool:
    return not state.until


def test_no_order_that_is_late_repeated_or_overtaken_hits_another_session(
    everything: Reached, capsys: pytest.CaptureFixture[str]
) -> None:
    """C-K2, C-K4, C-K5, C-K6."""
    with capsys.disabled():
        print(f"\n{len(everything.states)} states, {len(everything.tos)} steps, {everything.seconds:.1f} s")
    assert not everything.breaks, everything.trace


def test_it_is_searched_with_an_end_in_each_state_of_a_session_and_others_after_it(everything: Reached) -> None:
    """C-K2: each end is also one while the next session runs, which the order for the first must not touch."""
    alive = {state.rows[session - 1] for state in everything.states for session in members(state.alive)}
    assert alive == {RUNNING, CHECKPOINT_SENT, STOP_SENT, KILL_ORDERED}
    before = {state.rows[0] for state in everything.states if state.alive == bit(2)}
    assert before == {CHECKPOINT_SENT, STOP_SENT, KILL_ORDERED, ENDED}


def test_a_session_that_ignores_everything_can_always_still_be_ended(everything: Reached) -> None:
    for session in range(1, SESSIONS + 1):
        stuck = traps(everything, without=bit(session), goal=partial(is_gone, session))
        assert not stuck, everything.way_to(stuck[0])


def test_the_gate_can_always_be_opened_by_those_in_it(everything: Reached) -> None:
    stuck = traps(everything, without=TIME, goal=is_open)
    assert not stuck, everything.way_to(stuck[0])


def test_each_protection_is_taken_away_in_a_variant() -> None:
    assert {*VARIANTS, *VARIANTS_THAT_STOP_SHORT} == {each.name for each in fields(Protocol)}


def test_where_some_variants_begin_is_reached_by_the_protocol(everything: Reached) -> None:
    assert len(everything.way_to(everything.numbers[TWO_STOPPED])) == 4


@pytest.mark.parametrize("protection", VARIANTS)
def test_without_one_protection_an_order_hits_what_it_is_not_for(
    protection: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """C-K4; without compare-and-set C-K5, without a gate C-K6, without one for as long as an order lives C-K2."""
    start, breaks = VARIANTS[protection]
    found = search(start, partial(steps, without(protection)))
    with capsys.disabled():
        print(f"\nwithout {protection}: {len(found.states)} states, {len(found.trace)} steps: {'; '.join(found.trace)}")
    assert found.breaks == breaks


@pytest.mark.parametrize("protection", VARIANTS_THAT_STOP_SHORT)
def test_where_nothing_follows_a_void_order_a_session_may_run_for_ever(
    protection: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill that comes too late must be ordered again."""
    found = search(LAST_STOPPED, partial(steps, without(protection)))
    stuck = traps(found, without=bit(SESSIONS), goal=partial(is_gone, SESSIONS))
    with capsys.disabled():
        print(f"\nwithout {protection}: {len(stuck)} traps, {'; '.join(found.way_to(stuck[0]))}")
    assert stuck
