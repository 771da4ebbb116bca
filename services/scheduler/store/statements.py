"""The statements, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.database import load_queries

SQL = load_queries(Path(__file__).parents[1] / "queries.sql")


def turned(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """Columns of rows, as `unnest` takes them; there is at least one row."""
    return [list(column) for column in zip(*rows, strict=True)]
