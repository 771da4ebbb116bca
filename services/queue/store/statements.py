"""The statements of queue, and the numbers by which rows say a priority."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.database import load_queries
from shared.facts import Priority

SQL = load_queries(Path(__file__).parents[1] / "queries.sql")
PRIORITIES = {Priority.CRITICAL: 100, Priority.TASK: 50, Priority.INFO: 10}
PRIORITY_OF = {number: priority for priority, number in PRIORITIES.items()}


def columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
