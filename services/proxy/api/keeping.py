"""Keep a message: tell the broker, wait for its confirm, and only then promise. No busy is answered else (A-Q-17).

The queue's first word (ItemKept) is waited for a moment: it tells the place in line, and that the message is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from services.proxy.api.answers import Kept
from services.proxy.api.message import Message
from services.proxy.copies import Copies
from services.proxy.copies.keeps import Keep
from services.proxy.decide import Reason, Refuse
from services.proxy.metrics import KEEPS
from services.proxy.settings import Settings
from shared import topology
from shared.a2a import INVALID_REQUEST
from shared.broker import NotPublished, Publisher, PublishUnknown
from shared.facts import ItemKept, MessageBusy

NOT_KEPT = Refuse(
    503, "not_kept", "The message cannot be kept now, and nothing was promised. Send it again.", retry_after_s=2
)
KEEP_UNKNOWN = Refuse(
    503,
    "keep_unknown",
    "The broker did not confirm in time. Send the message again, with the X-Queue-Id of this answer: it is kept once.",
    retry_after_s=2,
)
KEY_CONFLICT = Refuse(
    422, "key_conflict", "This key stands for another body. Use a new messageId or Idempotency-Key.", INVALID_REQUEST
)


class Keeper:
    """Makes promises."""

    def __init__(self, settings: Settings, copies: Copies, publisher: Publisher) -> None:
        self._settings = settings
        self._copies = copies
        self._publisher = publisher
        self._reply_to = topology.route(ItemKept, "proxy").queue(settings.replica_id)

    async def keep(self, message: Message, reason: Reason) -> Kept | Refuse:
        """Come back when the broker has it, or with why it does not."""
        keep = Keep(
            queue_id=message.queue_id,
            workspace_id=message.workspace_id,
            caller_id=message.caller.caller_id,
            caller_hash=message.caller.caller_hash,
            priority=message.priority,
            reason=reason.value,
            promised_at=time.time(),
            key_hash=message.key_hash,
        )
        told = self._copies.keeps.promise(keep)
        try:
            await self._publisher.publish(self._fact(message, reason))
        except NotPublished:
            self._copies.keeps.withdraw(keep)
            return NOT_KEPT
        except PublishUnknown:
            # It goes on counting as backlog: what comes after it must not pass it, if it is there.
            return KEEP_UNKNOWN
        keep.confirmed = True
        KEEPS.labels(reason.value).inc()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.kept_wait_s):
                await asyncio.shield(told)
        return self._kept(message, reason, told.result() if told.done() and not told.cancelled() else None)

    def _kept(self, message: Message, reason: Reason, told: ItemKept | None) -> Kept | Refuse:
        if told is not None and told.conflict:
            return KEY_CONFLICT
        view = self._copies.backlogs.view(message.workspace_id)
        depth = view.waiting + max(1, self._copies.keeps.pending(message.workspace_id))
        return Kept(
            queue_id=(told.duplicate_of if told else None) or message.queue_id,
            workspace_id=message.workspace_id,
            depth=told.depth if told else depth,
            position=told.position if told else None,
            priority=message.priority.value,
            reason=reason.value,
            context_id=message.context_id,
            is_known=told is not None and told.duplicate_of is not None,
        )

    def _fact(self, message: Message, reason: Reason) -> MessageBusy:
        workspace_id = message.workspace_id
        view = self._copies.backlogs.view(workspace_id)
        return MessageBusy(
            workspace_id=workspace_id,
            rev=0,
            queue_id=message.queue_id,
            caller_id=message.caller.caller_id,
            caller_hash=message.caller.caller_hash,
            key_hash=message.key_hash,
            body_hash=message.body_hash,
            explicit_key=message.explicit_key,
            id_is_new=not message.repeated,
            reason=reason.value,
            priority=message.priority,
            method=message.envelope.method,
            body=message.body,
            context_id=_storable(message.envelope.context_id),
            not_before=message.not_before,
            expires_at=message.expires_at,
            hops=message.hops,
            beat=self._copies.uses.beat(workspace_id, view, time.time()),
            reply_to=self._reply_to,
        )


def _storable(text: str | None) -> str | None:
    """A context id that no column can hold is not ours to understand; the body has it anyway."""
    if text is None or "\0" in text:
        return None
    return text if text.isascii() or text.encode("utf-8", "replace").decode() == text else None
