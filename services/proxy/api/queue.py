"""The kept messages of a caller: one of them, its answer, and the line in which they wait. `verbs` changes them."""

from __future__ import annotations

from uuid import UUID

from services.proxy.api.asking import Found
from services.proxy.api.finding import Finding
from services.proxy.api.identity import Identity, digest
from services.proxy.api.questions import AWAY, NOBODYS, Questions, scope
from services.proxy.api.wire import Refused, Request, Response, own_id
from services.proxy.decide import Refuse
from shared.facts import ItemStatus, Priority

PAGE_MAX = 500


class Queue:
    """The routes, bound to what they touch."""

    def __init__(self, finding: Finding, identity: Identity, questions: Questions) -> None:
        self._finding = finding
        self._identity = identity
        self._questions = questions

    async def show(self, request: Request, queue_id: str) -> Response:
        """State, attempts, timings and answer of one message."""
        caller = await self._identity.require(request)
        return passed(await self._questions.item(item_id(queue_id), caller))

    async def answer(self, request: Request, queue_id: str) -> Response:
        """The agent's answer alone, byte for byte: what `answer_url` names where it is large."""
        caller = await self._identity.require(request)
        found = await self._questions.answer(item_id(queue_id), caller)
        if isinstance(found, Refuse):
            raise Refused(found)
        return Response(200, found)

    async def list(self, request: Request, workspace_id: str) -> Response:
        """A workspace's messages in the order of their delivery: one's own, an operator's everybody's."""
        caller = await self._identity.require(request)
        if await self._finding.find(workspace_id) is None:
            raise Refused(Refuse(404, "workspace_unknown", "There is no such workspace. Check the id."))
        query = request.query()
        hashed = scope(caller)
        if caller.is_operator and "caller" in query:
            hashed = digest(query["caller"])
        found = await self._questions.ask(
            "list",
            caller_hash=hashed,
            workspace_id=workspace_id,
            status=_one_of(query.get("status"), [status.value for status in ItemStatus], "status"),
            priority=_priority(query.get("priority")),
            cursor=query.get("cursor"),
            limit=page_limit(query.get("limit")),
        )
        return passed(found if found is not None else AWAY)


def passed(found: Found | Refuse) -> Response:
    if isinstance(found, Refuse):
        raise Refused(found)
    if found.status < 400:  # noqa: PLR2004
        return Response(found.status, found.body)
    said = found.read()
    raise Refused(Refuse(found.status, str(said.get("code", "refused")), str(said.get("detail", "The queue refused."))))


def item_id(said: str) -> UUID:
    found = own_id(said)
    if found is None:
        raise Refused(NOBODYS)
    return found


def _priority(said: str | None) -> Priority | None:
    word = _one_of(said, [priority.value for priority in Priority], "priority")
    return Priority(word) if word else None


def _one_of(said: str | None, words: list[str], name: str) -> str | None:
    if said is not None and said not in words:
        raise Refused(Refuse(400, "bad_value", f"{name} is one of {', '.join(words)}."))
    return said


def page_limit(said: str | None) -> int:
    if said is None:
        return 50
    if not said.isdigit() or not 1 <= int(said[:9]) <= PAGE_MAX:
        raise Refused(Refuse(400, "bad_value", f"limit is a number from 1 to {PAGE_MAX}."))
    return int(said)
