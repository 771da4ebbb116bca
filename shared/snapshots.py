"""Snapshots travel in parts: here they become whole again."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from shared.facts import BacklogSnapshot

_PARTIAL_MAX = 8
"""Snapshots that are not complete yet; older ones never will be."""


@dataclass(slots=True)
class Assembly:
    """The parts that have come of each."""

    _partial: dict[UUID, dict[int, BacklogSnapshot]] = field(default_factory=dict)

    def add(self, fact: BacklogSnapshot) -> list[BacklogSnapshot] | None:
        """Take in a part; all of its snapshot's, if it was the last that was missing."""
        parts = self._partial.setdefault(fact.snapshot_id, {})
        parts[fact.part] = fact
        if len(parts) == fact.parts:
            return list(self._partial.pop(fact.snapshot_id).values())
        while len(self._partial) > _PARTIAL_MAX:
            del self._partial[next(iter(self._partial))]
        return None
