"""What proxy does with each fact: it takes it into its copies. Nothing is written; snapshots heal what was missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.proxy.copies import Copies
from services.proxy.copies.directives import taken
from services.proxy.copies.use import Use
from services.proxy.metrics import GATE_CLOSINGS
from shared.consumer import Reader
from shared.facts import (
    FLEET,
    BacklogSnapshot,
    ItemChanged,
    ItemKept,
    ProxyBeat,
    QueryAnswered,
    ScheduleApplied,
    SessionDirective,
    SessionStop,
    WorkspaceBacklog,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
    WorkspaceStatus,
)
from shared.telemetry import log

CONTROL = "proxy.control"
"""Reader of the directives that one replica brings to the agent."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers, bound to the copies.

    `unread` wakes whoever reads rows of the registry again, `to_call` whoever brings directives to agents; `closed` is
    told each workspace of whose gate a new closing was heard, when the copies have it.
    """

    copies: Copies
    unread: Callable[[], None]
    closed: Callable[[str], None] = lambda _: None
    to_call: Callable[[], None] = lambda: None

    def register(self, reader: Reader) -> None:
        reader.hear(WorkspaceRegistered, self.workspaces)
        reader.hear(WorkspaceChanged, self.workspaces)
        reader.hear(WorkspaceRemoved, self.removed)
        reader.hear(WorkspaceStatus, self.statuses)
        reader.hear(WorkspaceHeartbeat, self.heartbeats, own=False)
        reader.hear(ProxyBeat, self.proxy_beats, own=False)
        reader.hear(WorkspaceBacklog, self.backlogs)
        reader.hear(BacklogSnapshot, self.snapshots)
        reader.hear(ItemKept, self.kept)
        reader.hear(ItemChanged, self.changed)
        reader.hear(QueryAnswered, self.answered)
        reader.hear(ScheduleApplied, self.applied)
        reader.hear(SessionDirective, self.directives)
        reader.hear(SessionDirective, self.calls, reader=CONTROL)
        reader.hear(SessionStop, self.stops)

    async def workspaces(self, facts: Sequence[WorkspaceRegistered]) -> None:
        for fact in facts:
            self.copies.registry.hear(fact)
            self._use(fact.workspace_id).renew(fact.incarnation)
        self._wake()

    async def removed(self, facts: Sequence[WorkspaceRemoved]) -> None:
        for fact in facts:
            self.copies.registry.hear_removed(fact)
        self._wake()

    async def statuses(self, facts: Sequence[WorkspaceStatus]) -> None:
        for fact in facts:
            self.copies.registry.hear_status(fact)

    async def heartbeats(self, facts: Sequence[WorkspaceHeartbeat]) -> None:
        for fact in facts:
            self._use(fact.workspace_id).hear_heartbeat(fact)
            if fact.acknowledged:
                self.copies.directives.acknowledge(fact.workspace_id, taken(fact.acknowledged))

    async def proxy_beats(self, facts: Sequence[ProxyBeat]) -> None:
        for fact in facts:
            # Its own it knows better than its last beat does; of the fleet a beat says that the other lives, no more.
            if fact.proxy_id != self.copies.replica_id and fact.workspace_id != FLEET:
                self._use(fact.workspace_id).hear_peer(fact)

    async def backlogs(self, facts: Sequence[WorkspaceBacklog]) -> None:
        for fact in facts:
            self.copies.backlogs.hear(fact)
            self._shown(fact.workspace_id)
        self._tell_closings()

    async def snapshots(self, facts: Sequence[BacklogSnapshot]) -> None:
        for fact in facts:
            changed = self.copies.backlogs.hear_part(fact)
            if changed is not None:
                for workspace_id in {*changed, *self.copies.keeps.workspaces()}:
                    self._shown(workspace_id)
        self._tell_closings()

    async def kept(self, facts: Sequence[ItemKept]) -> None:
        for fact in facts:
            copied_at = self.copies.backlogs.copied_at(fact.workspace_id)
            self.copies.keeps.hear_kept(fact, copied_at, unbroken_since=self.copies.backlogs.unbroken_since)

    async def changed(self, facts: Sequence[ItemChanged]) -> None:
        for fact in facts:
            self.copies.keeps.hear_changed(fact)

    async def answered(self, facts: Sequence[QueryAnswered]) -> None:
        for fact in facts:
            self.copies.queries.hear(fact)

    async def applied(self, facts: Sequence[ScheduleApplied]) -> None:
        for fact in facts:
            self.copies.applied.hear(fact)

    async def directives(self, facts: Sequence[SessionDirective]) -> None:
        for fact in facts:
            if self.copies.directives.hear(fact, time.time()):
                log.info(
                    "directive_heard",
                    workspace_id=fact.workspace_id,
                    session_id=fact.session_id,
                    directive_id=str(fact.directive_id),
                    kind=fact.kind.value,
                    reason=fact.reason,
                )

    async def calls(self, facts: Sequence[SessionDirective]) -> None:
        """Only record them: a call may take long, and what is read here is acknowledged at once (3-bus rule 7)."""
        now = time.time()
        for fact in facts:
            self.copies.calls.add(fact, now)
        self.to_call()

    async def stops(self, facts: Sequence[SessionStop]) -> None:
        for fact in facts:
            forward = self.copies.uses.stop(fact.workspace_id, fact.session_id, fact.reason)
            if forward is not None:
                log.info(
                    "live_session_stopped",
                    workspace_id=fact.workspace_id,
                    session_id=fact.session_id,
                    reason=fact.reason,
                    task_known=forward.task_id is not None,
                )

    def _tell_closings(self) -> None:
        backlogs = self.copies.backlogs
        while backlogs.closings:
            workspace_id = backlogs.closings.pop()
            GATE_CLOSINGS.inc()
            self.closed(workspace_id)

    def _use(self, workspace_id: str) -> Use:
        return self.copies.uses.of(workspace_id)

    def _shown(self, workspace_id: str) -> None:
        view = self.copies.backlogs.view(workspace_id)
        self._use(workspace_id).hear_backlog(view)
        copied_at = self.copies.backlogs.copied_at(workspace_id) or view.at
        since = self.copies.backlogs.unbroken_since
        self.copies.keeps.covered(workspace_id, copied_at, waiting=view.waiting, unbroken_since=since)

    def _wake(self) -> None:
        if self.copies.registry.unread:
            self.unread()
