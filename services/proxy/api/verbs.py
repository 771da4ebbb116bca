"""What operators, and callers with their own, do to messages that wait or have ended, and to dead letters of the bus.

Who did it is recorded before the queue is asked: nothing is done that is not in the record. A verb said twice is once,
which is the queue's to see to.
"""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

from services.proxy.api.asking import Found
from services.proxy.api.finding import Finding
from services.proxy.api.forms import CancelMany
from services.proxy.api.identity import Caller, Identity, digest, display
from services.proxy.api.questions import AWAY, NOT_YET, Questions, Verb, scope
from services.proxy.api.queue import item_id, page_limit, passed
from services.proxy.api.wire import Refused, Request, Response, own_id, validated
from services.proxy.api.workspaces import noted
from services.proxy.decide import Refuse
from services.proxy.settings import Settings
from services.proxy.store import Audit, Store
from shared.facts import FLEET
from shared.telemetry import log

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NO_LETTER = Refuse(404, "dead_letter_unknown", "There is no such dead letter. GET /dead-letters lists what is.")


class Verbs:
    """The routes, bound to what they touch."""

    def __init__(
        self, settings: Settings, *, finding: Finding, identity: Identity, questions: Questions, store: Store
    ) -> None:
        self._settings = settings
        self._finding = finding
        self._identity = identity
        self._questions = questions
        self._store = store

    async def cancel(self, request: Request, queue_id: str) -> Response:
        """Take a waiting message out of the line (200); one that its agent has is asked to end (202)."""
        caller = await self._identity.require(request)
        return await self._one(request, caller, "cancel", item_id(queue_id))

    async def retry(self, request: Request, queue_id: str) -> Response:
        """Send again what ended badly: the new item, 201 the first time and 200 from then on."""
        caller = await self._identity.require(request)
        response = await self._one(request, caller, "retry", item_id(queue_id))
        told = Found(response.status, response.body).read().get("queue_id")
        response.headers.append((b"location", f"/queue/{told}".encode()))
        return response

    async def promote(self, request: Request, queue_id: str) -> Response:
        """Put it before all others of its workspace, also those of other callers."""
        caller = await self._identity.require_operator(request)
        return await self._one(request, caller, "promote", item_id(queue_id))

    async def cancel_many(self, request: Request, workspace_id: str) -> Response:
        """Take everything that matches out of the line, or count it."""
        caller = await self._identity.require_operator(request)
        if await self._finding.find(workspace_id) is None:
            raise Refused(Refuse(404, "workspace_unknown", "There is no such workspace. Check the id."))
        form = validated(CancelMany, await self._body(request))
        if not form.count_only:
            said = form.model_dump(mode="json", exclude_none=True, exclude={"count_only"})
            for name in {"note", "caller"} & said.keys():
                said[name] = display(said[name])
            await self._record(caller, "cancel_many", workspace_id, said)
        found = await self._questions.ask(
            "cancel_many",
            workspace_id=workspace_id,
            caller_hash=digest(form.caller) if form.caller else None,
            priority=form.priority,
            older_than_s=form.older_than_s,
            count_only=form.count_only,
        )
        return passed(found or AWAY)

    async def dead_letters(self, request: Request) -> Response:
        """What services could not read or apply, the newest first."""
        await self._identity.require_operator(request)
        query = request.query()
        limit = page_limit(query.get("limit"))
        found = await self._questions.ask("dead_letters", caller_hash=None, cursor=query.get("cursor"), limit=limit)
        return passed(found or AWAY)

    async def replay(self, request: Request, letter: str) -> Response:
        """Publish it again, for a service that can read it by now."""
        caller = await self._identity.require_operator(request)
        if _DIGEST.fullmatch(letter) is None:
            raise Refused(_NO_LETTER)
        detail = {"dead_letter": letter.lower(), "note": noted(await self._body(request))}
        await self._record(caller, "replay", FLEET, detail)
        found = await self._questions.ask("replay", caller_hash=None, dead_letter=bytes.fromhex(letter))
        return passed(_NO_LETTER if found is not None and found.status == 404 else found or AWAY)  # noqa: PLR2004

    async def _one(self, request: Request, caller: Caller, verb: Verb, queue_id: UUID) -> Response:
        """Do something to one item, if it is there and the caller may see it."""
        note = noted(await self._body(request))
        promised = self._questions.promised(queue_id, caller) is not None
        item = await self._questions.item(queue_id, caller)
        if isinstance(item, Refuse):
            raise Refused(item)
        said = item.read()
        workspace_id = str(said["workspace_id"])
        queue_id = own_id(said.get("queue_id")) or queue_id  # the first one's, where this turned out to be a repeat
        await self._record(caller, verb, workspace_id, {"queue_id": str(queue_id), "note": note})
        found = await self._questions.ask(verb, queue_id=queue_id, caller_hash=scope(caller), workspace_id=workspace_id)
        if found is not None and found.status == 404 and promised:  # noqa: PLR2004
            raise Refused(NOT_YET)
        return passed(found or AWAY)

    async def _record(self, caller: Caller, action: str, workspace_id: str, detail: dict[str, Any]) -> None:
        await self._store.record(workspace_id, Audit(caller.caller_id, action, detail))
        log.info("verb_said", action=action, caller_id=caller.caller_id, workspace_id=workspace_id)

    async def _body(self, request: Request) -> bytes:
        return await request.body(self._settings.body_bytes_max, self._settings.body_read_s)
