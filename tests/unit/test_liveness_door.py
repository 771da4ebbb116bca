"""One door: whoever wants an agent dead goes through `restart/`, and nobody else calls a driver that acts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "services" / "liveness"
DOOR = SERVICE / "restart"
ACTS = {"restart", "kill"}


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """(receiver, method) of every call of a method."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr


def test_only_the_door_calls_a_driver_that_starts_or_ends_anything() -> None:
    """A-L-15."""
    outside = [path for path in SERVICE.rglob("*.py") if DOOR not in path.parents and "drivers" not in path.parts]
    wrong = [
        f"{path.name}: {receiver}.{method}"
        for path in outside
        for receiver, method in calls(path)
        if method in ACTS and "driver" in receiver
    ]
    assert outside
    assert not wrong
    assert {("driver", "restart"), ("driver", "kill")} <= set(calls(DOOR / "carry.py"))


def test_only_the_door_opens_a_restart() -> None:
    """A-L-15: all detectors go through one choke point."""
    for path in SERVICE.rglob("*.py"):
        if DOOR not in path.parents:
            assert "open_restart" not in path.read_text(encoding="utf-8"), path
            assert "lease_restart" not in path.read_text(encoding="utf-8"), path


def test_a_driver_asks_no_database_and_no_fact() -> None:
    for path in (SERVICE / "drivers").rglob("*.py"):
        names = {
            f"{node.module}.{each.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for each in node.names
        } - {"shared.database.backoff_s"}
        assert not {name for name in names if name.startswith(("shared.facts", "shared.database", "asyncpg"))}, path
