"""`make bench-fleet`: how well a day of a fleet is judged, by four rules in the same world.

Liveness's own code runs, as its `__main__` wires it: handlers, loops, judge, doubts, door, budgets. Under it are a
store in memory that is held to the contract of the real one (memory.py) and a clock that jumps (clock.py); only the
fleet and its engine are made up (script.py, world.py). What is not in it: Postgres, the bus, a second replica, and
deliveries, whose failures would show a crash sooner. The same seed gives the same day.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import structlog

from tests.bench.fleet import figures
from tests.bench.fleet.run import CONTENDERS, Lived, live
from tests.bench.fleet.script import DAY_S, Rates, draw_script
from tests.bench.table import machine

SEEDS = 3
SMOKE_S = 3600.0
_MARKS = ("<!-- fleet: written by `make bench-fleet ARGS=--write …` -->", "<!-- end of fleet -->")


def _live(contender: str, seed: int, agents: int, length_s: float, rates: Rates) -> Lived:
    return live(contender, draw_script(seed, agents=agents, length_s=length_s, rates=rates))


def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.fleet", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="an hour of 24 agents: whether it runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many days, each with a seed of its own")
    parser.add_argument("--agents", type=int, default=60)
    parser.add_argument("--hours", type=float, default=DAY_S / 3600)
    parser.add_argument("--write", type=Path, help="put the table into this Markdown file, between its marks")
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    arguments = parser.parse_args()
    agents, length_s, seeds = arguments.agents, arguments.hours * 3600, arguments.seeds
    if arguments.smoke:
        agents, length_s, seeds = 24, SMOKE_S, 1
    rates = Rates(outages=2 if length_s >= DAY_S / 2 else 1)
    began = time.monotonic()
    # The longest first, so that no core waits for the last.
    names = sorted(arguments.contenders, key=lambda name: not name.startswith("ours"))
    lived: dict[str, list[Lived]] = defaultdict(list)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, seeds * len(names)), initializer=_quiet) as pool:
        jobs = [
            pool.submit(_live, name, seed, agents, length_s, rates) for name in names for seed in range(1, seeds + 1)
        ]
        for job in jobs:
            one = job.result()
            lived[one.contender].append(one)
    ordered = [name for name in CONTENDERS if name in lived]
    made = figures.lines({name: lived[name] for name in ordered}, agents)
    told = f"{agents} agents, {length_s / 3600:g} h, {seeds} seeds, in {time.monotonic() - began:.0f} s"
    if arguments.write:
        _write(arguments.write, figures.as_markdown(made, ordered), told)
    print(
        json.dumps(figures.as_json(made, lived))
        if arguments.json
        else f"{figures.as_text(made, ordered)}\n{told}; machine: {json.dumps(machine())}"
    )
    return 0


def _write(path: Path, table: str, told: str) -> None:
    begin, end = _MARKS
    before, found, rest = path.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{path} has no line {begin}")
    _, _, after = rest.partition(end)
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    path.write_text(f"{before}{begin}\n\n{table}\n\n{told}; {about}\n\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
