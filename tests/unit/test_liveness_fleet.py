"""Two hours of a small fleet, by liveness's own code on a clock that jumps: the goals that noise does not move.

The whole day, and those to compare with: `make bench-fleet`. The hours are dense: an agent meets
eight times as many flakes and crashes as it does there.
"""

from __future__ import annotations

import functools

import pytest

from services.liveness.decide.judge import MEMORY_S, SPREAD_S
from tests.bench.fleet import figures
from tests.bench.fleet.contenders import PHI_8, phi
from tests.bench.fleet.run import Lived, delays, live
from tests.bench.fleet.script import FLAKE_S, Rates, draw_script

AGENTS = 24
SCRIPT = draw_script(
    7, agents=AGENTS, length_s=7200, rates=Rates(flakes=48.0, stalls=4.0, crashes=16.0, wedges=2.0, outages=1)
)


@functools.cache
def lived(contender: str) -> Lived:
    return live(contender, SCRIPT)


@pytest.fixture(params=figures.OURS)
def ours(request: pytest.FixtureRequest) -> Lived:
    return lived(request.param)


def test_an_agent_that_boots_and_one_that_nobody_can_hear_are_left_alone(ours: Lived) -> None:
    """D-S1, D-S9: nor is anybody restarted by an engine that does not answer (A-L-01, D-S14)."""
    assert (ours.tally.in_boot, ours.tally.in_broker, ours.tally.in_engine) == (0, 0, 0)
    assert lived("phi").tally.in_broker >= AGENTS / 2, "it is dangerous"


def test_flakes_and_stalls_restart_hardly_anybody(ours: Lived) -> None:
    """D-S4, D-S5."""
    assert ours.tally.false <= 8 * figures.FALSE_MAX * ours.agent_days
    assert lived("original").tally.false >= figures.TIMES_BELOW * max(1, ours.tally.false)


def test_every_crash_is_found_in_time(ours: Lived) -> None:
    """D-S6."""
    assert len(ours.detected_s) == len(ours.tally.crashes) >= 10
    p95_s = figures.percentile(ours.detected_s, 0.95)
    assert isinstance(p95_s, float)
    goal_s = figures.EVENTS_P95_S if ours.contender == "ours+events" else figures.PROBES_P95_S
    assert p95_s <= goal_s


def test_an_engine_that_died_has_all_of_its_agents_back_and_never_too_many_at_once(ours: Lived) -> None:
    """D-S15."""
    assert len(ours.tally.recovered_s) == 1
    assert ours.tally.restarted_s[0] <= figures.RECOVERED_S
    assert ours.tally.most_at_once <= figures.fleet_max(AGENTS)


def test_one_that_dies_at_each_start_is_given_up(ours: Lived) -> None:
    """A-L-17, D-S10."""
    assert (ours.looper_status, ours.tally.looper) == ("gave_up", 5)


def test_the_same_seed_is_the_same_day() -> None:
    script = draw_script(3, agents=6, length_s=3600, rates=Rates(flakes=48.0, outages=1))
    assert live("ours", script).tally == live("ours", script).tally


def test_no_flake_is_long_enough_to_be_seen_twice() -> None:
    assert FLAKE_S[1] <= SPREAD_S < MEMORY_S


def test_phi_is_eight_where_it_is_said_to_be() -> None:
    assert phi(PHI_8) == pytest.approx(8)
    assert phi(PHI_8 - 0.1) < 8 < phi(PHI_8 + 0.1)
    assert phi(0.0) == pytest.approx(0.301, abs=1e-3)
    assert phi(-3.0) < 0.01


def test_a_delay_is_until_the_next_verdict_on_the_same_agent() -> None:
    declared = [(12.0, "a"), (40.0, "a"), (30.0, "b")]
    assert delays([(10.0, "a"), (20.0, "a"), (31.0, "b")], declared) == [2.0, 20.0]
