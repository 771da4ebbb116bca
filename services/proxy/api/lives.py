"""The lives of an agent, for operators: what liveness has seen and done, and a restart by hand."""

from __future__ import annotations

from typing import Literal

from services.proxy.api.asking import Asking, Found
from services.proxy.api.finding import Finding
from services.proxy.api.identity import Caller, Identity
from services.proxy.api.queue import page_limit, passed
from services.proxy.api.sessions import why
from services.proxy.api.wire import Request, Response
from services.proxy.decide import Refuse
from services.proxy.settings import Settings
from services.proxy.store import Audit, Store
from shared.facts import LivenessQuery
from shared.telemetry import log

AWAY = Refuse(503, "liveness_away", "The liveness service does not answer now. Ask again.", retry_after_s=2)

_AGAIN = "What was paused goes on; an agent that was given up stays down until it is resumed again."


class Lives:
    """The routes, bound to what they touch."""

    def __init__(
        self, settings: Settings, *, identity: Identity, finding: Finding, store: Store, asking: Asking
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._finding = finding
        self._store = store
        self._asking = asking

    async def restart(self, request: Request, workspace_id: str) -> Response:
        """End its container and start it anew. Said again while it is being restarted, it is the same restart."""
        caller = await self._operator(request, workspace_id)
        reason = why(await request.body(self._settings.body_bytes_max, self._settings.body_read_s))
        await self._store.record(workspace_id, Audit(caller.caller_id, "restart", {"reason": reason}))
        log.info("verb_said", action="restart", caller_id=caller.caller_id, workspace_id=workspace_id)
        return await self._ask(workspace_id, "restart", caller, note=reason or "")

    async def history(self, request: Request, workspace_id: str) -> Response:
        """Evidence, verdicts and restarts, the newest first."""
        caller = await self._operator(request, workspace_id)
        return await self._ask(workspace_id, "history", caller, limit=page_limit(request.query().get("limit")))

    async def resume(self, workspace_id: str, caller: Caller, note: str | None) -> dict[str, object]:
        """Tell liveness that an operator has looked: it may start again what it has given up on. Never an error.

        `text` is why it will not, if it said so, or that nobody heard it.
        """
        found = await self._answered(workspace_id, "resume", caller, note=note or "")
        if isinstance(found, Refuse):
            return {"told": False, "text": f"{found.sentence} {_AGAIN}"}
        return {"told": True, "text": found.read().get("detail")}

    async def _operator(self, request: Request, workspace_id: str) -> Caller:
        caller = await self._identity.require_operator(request)
        await self._finding.owned(caller, workspace_id)
        return caller

    async def _ask(
        self,
        workspace_id: str,
        verb: Literal["history", "restart"],
        caller: Caller,
        *,
        note: str = "",
        limit: int = 50,
    ) -> Response:
        return passed(await self._answered(workspace_id, verb, caller, note=note, limit=limit))

    async def _answered(
        self,
        workspace_id: str,
        verb: Literal["history", "restart", "resume"],
        caller: Caller,
        *,
        note: str = "",
        limit: int = 50,
    ) -> Found | Refuse:
        found = await self._asking.ask(
            LivenessQuery, workspace_id, verb=verb, by=caller.caller_id, note=note, limit=limit
        )
        return found if found is not None else AWAY
