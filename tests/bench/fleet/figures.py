"""The figures of a fleet: what each contender did, side by side, and what ours is to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.bench.fleet.run import Lived
from tests.bench.fleet.script import WEDGE_S
from tests.bench.fleet.world import Tally
from tests.bench.table import machine

FALSE_MAX = 0.15
TIMES_BELOW = 8.0
PROBES_P95_S = 25.0
EVENTS_P95_S = 2.0
RECOVERED_S = 120.0
OURS = ("ours", "ours+events")
TITLES = {
    "naive": "naive",
    "original": "2 of N, 15 s",
    "phi": "phi accrual, 8",
    "ours": "ours",
    "ours+events": "ours + events",
}

Lives: TypeAlias = Sequence[Lived]
Cell: TypeAlias = float | str | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `holds` says whether a value of ours is what was wanted; None: it has no goal."""

    what: str
    of: Callable[[Lives], Cell]
    goal: str = ""
    holds: Callable[[Any], bool] | None = None
    holders: Sequence[str] = OURS
    """Whose values the goal is about."""


@dataclass(frozen=True, slots=True)
class Line:
    what: str
    values: Mapping[str, Cell]
    goal: str
    stands: str


def fleet_max(agents: int) -> int:
    """The cap, as the policy has it: stated here once more, so that it is held against something."""
    return max(2, agents // 4)


def lines(lived: Mapping[str, Lives], agents: int) -> list[Line]:
    made = [_line(figure, lived) for figure in _figures(agents)]
    if "original" in lived:
        falses = {name: _per_day(_false)(lives) for name, lives in lived.items()}
        below = {name: falses["original"] / falses[name] if falses[name] else float("inf") for name in falses}
        values = {name: ("none" if below[name] == float("inf") else below[name]) for name in below}
        held = [below[name] >= TIMES_BELOW for name in OURS if name in below]
        stands = ("reached" if all(held) else "missed") if held else ""
        line = Line("… times fewer than 2 of N", values, f"≥ {TIMES_BELOW:.0f}", stands)
        made.insert(1, line)
    return made


def _line(figure: Figure, lived: Mapping[str, Lives]) -> Line:
    values = {name: figure.of(lives) for name, lives in lived.items()}
    stands = ""
    if figure.holds is not None:
        held = [figure.holds(values[name]) for name in figure.holders if name in values and values[name] is not None]
        stands = ("reached" if all(held) else "missed") if held else ""
    return Line(figure.what, values, figure.goal, stands)


def _figures(agents: int) -> list[Figure]:
    def none(value: float) -> bool:
        return value == 0

    return [
        Figure(
            "false restarts per agent-day", _per_day(_false), f"≤ {FALSE_MAX}", lambda value: value <= FALSE_MAX
        ),
        Figure("restarts of agents that boot", _total(lambda tally: tally.in_boot), "0", none),
        Figure("restarts by outages of the broker", _total(lambda tally: tally.in_broker), "0", none),
        Figure("restarts by outages of the engine", _total(lambda tally: tally.in_engine), "0", none),
        Figure("crash → declared dead: p50, s", lambda lives: percentile(_detected(lives), 0.5)),
        Figure(
            "crash → declared dead: p95, s, by looks", lambda lives: percentile(_detected(lives), 0.95),
            f"≤ {PROBES_P95_S:.0f}", lambda value: value <= PROBES_P95_S, ("ours",),
        ),
        Figure(
            "… p95, s, where the engine tells of exits",
            lambda lives: percentile(_detected(lives), 0.95) if lives[0].contender.endswith("events") else None,
            f"≤ {EVENTS_P95_S:.0f}", lambda value: value <= EVENTS_P95_S, ("ours+events",),
        ),
        Figure("crashes never found", _total(lambda tally: len(tally.crashes), less=lambda one: len(one.detected_s))),
        Figure("wedge → declared: p50, s", lambda lives: percentile(_wedges(lives), 0.5)),
        Figure(
            "the engine died: all run again, s, worst", lambda lives: _worst(lives, lambda tally: tally.restarted_s),
            f"≤ {RECOVERED_S:.0f}", lambda value: value <= RECOVERED_S,
        ),
        Figure("… and all have booted, s, worst", lambda lives: _worst(lives, lambda tally: tally.recovered_s)),
        Figure(
            "most restarting at once", lambda lives: max(one.tally.most_at_once for one in lives),
            f"≤ {fleet_max(agents)}", lambda value: value <= fleet_max(agents),
        ),
        Figure(
            "restarts of one that dies at each start", _total(lambda tally: tally.looper),
        ),
        Figure(
            "… and what became of it", lambda lives: ", ".join(sorted({one.looper_status for one in lives})), "gave_up",
            lambda value: value == "gave_up",
        ),
        Figure("lists of the engine per hour", _per_hour(lambda one: one.tally.lists)),
        Figure("looks per agent-hour", lambda lives: _per_hour(lambda one: one.tally.looks)(lives) / agents),
        Figure("transactions per agent-hour", _statements(agents, "commit")),
        Figure("CPU of a simulated day, s", lambda lives: sum(one.cpu_s for one in lives) / _days(lives, agents)),
    ]  # fmt: skip


def _false(tally: Tally) -> int:
    return tally.false


def _per_day(of: Callable[[Tally], int]) -> Callable[[Lives], float]:
    return lambda lives: sum(of(one.tally) for one in lives) / sum(one.agent_days for one in lives)


def _total(of: Callable[[Tally], int], *, less: Callable[[Lived], int] = lambda _: 0) -> Callable[[Lives], float]:
    return lambda lives: float(sum(of(one.tally) - less(one) for one in lives))


def _per_hour(of: Callable[[Lived], int]) -> Callable[[Lives], float]:
    return lambda lives: sum(of(one) for one in lives) / sum(one.hours for one in lives)


def _statements(agents: int, name: str) -> Callable[[Lives], Cell]:
    def of(lives: Lives) -> Cell:
        if not lives[0].statements:
            return None
        return _per_hour(lambda one: one.statements[name])(lives) / agents

    return of


def _days(lives: Lives, agents: int) -> float:
    return sum(one.agent_days for one in lives) / agents


def _detected(lives: Lives) -> list[float]:
    return sorted(each for one in lives for each in one.detected_s)


def _wedges(lives: Lives) -> list[float]:
    """Those that were found while they lasted."""
    return sorted(each for one in lives for each in one.wedges_s if each <= WEDGE_S)


def _worst(lives: Lives, of: Callable[[Tally], Sequence[float]]) -> Cell:
    """None: there was no such death. One that was never got over is infinitely bad."""
    found = [each for one in lives for each in of(one.tally)]
    deaths = sum(one.deaths for one in lives)
    if not deaths:
        return None
    return max(found) if len(found) == deaths else float("inf")


def percentile(ordered: Sequence[float], share: float) -> Cell:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def as_text(made: Sequence[Line], names: Sequence[str]) -> str:
    head = f"{'':44}" + "".join(f"{TITLES[name]:>15}" for name in names) + f"{'goal':>10}"
    body = [
        f"{line.what:44}" + "".join(f"{_shown(line.values[name]):>15}" for name in names)
        + f"{line.goal:>10} {line.stands}".rstrip()
        for line in made
    ]  # fmt: skip
    return "\n".join([head, *body])


def as_markdown(made: Sequence[Line], names: Sequence[str]) -> str:
    head = ["| | " + " | ".join(TITLES[name] for name in names) + " | goal | stands |", "|---" * (len(names) + 3) + "|"]
    body = [
        "| " + " | ".join([line.what, *(_shown(line.values[name]) for name in names), line.goal, line.stands]) + " |"
        for line in made
    ]
    return "\n".join([*head, *body])


def as_json(made: Sequence[Line], lived: Mapping[str, Lives]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "rows": [
            {"what": line.what, "values": dict(line.values), "goal": line.goal, "stands": line.stands} for line in made
        ],
        "statements": {name: _sum(lives) for name, lives in lived.items() if lives[0].statements},
    }


def _sum(lives: Lives) -> dict[str, int]:
    names = sorted({name for one in lives for name in one.statements})
    return {name: sum(one.statements.get(name, 0) for one in lives) for name in names}


def _shown(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if value == float("inf"):
        return "never"
    if value == int(value):
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"
