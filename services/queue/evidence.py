"""What deliveries say about the lives of agents, for liveness: trouble each time, that one answers now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.queue.deliver import Ending
from shared.facts import EvidenceKind, WorkspaceEvidence

_OF_LIFE = frozenset({EvidenceKind.ANSWERED, EvidenceKind.BUSY})
LIFE_EVERY_S = 5.0
_REMEMBERED_MAX = 10_000


@dataclass(slots=True)
class Evidence:
    """Of the deliveries of one replica."""

    clock: Callable[[], float] = time.monotonic
    _told: dict[tuple[str, EvidenceKind], float] = field(default_factory=dict)

    def of(self, ending: Ending) -> WorkspaceEvidence | None:
        """The fact that this ending is; None: it says nothing, or nothing new."""
        kind, item = ending.evidence, ending.item
        if kind is None or (kind in _OF_LIFE and not self._is_news((item.workspace_id, kind))):
            return None
        rev = time.time_ns() // 1000
        return WorkspaceEvidence(workspace_id=item.workspace_id, rev=rev, incarnation=item.incarnation, kind=kind)

    def _is_news(self, key: tuple[str, EvidenceKind]) -> bool:
        now = self.clock()
        if now - self._told.get(key, float("-inf")) < LIFE_EVERY_S:
            return False
        if len(self._told) >= _REMEMBERED_MAX:
            self._told = {name: at for name, at in self._told.items() if now - at < LIFE_EVERY_S}
        self._told[key] = now
        return True
