"""What live forwards tell liveness of an agent's life: each failure, and now and then that it answers."""

from __future__ import annotations

import time

from services.proxy.decide import Workspace
from services.proxy.metrics import EVIDENCED
from services.proxy.settings import Settings
from shared.broker import Publisher
from shared.facts import EvidenceKind, WorkspaceEvidence


class Evidence:
    """Tells it. Answers come by the thousand and all say the same: one look-up for those that are not told."""

    def __init__(self, settings: Settings, publisher: Publisher) -> None:
        self._pause_s = settings.evidence_pause_s
        self._publisher = publisher
        self._quiet_until: dict[str, float] = {}

    def tell(self, workspace: Workspace, kind: EvidenceKind) -> None:
        """What was seen of the life of the agent that `workspace` stands for: of that incarnation, not of a later one.

        A refusal for being busy is a sign of life too. After a failure the next answer is told at once.
        """
        now = time.time()
        if kind is EvidenceKind.ANSWERED or kind is EvidenceKind.BUSY:
            if now < self._quiet_until.get(workspace.workspace_id, 0.0):
                return
            self._quiet_until[workspace.workspace_id] = now + self._pause_s
        else:
            self._quiet_until.pop(workspace.workspace_id, None)
        EVIDENCED[kind].inc()
        self._publisher.post(
            WorkspaceEvidence(
                workspace_id=workspace.workspace_id,
                rev=int(now * 1e6),
                incarnation=workspace.incarnation,
                kind=kind,
            )
        )
