"""Schedules of a workspace, for its owner and operators: every route asks the scheduler over the bus.

A change is answered once the queue holds it (`applied`): from then on whatever is dispatched has the new prompt, a tick
that waits already too. Where the queue does not say so in time, the change stands all the same: 202.
"""

from __future__ import annotations

import json
from typing import Any, Literal
from uuid import UUID

from uuid_utils.compat import uuid7

from services.proxy.api.asking import Asking
from services.proxy.api.finding import Finding
from services.proxy.api.identity import Caller, Identity
from services.proxy.api.queue import page_limit, passed
from services.proxy.api.wire import Refused, Request, Response, own_id
from services.proxy.copies import Copies
from services.proxy.decide import Refuse
from services.proxy.settings import Settings
from shared.facts import ScheduleQuery

Verb = Literal["list", "show", "fires", "preview", "create", "patch", "delete", "run", "pause", "resume"]

AWAY = Refuse(503, "scheduler_away", "The scheduler does not answer now. Ask again.", retry_after_s=2)
_UNKNOWN = Refuse(404, "schedule_unknown", "There is no such schedule. GET …/schedules lists what is.")
_APPLIED = frozenset({"patch", "delete", "pause", "resume"})
_PREVIEW_MAX = 100


class Schedules:
    """The routes, bound to what they touch."""

    def __init__(
        self, settings: Settings, copies: Copies, *, finding: Finding, identity: Identity, asking: Asking
    ) -> None:
        self._settings = settings
        self._copies = copies
        self._finding = finding
        self._identity = identity
        self._asking = asking

    async def list(self, request: Request, workspace_id: str) -> Response:
        """All of a workspace, by name."""
        query = request.query()
        page = {"cursor": query.get("cursor"), "limit": page_limit(query.get("limit"))}
        return await self._answer(request, workspace_id, "list", **page)

    async def create(self, request: Request, workspace_id: str) -> Response:
        """A new one (201): cron, interval, or one moment."""
        body = await self._object(request)
        response = await self._answer(request, workspace_id, "create", schedule_id=uuid7(), body=body)
        made = json.loads(response.body)["schedule_id"]
        response.headers.append((b"location", f"/workspaces/{workspace_id}/schedules/{made}".encode()))
        return response

    async def show(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        return await self._answer(request, workspace_id, "show", schedule_id=_id(schedule_id))

    async def patch(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """Change what is named. With If-Match only if it still has that rev (412)."""
        body = await self._object(request)
        about = {"schedule_id": _id(schedule_id), "body": body, "if_match": _rev(request)}
        return await self._answer(request, workspace_id, "patch", **about)

    async def delete(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """Fire no more; a tick that waits is taken back."""
        about = {"schedule_id": _id(schedule_id), "if_match": _rev(request)}
        return await self._answer(request, workspace_id, "delete", **about)

    async def run(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """Fire now, besides the calendar."""
        return await self._answer(request, workspace_id, "run", schedule_id=_id(schedule_id))

    async def pause(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """Fire no more until it is resumed; `{note}` says why. What passes meanwhile never fires."""
        about = {"schedule_id": _id(schedule_id), "body": await self._object(request, may_be_empty=True)}
        return await self._answer(request, workspace_id, "pause", **about)

    async def resume(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        return await self._answer(request, workspace_id, "resume", schedule_id=_id(schedule_id))

    async def fires(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """What became of each fire, the newest first."""
        query = request.query()
        page = {"cursor": query.get("cursor"), "limit": page_limit(query.get("limit"))}
        return await self._answer(request, workspace_id, "fires", schedule_id=_id(schedule_id), **page)

    async def preview(self, request: Request, workspace_id: str, schedule_id: str) -> Response:
        """The next `n` moments."""
        said = request.query().get("n", "10")
        if not said.isdigit() or not 1 <= int(said[:9]) <= _PREVIEW_MAX:
            raise Refused(Refuse(400, "bad_value", f"n is a number from 1 to {_PREVIEW_MAX}."))
        return await self._answer(request, workspace_id, "preview", schedule_id=_id(schedule_id), limit=int(said))

    async def _answer(self, request: Request, workspace_id: str, verb: Verb, **about: Any) -> Response:
        caller = await self._identity.require(request)
        await self._finding.owned(caller, workspace_id)
        _refuse_priority(caller, about.get("body", b"{}"))
        found = await self._asking.ask(ScheduleQuery, workspace_id, verb=verb, by=caller.caller_id, **about)
        if found is None:
            raise Refused(AWAY)
        response = passed(found)
        if verb in _APPLIED:
            return await self._applied(response)
        return response

    async def _applied(self, response: Response) -> Response:
        """Wait until the queue holds the change, for a moment."""
        schedule = json.loads(response.body)
        schedule_id, rev = UUID(schedule["schedule_id"]), int(schedule["rev"])
        applied = await self._copies.applied.wait(schedule_id, rev, self._settings.applied_wait_s)
        response.body = json.dumps({**schedule, "applied": applied}).encode()
        response.status = 200 if applied else 202
        return response

    async def _object(self, request: Request, *, may_be_empty: bool = False) -> bytes:
        """The body, if it is a JSON object in UTF-8; what stands in it is the scheduler's to judge."""
        body = await request.body(self._settings.body_bytes_max, self._settings.body_read_s)
        if may_be_empty and not body.strip():
            return b"{}"
        try:
            said = json.loads(body.decode())
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise Refused(Refuse(400, "not_json", "The body is no JSON object in UTF-8. Send one."))
        return body


def _refuse_priority(caller: Caller, body: bytes) -> None:
    """What may not be sent as CRITICAL may not be planned as such."""
    if json.loads(body).get("priority") == "CRITICAL" and "critical" not in caller.rights:
        sentence = "CRITICAL needs the right of that name. Ask an operator for it, or plan it as TASK."
        raise Refused(Refuse(403, "priority_not_allowed", sentence))


def _id(said: str) -> UUID:
    found = own_id(said)
    if found is None:
        raise Refused(_UNKNOWN)
    return found


def _rev(request: Request) -> int | None:
    said = request.header(b"if-match")
    if said is None or said == "*":
        return None
    number = said.removeprefix("W/").strip('"')
    if not number.isdigit() or len(number) > 18:  # noqa: PLR2004 - no rev of ours
        raise Refused(Refuse(400, "bad_value", "If-Match is the rev that the schedule had when you read it."))
    return int(number)
