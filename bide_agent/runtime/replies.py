"""What a caller reads: a turn's answer whole or as a stream, busy, or what is known of a Task.

A message whose item is known (`X-Queue-Id`) begins nothing: it is attached to the turn that runs, or reads the answer
that was kept. Only what is new needs a slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from bide_agent import shapes
from bide_agent.calls import INTERNAL_ERROR, TASK_NOT_CANCELABLE, TASK_NOT_FOUND, Call, Verb
from bide_agent.runtime import told
from bide_agent.runtime.turns import Ending, Turn
from bide_agent.runtime.work import Work
from bide_agent.server import Exchange

PREEMPTED = "preempted: the turn was given up for another one; send it again"


class Replies:
    """Answers calls whose caller is known."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def answer(self, exchange: Exchange, call: Call) -> None:
        if call.verb in {Verb.SEND, Verb.STREAM}:
            await self._message(exchange, call)
            return
        turn = self._work.task(call.task_id or "")
        if turn is not None:  # after its replica died, a message that was accepted is followed in another session
            self._work.attach(turn, *_item(exchange))
        if turn is None:
            await exchange.respond(
                200, shapes.error(call.request_id, TASK_NOT_FOUND, f"There is no task {call.task_id}.")
            )
        elif call.verb is Verb.SUBSCRIBE:
            await self._stream(exchange, call, turn)
        elif call.verb is Verb.CANCEL:
            await self._cancel(exchange, call, turn)
        else:
            await self._task(exchange, call, turn)

    async def _message(self, exchange: Exchange, call: Call) -> None:
        queue_id, session_id = _item(exchange)
        turn = self._work.found(queue_id, session_id)
        if turn is None:
            if self._work.turns.is_full:
                await self._busy(exchange, call)
                return
            delivery = _number(exchange.headers, "x-bide-delivery")
            turn = self._work.begin(call, queue_id=queue_id, delivery=delivery, session_id=session_id)
        if call.verb is Verb.STREAM:
            await self._stream(exchange, call, turn)
        elif call.at_once:
            await exchange.respond(200, shapes.result(call.request_id, told.task(call.dialect, turn)))
        elif await _ended(exchange, turn):
            await exchange.respond(200, _whole(call, turn))

    async def _busy(self, exchange: Exchange, call: Call) -> None:
        turns = self._work.turns
        sentence = f"busy: {turns.active} of {turns.max_concurrent} slots are taken; come again later"
        if turns.is_closed:
            sentence = "busy: this agent is about to end; come again later"
        body = shapes.error(call.request_id, INTERNAL_ERROR, sentence, "busy")
        await exchange.respond(503, body, retry_after=str(self._work.options.retry_after_s))

    async def _stream(self, exchange: Exchange, call: Call, turn: Turn) -> None:
        """The Task as it stands, then what the handler says as it says it, then how it ended."""

        async def write(shape: shapes.Json) -> None:
            await exchange.write(shapes.event(shapes.result(call.request_id, shape)))

        await exchange.begin(200, "text/event-stream", cache_control="no-store")
        said = len(turn.chunks)
        await write(told.task(call.dialect, turn))
        with turn.followed():
            while await _unless_gone(exchange, turn.more_than(said)):
                for chunk in turn.chunks[said:]:
                    await write(told.artifact_update(call.dialect, turn, chunk, is_first=said == 0))
                    said += 1
                if turn.ended.is_set() and said == len(turn.chunks):
                    await write(told.status_update(call.dialect, turn))
                    await exchange.finish()
                    return

    async def _task(self, exchange: Exchange, call: Call, turn: Turn) -> None:
        await exchange.respond(200, shapes.result(call.request_id, told.task(call.dialect, turn, wrapped=False)))

    async def _cancel(self, exchange: Exchange, call: Call, turn: Turn) -> None:
        if turn.ended.is_set():
            sentence = f"The task is {turn.state.value}; only a running one can be canceled."
            await exchange.respond(200, shapes.error(call.request_id, TASK_NOT_CANCELABLE, sentence))
            return
        turn.cancel("canceled", self._work.options.stop_grace_s)
        if await _ended(exchange, turn):
            await self._task(exchange, call, turn)


def _whole(call: Call, turn: Turn) -> bytes:
    match turn.ending:
        case Ending.GIVEN_BACK:
            return shapes.error(call.request_id, INTERNAL_ERROR, PREEMPTED, "preempted")
        case Ending.BROKEN:
            return shapes.error(call.request_id, INTERNAL_ERROR, turn.note or "The agent failed.")
        case _:
            return shapes.result(call.request_id, told.task(call.dialect, turn))


async def _ended(exchange: Exchange, turn: Turn) -> bool:
    """Wait for the end of the turn; false: the caller hung up, and the turn goes on."""
    with turn.followed():
        return await _unless_gone(exchange, turn.ended.wait())


async def _unless_gone(exchange: Exchange, awaited: Coroutine[Any, Any, Any]) -> bool:
    """Wait for `awaited`; false: the caller hung up first."""
    gone, done = asyncio.create_task(exchange.gone()), asyncio.create_task(awaited)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        return done.done()
    finally:
        gone.cancel()
        done.cancel()
        await asyncio.gather(gone, done, return_exceptions=True)


def _item(exchange: Exchange) -> tuple[str | None, str | None]:
    """Which message a request is about, and in which session of Bide's."""
    headers = exchange.headers
    return headers.get("x-queue-id") or None, headers.get("x-bide-session") or None


def _number(headers: Mapping[str, str], name: str) -> int:
    said = headers.get(name, "")
    return int(said) if said.isascii() and said.isdigit() else 0
