"""Directives that this replica has read off the queue which all share, and has still to bring to their agents.

One at a time per workspace. What waits is replaced by its own repeat; what is too much goes, for it is said again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from uuid import UUID

from services.proxy.metrics import CONTROL_CALLS
from shared.facts import SessionDirective

_WAITING_MAX = 10_000


@dataclass(slots=True)
class Calls:
    """The oldest first."""

    _waiting: OrderedDict[UUID, SessionDirective] = field(default_factory=OrderedDict)
    _calling: set[str] = field(default_factory=set)
    """Workspaces whose agent is being called."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, fact: SessionDirective) -> None:
        self._waiting[fact.directive_id] = fact
        if len(self._waiting) > _WAITING_MAX:
            self._waiting.popitem(last=False)
            CONTROL_CALLS.labels("dropped").inc()

    def take(self, most: int) -> list[SessionDirective]:
        """What may be called now, each of another workspace; `done` lets the next of its workspace go."""
        taken: list[SessionDirective] = []
        for fact in list(self._waiting.values()):
            if len(taken) >= most:
                break
            if fact.workspace_id not in self._calling:
                self._calling.add(fact.workspace_id)
                taken.append(fact)
                del self._waiting[fact.directive_id]
        return taken

    def done(self, workspace_id: str) -> None:
        self._calling.discard(workspace_id)
