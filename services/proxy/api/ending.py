"""How a kept message is answered: at once with its promise, with its answer if it has one, or after a limited wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from services.proxy.api import rendering
from services.proxy.api.answers import Kept, followed, result_body, task_of_item, with_request_id
from services.proxy.api.message import Message, Wish
from services.proxy.api.questions import Questions
from services.proxy.api.rendering import Landed
from services.proxy.api.wire import Request, Response
from services.proxy.copies import Copies
from services.proxy.copies.keeps import Waiter
from services.proxy.decide import Refuse
from services.proxy.forward import Broken, Passed
from shared.facts import ItemChanged, ItemStatus
from shared.results import read_result

_OPEN = ("queued", "dispatched")
_ASK_AGAIN_S = 10.0
"""How long somebody who waits for an item's end goes by what is told, before the queue is asked again."""


class Endings:
    """Answers callers whose message did not go straight through."""

    def __init__(self, copies: Copies, questions: Questions, stopping: asyncio.Event) -> None:
        self._copies = copies
        self._questions = questions
        self._stopping = stopping

    async def answer(self, request: Request, message: Message, landed: Landed, waiter: Waiter | None) -> str:
        """Send the answer; return the word for it. `waiter` has heard of this very item since before it was kept."""
        response = None
        if isinstance(landed, Kept):
            response = await self._answered_already(message, landed)
            if response is None and message.wish is Wish.LIMITED:
                response = await self._wait(message, landed, waiter)
        response = response or rendering.render(message, landed, message.workspace_id)
        await response.send(request.send)
        return _word(landed, response.status)

    async def _answered_already(self, message: Message, kept: Kept) -> Response | None:
        """A known key or id whose item has ended: the same answer again."""
        if not kept.is_known or not (message.explicit_key or message.repeated):
            return None
        ended = await self._look(message, kept)
        if ended is not None:
            ended.headers.append((b"idempotent-replayed", b"true"))
        return ended

    async def _wait(self, message: Message, kept: Kept, waiter: Waiter | None) -> Response:
        until = time.monotonic() + message.wait_s
        if waiter is not None and kept.queue_id == message.queue_id:
            return await self._wait_for(message, kept, waiter, until)
        with self._copies.keeps.waiting_for(kept.queue_id) as own:
            # It may have ended before we began to listen.
            ended = await self._look(message, kept)
            return ended or await self._wait_for(message, kept, own, until)

    async def _wait_for(self, message: Message, kept: Kept, waiter: Waiter, until: float) -> Response:
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            while (left_s := until - time.monotonic()) > 0 and not stopping.done() and not waiter.ended.done():
                within_s = min(left_s, _ASK_AGAIN_S)
                await asyncio.wait((waiter.ended, stopping), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
                if not waiter.ended.done() and within_s == _ASK_AGAIN_S:
                    # What tells its end may have been lost with the broker, or come before we began to listen.
                    ended = await self._look(message, kept)
                    if ended is not None:
                        ended.headers.append((b"preference-applied", f"wait={message.wait_s:g}".encode()))
                        return ended
        finally:
            stopping.cancel()
        if not waiter.ended.done():
            return rendering.kept(message, kept, "working" if waiter.status is ItemStatus.DISPATCHED else "submitted")
        fact = waiter.ended.result()
        if fact.superseded_by is not None:
            return await self._wait(message, replace(kept, queue_id=fact.superseded_by), None)
        response = await self._ended(message, kept, fact)
        response.headers.append((b"preference-applied", f"wait={message.wait_s:g}".encode()))
        return response

    async def _ended(self, message: Message, kept: Kept, fact: ItemChanged) -> Response:
        if fact.answer is not None:
            return self._as_it_came(fact.answer, message, kept)
        return await self._look(message, kept) or rendering.kept(message, kept, "working")

    async def _look(self, message: Message, kept: Kept) -> Response | None:
        """The answer of an item that has ended; None: it has not, or the queue does not say."""
        found = await self._questions.item(kept.queue_id, message.caller)
        if isinstance(found, Refuse):
            return None
        item = found.read()
        if item.get("status") in _OPEN:
            return None
        if item.get("answer") is not None or item.get("answer_url") is not None:
            answer = await self._questions.answer(kept.queue_id, message.caller)
            if isinstance(answer, bytes):
                return self._as_it_came(answer, message, kept)
        ended = task_of_item(item, modern=message.dialect.modern)
        result = {"task": ended} if message.dialect.modern else ended
        return Response(200, result_body(result, message.request_id), headers=_ids(kept))

    def _as_it_came(self, answer: bytes, message: Message, kept: Kept) -> Response:
        task_id = read_result(answer).task_id
        if task_id is not None:
            self._copies.owners.tell(message.workspace_id, task_id, message.caller.caller_hash)
        wrapped = followed(answer, kept.queue_id, message.request_id) if message.dialect.modern else None
        return Response(200, wrapped or with_request_id(answer, message.request_id), headers=_ids(kept))


def _ids(kept: Kept) -> list[tuple[bytes, bytes]]:
    return [(b"x-queue-id", str(kept.queue_id).encode()), (b"location", f"/queue/{kept.queue_id}".encode())]


def _word(landed: Landed, status: int) -> str:
    match landed:
        case Kept():
            return "kept"
        case Passed():
            return "answered"
        case Refuse() if status < 500:  # noqa: PLR2004
            return "refused"
        case Refuse() | Broken():
            return "failed"
