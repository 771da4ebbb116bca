"""The registry as this replica knows it: every workspace by id and by token.

Facts carry neither tokens nor cards, so a workspace that a fact speaks of is also read again (`unread`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.proxy.decide import DOWN, Workspace
from shared.facts import WorkspaceRegistered, WorkspaceRemoved, WorkspaceStatus


@dataclass(frozen=True, slots=True)
class Death:
    """A life that was declared dead, and when this replica heard it first (`time.monotonic()`)."""

    incarnation: int
    at: float


@dataclass(slots=True)
class Registry:
    """Apply only what is newer; forget nothing, for a removed workspace must stay removed."""

    unread: set[str] = field(default_factory=set)
    """Workspaces whose row has changed since it was read."""
    _rows: dict[str, Workspace] = field(default_factory=dict)
    _by_token: dict[bytes, str] = field(default_factory=dict)
    _statuses: dict[str, WorkspaceStatus] = field(default_factory=dict)
    _deaths: dict[str, Death] = field(default_factory=dict)

    def find(self, workspace_id: str) -> Workspace | None:
        return self._rows.get(workspace_id)

    def find_token(self, digest: bytes) -> Workspace | None:
        found = self._by_token.get(digest)
        return self._rows[found] if found is not None else None

    def all(self) -> list[Workspace]:
        return sorted(self._rows.values(), key=lambda workspace: workspace.workspace_id)

    def put(self, workspace: Workspace) -> None:
        """Take a row as it was read, unless a fact has told something newer."""
        known = self._rows.get(workspace.workspace_id)
        if known is not None and workspace.rev < known.rev:
            return
        self.unread.discard(workspace.workspace_id)
        if known is not None and known.token_hash != workspace.token_hash:
            self._by_token.pop(known.token_hash, None)
        self._rows[workspace.workspace_id] = workspace
        if not workspace.removed:
            self._by_token[workspace.token_hash] = workspace.workspace_id

    def put_all(self, workspaces: Iterable[Workspace]) -> None:
        for workspace in workspaces:
            self.put(workspace)

    def hear(self, fact: WorkspaceRegistered) -> None:
        known = self._rows.get(fact.workspace_id)
        if known is not None and fact.rev <= known.rev:
            return
        self.unread.add(fact.workspace_id)
        if known is not None:
            self._rows[fact.workspace_id] = replace(
                known,
                rev=fact.rev,
                url=fact.url,
                incarnation=fact.incarnation,
                max_concurrent=fact.max_concurrent_tasks,
                heartbeat_interval_s=fact.heartbeat_interval_s,
                capabilities=tuple(fact.capabilities),
                settings=fact.settings,
                agent_authorization=fact.agent_authorization,
                paused=fact.paused,
                desired=fact.desired,
                runtime=fact.runtime,
            )

    def hear_removed(self, fact: WorkspaceRemoved) -> None:
        known = self._rows.get(fact.workspace_id)
        if known is None:
            self.unread.add(fact.workspace_id)
        elif fact.rev > known.rev:
            self._by_token.pop(known.token_hash, None)
            self._rows[fact.workspace_id] = replace(known, rev=fact.rev, removed=True)

    def hear_status(self, fact: WorkspaceStatus) -> None:
        known = self._statuses.get(fact.workspace_id)
        if known is None or fact.rev > known.rev:
            self._statuses[fact.workspace_id] = fact
            self._hear_death(fact)

    def _hear_death(self, fact: WorkspaceStatus) -> None:
        known = self._deaths.get(fact.workspace_id)
        if fact.status in DOWN:
            if known is None or fact.incarnation > known.incarnation:
                self._deaths[fact.workspace_id] = Death(fact.incarnation, time.monotonic())
        elif known is not None and fact.incarnation == known.incarnation and fact.status not in {"paused", "removed"}:
            del self._deaths[fact.workspace_id]  # it was alive after all

    @property
    def deaths(self) -> Mapping[str, Death]:
        """The last life of each agent that is over."""
        return self._deaths

    def status(self, workspace: Workspace) -> WorkspaceStatus | None:
        """The last word of liveness about this life of the agent."""
        said = self._statuses.get(workspace.workspace_id)
        return said if said is not None and said.incarnation >= workspace.incarnation else None
