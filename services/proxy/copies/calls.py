"""Directives that this replica has read off the queue which all share, and has still to bring to their agents.

One at a time per workspace. What waits is replaced by its own repeat; what is too much, or has waited so long that it
was said again, goes: another replica may have brought it meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from uuid import UUID

from services.proxy.metrics import CONTROL_CALLS
from shared.facts import SessionDirective

_WAITING_MAX = 10_000
_SAID_AGAIN_S = 10.0


@dataclass(slots=True)
class Calls:
    """The oldest first."""

    _waiting: OrderedDict[UUID, tuple[SessionDirective, float]] = field(default_factory=OrderedDict)
    _calling: set[str] = field(default_factory=set)
    """Workspaces whose agent is being called."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, fact: SessionDirective, now: float) -> None:
        self._waiting[fact.directive_id] = (fact, now)
        self._waiting.move_to_end(fact.directive_id)
        if len(self._waiting) > _WAITING_MAX:
            self._waiting.popitem(last=False)
            CONTROL_CALLS.labels("dropped").inc()

    def take(self, most: int, now: float) -> list[SessionDirective]:
        """What may be called now, each of another workspace; `done` lets the next of its workspace go."""
        while self._waiting and now - next(iter(self._waiting.values()))[1] > _SAID_AGAIN_S:
            self._waiting.popitem(last=False)
            CONTROL_CALLS.labels("dropped").inc()
        taken: list[SessionDirective] = []
        for fact, _ in self._waiting.values() if most > 0 else ():
            if fact.workspace_id not in self._calling:
                self._calling.add(fact.workspace_id)
                taken.append(fact)
                if len(taken) == most:
                    break
        for fact in taken:
            del self._waiting[fact.directive_id]
        return taken

    def done(self, workspace_id: str) -> None:
        self._calling.discard(workspace_id)
