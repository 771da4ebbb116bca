"""Find a workspace that this replica has not heard of yet: one that registered with another replica a moment ago.

Known ones cost nothing. An unknown id is asked of Postgres once, then it is remembered as unknown for a second.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict

from services.proxy.api.identity import Caller
from services.proxy.api.wire import Refused
from services.proxy.copies import Copies
from services.proxy.decide import Head, Presence, Refuse, Workspace, admit
from services.proxy.store import Store
from shared.database import classify
from shared.telemetry import log

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UNKNOWN_S = 1.0
_REMEMBERED_MAX = 10_000
_LOOKUPS_MAX = 4
_LOOKUP_TIMEOUT_S = 2.0


class Finding:
    """Workspaces by id."""

    def __init__(self, copies: Copies, store: Store) -> None:
        self._copies = copies
        self._store = store
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._slots = asyncio.Semaphore(_LOOKUPS_MAX)

    async def find(self, workspace_id: str) -> Workspace | None:
        """The workspace, removed or not; None: there is none, or Postgres does not say."""
        found = self._copies.registry.find(workspace_id)
        if found is not None or _ID.fullmatch(workspace_id) is None:
            return found
        if self._unknown.get(workspace_id, 0.0) < time.monotonic():
            self._unknown[workspace_id] = time.monotonic() + _UNKNOWN_S
            self._unknown.move_to_end(workspace_id)
            while len(self._unknown) > _REMEMBERED_MAX:
                self._unknown.popitem(last=False)
            await self._look_up(workspace_id)
        return self._copies.registry.find(workspace_id)

    async def owned(self, caller: Caller, workspace_id: str) -> Workspace:
        """The workspace, if the caller is an operator or enrolled it. Others do not learn that it is there.

        Raises:
            Refused: it is not, or it was removed.
        """
        workspace = await self.find(workspace_id)
        if workspace is None or not (caller.is_operator or caller.caller_id == workspace.owner_caller):
            raise Refused(gone(None))
        if workspace.removed:
            raise Refused(gone(workspace))
        return workspace

    async def _look_up(self, workspace_id: str) -> None:
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S), self._slots:
                self._copies.registry.put_all(await self._store.some([workspace_id]))
        except Exception as error:
            if classify(error) is None:
                raise
            log.warning("workspace_unchecked", error=type(error).__name__)


def presence(workspace: Workspace | None) -> Presence:
    if workspace is None:
        return Presence.UNKNOWN
    return Presence.REMOVED if workspace.removed else Presence.KNOWN


def gone(workspace: Workspace | None) -> Refuse:
    """Say that it is not there, or no more."""
    refuse = admit(Head(presence=presence(workspace)))
    assert refuse is not None, "neither is let in"
    return refuse
