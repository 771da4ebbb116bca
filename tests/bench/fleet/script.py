"""What befalls a fleet, drawn from a seed before anybody acts: every contender meets the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from services.liveness.decide.seen import Seen

QUIET_S = 600.0
"""Nothing befalls anybody before that: windows and histories are learnt."""
FLAKE_S = (2.0, 15.0)
STALL_S = (60.0, 120.0)
WEDGE_S = 1800.0
"""A wedge that nobody ends: its owner notices after half an hour."""
CADENCE_S = 30.0
JITTER_S = 3.0
BROKER_S = 300.0
DAY_S = 86_400.0
_CLEAR_S = 300.0
"""Crashes keep so far from outages of the engine: what is found then would say nothing about looking."""
_ERRORS = 0.5
"""The share of flakes that are transport errors; the others say STOPPED or NOT_FOUND."""


@dataclass(frozen=True, slots=True)
class Span:
    begin_s: float
    end_s: float
    seen: Seen = Seen.UNKNOWN
    """What a flake says."""

    def holds(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


@dataclass(frozen=True, slots=True)
class Rates:
    """How often things befall one agent in a day."""

    flakes: float = 6.0
    stalls: float = 2.0
    crashes: float = 2.0
    wedges: float = 0.25
    outages: int = 2
    """Of the broker, five minutes each; as many of the engine with nobody dead, and one in which all die."""


@dataclass(frozen=True, slots=True)
class Script:
    seed: int
    agents: int
    length_s: float
    flakes: Sequence[Sequence[Span]]
    """By agent, as are stalls; in order."""
    stalls: Sequence[Sequence[Span]]
    crashes: Sequence[tuple[float, int]]
    wedges: Sequence[tuple[float, int]]
    broker: Sequence[Span]
    engine: Sequence[Span]
    """It answers nobody."""
    deaths: Sequence[Span] = field(default=())
    """Those outages of the engine in which all of its agents die at once."""
    looper: int = 0
    loops_from_s: float = 0.0

    @property
    def agent_days(self) -> float:
        return self.agents * self.length_s / DAY_S

    def boot_of(self, agent: int, start: int) -> Boot:
        return boot_of(self.seed, agent, start)


@dataclass(frozen=True, slots=True)
class Boot:
    """One start of one agent: `made_s` the engine makes its container, `took_s` later it speaks."""

    made_s: float
    took_s: float
    flake: Span | None
    """Counted from its start."""


def boot_of(seed: int, agent: int, start: int) -> Boot:
    """Draw a start: most take 5 to 20 s, some a minute, a few nearly two; in a third of them a look goes wrong."""
    draw = Random(f"boot {seed} {agent} {start}")
    took_s = draw.choices((draw.uniform(5, 20), draw.uniform(20, 60), draw.uniform(60, 110)), (0.8, 0.15, 0.05))[0]
    flake = None
    if draw.random() < 1 / 3:
        begin_s = draw.uniform(0, took_s)
        flake = Span(begin_s, begin_s + draw.uniform(*FLAKE_S), draw.choice((Seen.STOPPED, Seen.NOT_FOUND)))
    return Boot(draw.uniform(0.3, 2.0), took_s, flake)


def draw_script(seed: int, *, agents: int = 60, length_s: float = DAY_S, rates: Rates | None = None) -> Script:
    rates = rates or Rates()
    draw = Random(f"fleet {seed}")
    days = length_s / DAY_S
    outages = _outages(draw, length_s, rates.outages)
    broker, engine = outages[: rates.outages], outages[rates.outages :]
    flakes = [_spans(draw, length_s, rates.flakes * days, FLAKE_S) for _ in range(agents)]
    for span in broker:
        # What a broker's outage is dangerous for: a look that goes wrong while nobody is heard, or has just not been.
        for agent in draw.sample(range(agents), max(1, agents // 4)):
            begin_s = draw.uniform(span.begin_s, span.end_s + CADENCE_S)
            flakes[agent].append(Span(begin_s, begin_s + draw.uniform(*FLAKE_S), _says(draw)))
    looper = draw.randrange(agents)
    loops_from_s = draw.uniform(QUIET_S, QUIET_S + length_s / 8)
    crashes = [
        (at_s, agent)
        for agent in range(agents)
        for at_s in _moments(draw, length_s, rates.crashes * days)
        if all(not span.begin_s - _CLEAR_S <= at_s <= span.end_s + _CLEAR_S for span in engine)
        and (agent != looper or at_s < loops_from_s)
    ]
    return Script(
        seed=seed,
        agents=agents,
        length_s=length_s,
        flakes=[sorted(each, key=lambda span: span.begin_s) for each in flakes],
        stalls=[_spans(draw, length_s, rates.stalls * days, STALL_S) for _ in range(agents)],
        crashes=sorted(crashes),
        wedges=sorted(
            (at_s, agent) for agent in range(agents) for at_s in _moments(draw, length_s, rates.wedges * days)
        ),
        broker=broker,
        engine=engine,
        deaths=engine[-1:],
        looper=looper,
        loops_from_s=loops_from_s,
    )


def _outages(draw: Random, length_s: float, each: int) -> list[Span]:
    """Outages of the broker, then of the engine, far apart from each other: each in a slot of its own."""
    count = 2 * each + 1
    slot_s = (length_s - QUIET_S) / count
    order = draw.sample(range(count), count)
    spans = []
    for number, slot in enumerate(order):
        took_s = BROKER_S if number < each else draw.uniform(45, 300)
        begin_s = QUIET_S + slot * slot_s + draw.uniform(0, max(0.0, slot_s - took_s - 2 * _CLEAR_S))
        spans.append(Span(begin_s, begin_s + took_s))
    return spans


def _moments(draw: Random, length_s: float, mean: float) -> list[float]:
    """A Poisson process."""
    moments, at_s = [], QUIET_S
    if mean <= 0:
        return []
    while (at_s := at_s + draw.expovariate(mean / length_s)) < length_s - _CLEAR_S:
        moments.append(at_s)
    return moments


def _spans(draw: Random, length_s: float, mean: float, took_s: tuple[float, float]) -> list[Span]:
    return [Span(at_s, at_s + draw.uniform(*took_s), _says(draw)) for at_s in _moments(draw, length_s, mean)]


def _says(draw: Random) -> Seen:
    return Seen.UNKNOWN if draw.random() < _ERRORS else draw.choice((Seen.STOPPED, Seen.NOT_FOUND))
