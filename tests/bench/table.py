"""One table for all figures: what was measured beside what is to be reached."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `goal` and `stretch` are the least (or with `at_most` the most) that is wanted."""

    figure: str
    what: str
    value: float
    unit: str
    goal: float | None = None
    stretch: float | None = None
    at_most: bool = False
    cpu_us: float | None = None
    """CPU of the measured process per operation."""
    note: str = ""

    @property
    def stands(self) -> Literal["", "stretch", "reached", "missed"]:
        if self.goal is None:
            return ""
        if self.stretch is not None and self._meets(self.stretch):
            return "stretch"
        return "reached" if self._meets(self.goal) else "missed"

    def _meets(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound


def machine() -> dict[str, object]:
    """The machine, as far as it says something about the figures."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernel": platform.release().split("-")[0],
        "load": round(os.getloadavg()[0], 1),
    }


def as_text(rows: Sequence[Row]) -> str:
    lines = [f"{'':4} {'':58} {'measured':>12} {'goal':>10} {'stretch':>9} {'CPU µs':>7}"]
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        goal = f"{sign} {_number(row.goal)}" if row.goal is not None else ""
        stretch = f"{sign} {_number(row.stretch)}" if row.stretch is not None else ""
        cpu = f"{row.cpu_us:.0f}" if row.cpu_us is not None else ""
        measured = f"{_number(row.value)} {row.unit}".strip()
        lines.append(
            f"{row.figure:4} {row.what:58} {measured:>12} {goal:>10} {stretch:>9} {cpu:>7}"
            f" {row.stands} {row.note}".rstrip()
        )
    return "\n".join([*lines, f"machine: {json.dumps(machine())}"])


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps({"machine": machine(), "rows": [asdict(row) | {"stands": row.stands} for row in rows]})


def as_markdown(rows: Sequence[Row]) -> str:
    lines = ["| figure | what | measured | goal | stretch | CPU µs each | stands |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        goal = f"{sign} {_number(row.goal)}" if row.goal is not None else ""
        stretch = f"{sign} {_number(row.stretch)}" if row.stretch is not None else ""
        cpu = f"{row.cpu_us:.0f}" if row.cpu_us is not None else ""
        lines.append(
            f"| {row.figure} | {row.what} | {_number(row.value)} {row.unit} | {goal} | {stretch} | {cpu} "
            f"| {row.stands} {row.note} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")


_MARKS = ("<!-- figures: written by `make bench ARGS=--write` -->", "<!-- end of figures -->")


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put the table between the marks of a Markdown file; what else stands there is ours to write."""
    begin, end = _MARKS
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    told = ", ".join(f"{name} {value}" for name, value in machine().items())
    path.write_text(f"{before}{begin}\n\n{as_markdown(rows)}\n\n{told}\n\n{end}{after}")
