"""What waits and runs in each workspace, as the queue service last said.

A change replaces a workspace's view, a complete snapshot all of them: who is in none of its parts has nothing waiting
and nothing running. The age counts from when it was true (`occurred_at`), not from when it was heard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shared.facts import Backlog, BacklogSnapshot, Priority, Running, WorkspaceBacklog
from shared.snapshots import Assembly

GAP_S = 10.0
"""Snapshots come every 5 s: after so long without one the queue service, or the broker, was away."""


@dataclass(frozen=True, slots=True)
class View:
    """One workspace, at the moment `at`."""

    rev: int = 0
    at: float = 0.0
    waiting: int = 0
    gate_until: float | None = None
    """Until when no forward may begin, whatever else is heard."""
    gate_generation: int = 0
    """The youngest closing that was heard of."""
    not_before: float | None = None
    running: tuple[Running, ...] = ()
    by_priority: Mapping[Priority, int] = field(default_factory=dict)
    oldest_at: float | None = None
    turn_s: float | None = None

    def is_shut(self, now: float) -> bool:
        """Whether the gate is closed: also where nothing has been heard for long, until the moment that was said."""
        return self.gate_until is not None and self.gate_until > now


NOTHING = View()


@dataclass(slots=True)
class Backlogs:
    """Every workspace that ever had a backlog."""

    snapshot_at: float | None = None
    """Of the last complete snapshot; None: there never was one, so nothing is known."""
    unbroken_since: float = 0.0
    """Of the first snapshot after the last gap: what was kept before it may be read only now."""
    closings: set[str] = field(default_factory=set)
    """Workspaces of whose gate a new closing was heard, and not told yet that it was."""
    _views: dict[str, View] = field(default_factory=dict)
    _assembly: Assembly = field(default_factory=Assembly)

    def view(self, workspace_id: str) -> View:
        return self._views.get(workspace_id, NOTHING)

    def copied_at(self, workspace_id: str) -> float | None:
        """When what is known of this workspace was true."""
        if self.snapshot_at is None:
            return None
        return max(self.snapshot_at, self.view(workspace_id).at)

    def hear(self, fact: WorkspaceBacklog) -> bool:
        """Apply a change; say whether it was news."""
        return self._apply(fact.workspace_id, fact, rev=fact.rev, at=fact.occurred_at.timestamp())

    def hear_part(self, fact: BacklogSnapshot) -> list[str] | None:
        """Apply a snapshot once it is complete: the workspaces that it changed. None: parts are missing."""
        parts = self._assembly.add(fact)
        return self._apply_snapshot(parts) if parts is not None else None

    def _apply_snapshot(self, parts: Sequence[BacklogSnapshot]) -> list[str]:
        at = min(part.occurred_at.timestamp() for part in parts)
        named = {each.workspace_id: each for part in parts for each in part.backlogs}
        changed = [name for name, each in named.items() if self._apply(name, each, rev=each.rev, at=at)]
        for name, view in self._views.items():
            if name not in named and view.at < at and _says_something(view):
                # Its rev stays, so that a late change from before the snapshot is still old. So does the gate, which
                # others go by: a snapshot may have been read just before the closing that we have told of.
                self._views[name] = View(
                    rev=view.rev,
                    at=at,
                    gate_until=view.gate_until,
                    gate_generation=view.gate_generation,
                    turn_s=view.turn_s,
                )
                changed.append(name)
        if self.snapshot_at is not None and at - self.snapshot_at > GAP_S:
            self.unbroken_since = at
        self.snapshot_at = max(at, self.snapshot_at or at)
        return changed

    def _apply(self, workspace_id: str, said: Backlog, *, rev: int, at: float) -> bool:
        known = self._views.get(workspace_id)
        if known is not None and rev <= known.rev:
            if rev == known.rev and at > known.at:
                self._views[workspace_id] = replace(known, at=at)
            return False
        if said.gate_until is not None and said.gate_generation > (known.gate_generation if known else 0):
            self.closings.add(workspace_id)
        self._views[workspace_id] = View(
            rev=rev,
            at=at,
            waiting=said.waiting,
            gate_until=said.gate_until.timestamp() if said.gate_until else None,
            gate_generation=said.gate_generation,
            not_before=said.not_before.timestamp() if said.not_before else None,
            running=tuple(said.running),
            by_priority=said.waiting_by_priority,
            oldest_at=said.oldest_at.timestamp() if said.oldest_at else None,
            turn_s=said.turn_s,
        )
        return True


def _says_something(view: View) -> bool:
    return bool(view.waiting or view.running or view.not_before)
