"""Questions and commands to the queue service, and what its answers mean to whom."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict, Unpack
from uuid import UUID

from services.proxy.api.answers import agents_ids
from services.proxy.api.asking import Asking, Found
from services.proxy.api.identity import Caller
from services.proxy.api.message import Message
from services.proxy.api.wire import own_id
from services.proxy.copies import Copies
from services.proxy.decide import Refuse
from services.proxy.settings import Settings
from shared.facts import FLEET, Priority, QueueQuery

AWAY = Refuse(503, "queue_away", "The queue service does not answer now. Ask again.", retry_after_s=2)
NOT_YET = Refuse(
    503, "not_yet_visible", "The id is new, and the queue has not read it yet. Ask again.", retry_after_s=1
)
NOBODYS = Refuse(404, "item_unknown", "There is no such task or message of yours. Check the id.", -32001, is_reply=True)


Verb = Literal["item", "list", "cancel", "answer", "known", "retry", "promote", "cancel_many", "dead_letters", "replay"]


class About(TypedDict, total=False):
    """What a question is about; each field as QueueQuery has it."""

    queue_id: UUID
    key_hash: bytes | None
    status: str | None
    priority: Priority | None
    cursor: str | None
    limit: int
    older_than_s: float | None
    count_only: bool
    dead_letter: bytes


class Questions:
    """Asks the queue service."""

    def __init__(self, settings: Settings, copies: Copies, asking: Asking) -> None:
        self._settings = settings
        self._copies = copies
        self._asking = asking

    async def ask(
        self, verb: Verb, *, caller_hash: bytes | None, workspace_id: str = FLEET, **about: Unpack[About]
    ) -> Found | None:
        """What the queue says; None: it does not answer. `caller_hash` None sees everybody's."""
        return await self._asking.ask(QueueQuery, workspace_id, verb=verb, caller_hash=caller_hash, **about)

    async def item(self, queue_id: UUID, caller: Caller) -> Found | Refuse:
        """One item as 2-http shapes it, also one that was promised here and is not read yet."""
        # Before the question: what the queue shows while its answer travels is no promise any more, and not yet found.
        promised = self.promised(queue_id, caller)
        found = await self.ask("item", queue_id=queue_id, caller_hash=scope(caller))
        if found is not None and found.status == 200:  # noqa: PLR2004
            found = await self._followed(found, caller)
            self._tell_owner(found.read(), caller)
            return found
        if promised is not None:
            return Found(200, json.dumps(promised).encode())
        if found is None:
            return AWAY
        return await self.why_not(queue_id, caller)

    async def knows(self, message: Message) -> bool:
        """Whether its id or its explicit key stands for an item of its caller; no, where the queue does not say."""
        found = await self.ask(
            "known",
            workspace_id=message.workspace_id,
            caller_hash=message.caller.caller_hash,
            queue_id=message.queue_id,
            key_hash=message.key_hash if message.explicit_key else None,
        )
        return found is not None and found.status == 200  # noqa: PLR2004

    async def answer(self, queue_id: UUID, caller: Caller) -> bytes | Refuse:
        """The agent's answer to an item, byte for byte."""
        found = await self.ask("answer", queue_id=queue_id, caller_hash=scope(caller))
        if found is None:
            return AWAY
        said = found.read()
        if found.status != 200:  # noqa: PLR2004
            return Refuse(found.status, str(said.get("code")), str(said.get("detail")), -32001)
        return base64.b64decode(said["answer_base64"])

    def _tell_owner(self, item: Mapping[str, Any], caller: Caller) -> None:
        """What the item shows of the agent's Task makes it this caller's, as the answer of a live forward does."""
        if caller.is_operator:
            return  # it may be anybody's item
        for task_id in {item.get("agent_task_id"), agents_ids(item)}:
            if isinstance(task_id, str):
                self._copies.owners.tell(str(item["workspace_id"]), task_id, caller.caller_hash)

    async def _followed(self, found: Found, caller: Caller) -> Found:
        """A proposed id that turned out to be a duplicate stands for the first one's item."""
        first = own_id(found.read().get("superseded_by"))
        if first is None:
            return found
        there = await self.ask("item", queue_id=first, caller_hash=scope(caller))
        return there if there is not None and there.status == 200 else found  # noqa: PLR2004

    def promised(self, queue_id: UUID, caller: Caller) -> dict[str, Any] | None:
        """The item of a promise that the queue has not shown yet."""
        keep = self._copies.keeps.find(queue_id)
        if keep is None or (not caller.is_operator and keep.caller_hash != caller.caller_hash):
            return None
        at = datetime.fromtimestamp(keep.promised_at, UTC).isoformat()
        return {
            "queue_id": str(keep.queue_id),
            "workspace_id": keep.workspace_id,
            "caller_id": keep.caller_id,
            "status": "queued",
            "reason": keep.reason,
            "priority": keep.priority.value,
            "position": None,
            "why": "it was promised a moment ago and takes its place in line",
            "attempts": 0,
            "delivery_no": 0,
            "enqueued_at": at,
            "dispatched_at": None,
            "ended_at": None,
            "expires_at": None,
            "retry_of": None,
            "answer": None,
            "answer_url": None,
        }

    async def why_not(self, queue_id: UUID, caller: Caller) -> Refuse:
        """Why the queue does not show this id to this caller: it is nobody's, another's, or too new to be there.

        It may have been read since it was asked for, and its promise been forgotten for that: then it is not nobody's.
        """
        there = await self.ask("item", queue_id=queue_id, caller_hash=None)
        if there is None:
            return NOT_YET
        if there.status == 200:  # noqa: PLR2004
            shown = (
                there if caller.is_operator else await self.ask("item", queue_id=queue_id, caller_hash=scope(caller))
            )
            return NOT_YET if shown is None or shown.status == 200 else NOBODYS  # noqa: PLR2004
        # While the queue service is away nothing is read: that time makes no id old.
        known_since = max((queue_id.int >> 80) / 1000, self._copies.backlogs.unbroken_since)
        age_s = datetime.now(UTC).timestamp() - known_since
        return NOBODYS if age_s > self._settings.not_yet_visible_s else NOT_YET


def scope(caller: Caller) -> bytes | None:
    """Whose items this caller may see."""
    return None if caller.is_operator else caller.caller_hash
