"""What becomes of a message: a turn with its answer, or one of the fates of `behaviour.py`.

The slot is always free before the last byte leaves: who reads the answer and sends the next message at once must not
meet the slot of the last one.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bide_agent import calls, shapes
from bide_agent.behaviour import TURN_FATES, Behaviour, Fate
from bide_agent.calls import Call, Verb
from bide_agent.record import Received
from bide_agent.server import Exchange
from bide_agent.shapes import Json
from bide_agent.state import State
from bide_agent.tasks import Task, TaskState
from bide_agent.turns import Ending, Turn

DEATH = 70
"""Exit code of an agent that was told to die."""
PREEMPTED = "preempted: the turn was given up for another one; send it again"


class Messages:
    """Answers calls whose caller is known and for which a slot is free."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for the Tasks that nobody waits for; their turns have been cut."""
        await asyncio.gather(*self._background)

    async def answer(self, exchange: Exchange, call: Call, one: Received) -> None:
        match call.verb:
            case Verb.SEND | Verb.STREAM:
                await self._message(exchange, call, one)
            case Verb.GET:
                await self._get(exchange, call)
            case Verb.CANCEL:
                await self._cancel(exchange, call)

    async def _message(self, exchange: Exchange, call: Call, one: Received) -> None:
        behaviour = self._state.behaviour
        fate = self._state.spend(TURN_FATES)
        with ExitStack() as held:
            turn = held.enter_context(self._turn(one, fate))
            if behaviour.dies and call.text.strip() == "die":
                os._exit(DEATH)
            task = Task(
                context_id=call.context_id or str(uuid.uuid4()), text=call.text, metadata=_metadata(one), turn=turn
            )
            await turn.work(behaviour.slow_s)
            if turn.was_cut:
                held.close()
                await exchange.drop()
            elif fate and fate is not Fate.HALF_ANSWER:
                await self._misbehave(exchange, call, fate, turn, held)
            elif behaviour.asynchronous or call.at_once:
                await self._answer_at_once(exchange, call, task, held)
            elif call.verb is Verb.STREAM:
                await self._stream(exchange, call, task, held, fate)
            else:
                await self._answer_whole(exchange, call, task, held, fate)

    @contextmanager
    def _turn(self, one: Received, fate: Fate | None) -> Iterator[Turn]:
        turns, record = self._state.turns, self._state.record
        outcome = "cut_short"
        try:
            with turns.begin(session_id=one.session, advances=fate is not Fate.SILENT) as turn:
                record.begin(one, active=turns.active)
                yield turn
            outcome = _outcome(turn, fate)
        finally:
            record.end(one, active=turns.active, outcome=outcome)

    async def _misbehave(self, exchange: Exchange, call: Call, fate: Fate, turn: Turn, held: ExitStack) -> None:
        if fate is Fate.SILENT:
            turn.on_asked = exchange.hang_up
            await exchange.gone()
        held.close()
        match fate:
            case Fate.CUT:
                await exchange.drop()
            case Fate.FAILING:
                await exchange.respond(500, b"the agent failed\n", "text/plain")
            case Fate.FAILING_RPC:
                await exchange.respond(200, shapes.error(call.request_id, calls.INTERNAL_ERROR, "the agent failed"))
            case Fate.REFUSING:
                sentence = "the agent refuses this message; sending it again does not help"
                await exchange.respond(200, shapes.error(call.request_id, calls.INVALID_PARAMS, sentence))
            case Fate.PREEMPTED:
                await exchange.respond(200, _preempted(call))

    async def _answer_at_once(self, exchange: Exchange, call: Call, task: Task, held: ExitStack) -> None:
        self._state.tasks.add(task)
        first = shapes.result(call.request_id, shapes.task(call.dialect, task))
        work = asyncio.create_task(self._finish(task, self._state.behaviour.work_s, held.pop_all()))
        self._background.add(work)
        work.add_done_callback(self._background.discard)
        if call.verb is Verb.STREAM:
            await exchange.begin(200, "text/event-stream", cache_control="no-store")
            await exchange.write(shapes.event(first))
            await exchange.finish()
        else:
            await exchange.respond(200, first)

    async def _finish(self, task: Task, work_s: float, held: ExitStack) -> None:
        with held:
            await task.turn.work(work_s)
            _end(task)

    async def _stream(self, exchange: Exchange, call: Call, task: Task, held: ExitStack, fate: Fate | None) -> None:
        def event(shape: Json) -> bytes:
            return shapes.event(shapes.result(call.request_id, shape))

        self._state.tasks.add(task)
        task.text += "x" * (self._state.behaviour.huge - len(task.text))
        await exchange.begin(200, "text/event-stream", cache_control="no-store")
        await exchange.write(event(shapes.task(call.dialect, task)))
        await task.turn.work(self._state.behaviour.work_s)
        _end(task)
        held.close()
        if task.turn.was_cut or fate:
            await exchange.drop()
            return
        if task.state is TaskState.COMPLETED:
            await exchange.write(event(shapes.artifact_update(call.dialect, task)))
        await exchange.write(event(shapes.status_update(call.dialect, task)))
        await exchange.finish()

    async def _answer_whole(
        self, exchange: Exchange, call: Call, task: Task, held: ExitStack, fate: Fate | None
    ) -> None:
        behaviour = self._state.behaviour
        if behaviour.answer == "task":
            self._state.tasks.add(task)
        await task.turn.work(behaviour.work_s)
        _end(task)
        held.close()
        match task.turn.ending:
            case Ending.CUT:
                await exchange.drop()
                return
            case Ending.GIVEN_BACK:
                body = _preempted(call)
            case Ending.CANCELED:
                # A Message cannot say canceled: whoever waited for one is told of a Task.
                body = shapes.result(call.request_id, shapes.task(call.dialect, self._state.tasks.add(task)))
            case _:
                body = _whole(call, task, behaviour)
        if fate:
            await exchange.begin(200, "application/json", content_length=str(len(body)))
            await exchange.write(body[: len(body) // 2])
            await exchange.drop()
        else:
            await exchange.respond(200, body)

    async def _get(self, exchange: Exchange, call: Call) -> None:
        task = self._state.tasks.get(call.task_id or "")
        if task is None:
            await exchange.respond(200, _no_task(call))
        elif time.monotonic() < task.began_at + self._state.behaviour.polls_fail_s:
            await exchange.respond(500, b"the agent cannot say\n", "text/plain")
        else:
            said = shapes.task(call.dialect, task, wrapped=False)
            await exchange.respond(200, shapes.result(call.request_id, said))

    async def _cancel(self, exchange: Exchange, call: Call) -> None:
        task = self._state.tasks.get(call.task_id or "")
        if task is None:
            await exchange.respond(200, _no_task(call))
        elif task.ended.is_set():
            sentence = f"The task is {task.state.value}; only a running one can be canceled."
            await exchange.respond(200, shapes.error(call.request_id, calls.TASK_NOT_CANCELABLE, sentence))
        elif self._state.behaviour.stop == "ignore":
            sentence = "This agent does not stop what it has begun; the task goes on."
            await exchange.respond(200, shapes.error(call.request_id, calls.TASK_NOT_CANCELABLE, sentence))
        else:
            task.turn.cancel()
            await task.ended.wait()
            said = shapes.task(call.dialect, task, wrapped=False)
            await exchange.respond(200, shapes.result(call.request_id, said))


def _no_task(call: Call) -> bytes:
    return shapes.error(call.request_id, calls.TASK_NOT_FOUND, f"There is no task {call.task_id}.")


def _preempted(call: Call) -> bytes:
    return shapes.error(call.request_id, calls.INTERNAL_ERROR, PREEMPTED, "preempted")


def _whole(call: Call, task: Task, behaviour: Behaviour) -> bytes:
    def whole(text: str) -> bytes:
        if behaviour.answer == "task":
            task.text = text
            return shapes.result(call.request_id, shapes.task(call.dialect, task))
        said = shapes.message(call.dialect, text=text, context_id=task.context_id, metadata=task.metadata)
        return shapes.result(call.request_id, said)

    return shapes.padded(call.text, behaviour.huge, whole)


def _metadata(one: Received) -> Json:
    return {shapes.EXTENSION: {"queue_id": one.queue_id, "delivery": one.delivery}}


def _end(task: Task) -> None:
    """End a Task; one that ended early says so and why. The slot is to be freed in the same step (`Task.end`)."""
    mark = {Ending.SAVED: "checkpointed", Ending.GIVEN_BACK: "preempted"}.get(task.turn.ending)
    if mark:
        said = {**task.metadata[shapes.EXTENSION], mark: True, "reason": task.turn.saved_for}
        task.metadata = {**task.metadata, shapes.EXTENSION: said}
    task.end()


def _outcome(turn: Turn, fate: Fate | None) -> str:
    if fate and turn.ending not in {Ending.CUT, Ending.CANCELED}:
        return fate.value
    return turn.ending.value
