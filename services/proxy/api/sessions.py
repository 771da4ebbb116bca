"""Sessions, for owners and operators: what runs, and its end. The scheduler knows them and is asked over the bus.

Who says it is recorded before the scheduler is asked. A stop or a checkpoint said twice is once, which is the
scheduler's to see to. Who only looks does not wait for a scheduler that is away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from services.proxy.api.asking import Asking, Found
from services.proxy.api.finding import Finding
from services.proxy.api.forms import Why
from services.proxy.api.identity import Identity, display
from services.proxy.api.queue import passed
from services.proxy.api.schedules import AWAY
from services.proxy.api.wire import Request, Response, validated
from services.proxy.settings import Settings
from services.proxy.store import Audit, Store
from shared.facts import FLEET, ScheduleQuery
from shared.telemetry import log

Verb = Literal["sessions", "checkpoint", "stop"]
Shown = Mapping[str, Any]
"""`session`, `sessions`, `schedules` and `sessions_known`, as 2-http has them."""

NOT_KNOWN: Shown = {"session": None, "sessions": None, "schedules": None, "sessions_known": False}
_NOTHING: Shown = {"session": None, "sessions": [], "schedules": [], "sessions_known": True}
_LOOKER = "proxy"


class Sessions:
    """The routes, bound to what they touch."""

    def __init__(
        self, settings: Settings, *, identity: Identity, finding: Finding, store: Store, asking: Asking
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._finding = finding
        self._store = store
        self._asking = asking

    async def stop(self, request: Request, workspace_id: str) -> Response:
        """End what runs there as its ceiling would, from STOP on."""
        return await self._say(request, workspace_id, "stop")

    async def checkpoint(self, request: Request, workspace_id: str) -> Response:
        """Ask the agent to save what it has; nothing follows from it."""
        return await self._say(request, workspace_id, "checkpoint")

    async def of(self, workspace_id: str) -> Shown:
        """What runs in a workspace, for how long, and what bounces off it."""
        said = await self._look(workspace_id)
        return _shown(said) if said is not None else NOT_KNOWN

    async def of_all(self, workspace_ids: Sequence[str]) -> Mapping[str, Shown] | None:
        """The same of each of these; None: the scheduler does not say."""
        said = await self._look(FLEET, json.dumps({"workspaces": workspace_ids}).encode())
        named = said.get("workspaces") if said is not None else None
        if not isinstance(named, dict):
            return None
        return {name: _shown(each) for name, each in named.items() if isinstance(each, dict)}

    async def _say(self, request: Request, workspace_id: str, verb: Verb) -> Response:
        caller = await self._identity.require(request)
        await self._finding.owned(caller, workspace_id)
        reason = why(await request.body(self._settings.body_bytes_max, self._settings.body_read_s))
        await self._store.record(workspace_id, Audit(caller.caller_id, verb, {"reason": reason}))
        log.info("verb_said", action=verb, caller_id=caller.caller_id, workspace_id=workspace_id)
        body = json.dumps({"reason": reason}).encode()
        found = await self._ask(workspace_id, verb, caller.caller_id, body)
        return passed(found if found is not None else AWAY)

    async def _look(self, workspace_id: str, body: bytes = b"{}") -> dict[str, Any] | None:
        found = await self._ask(workspace_id, "sessions", _LOOKER, body, within_s=self._settings.sessions_wait_s)
        return found.read() if found is not None and found.status == 200 else None  # noqa: PLR2004

    async def _ask(
        self, workspace_id: str, verb: Verb, by: str, body: bytes, *, within_s: float | None = None
    ) -> Found | None:
        return await self._asking.ask(ScheduleQuery, workspace_id, within_s=within_s, verb=verb, body=body, by=by)


def among(named: Mapping[str, Shown] | None, workspace_id: str) -> Shown:
    """What `of_all` says of one of them."""
    return NOT_KNOWN if named is None else named.get(workspace_id, _NOTHING)


def why(body: bytes) -> str | None:
    """The reason that a body, which may also be left out, gives."""
    reason = validated(Why, body).reason if body.strip() else None
    return display(reason) if reason else None


def _shown(said: Mapping[str, Any]) -> Shown:
    session = said.get("session")
    return {
        "session": session,
        "sessions": said.get("sessions", [session] if session is not None else []),
        "schedules": said.get("schedules", []),
        "sessions_known": True,
    }
