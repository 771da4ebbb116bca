"""The middle of the runtime: begins turns, runs the handler in each, and says how each ended."""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Any

from bide_agent.calls import Call
from bide_agent.decide import Result, decide
from bide_agent.directives import word
from bide_agent.news import News
from bide_agent.runtime import told
from bide_agent.runtime.folders import Folders
from bide_agent.runtime.options import Options
from bide_agent.runtime.parts import made
from bide_agent.runtime.session import Session
from bide_agent.runtime.store import Store
from bide_agent.runtime.turns import Ending, Turn, Turns
from bide_agent.runtime.words import SHUTDOWN, Answer, Asked, Checkpoint, Failed, Handler, message_of
from bide_agent.shapes import EXTENSION
from bide_agent.tasks import TaskState

TASKS_REMEMBERED = 100
"""Tasks that have ended and whose answers the store does not keep: failed, canceled, not through Bide, or no room."""
_OF_ITEM = uuid.UUID("6f9b5d58-2f4b-4a53-8a7b-0d7c6c1f2a61")
"""Names the contextIds that are made for messages without one: the same item, the same conversation."""

log = logging.getLogger("bide_agent")


class Work:
    """All turns of one agent. Used in the loop that made it; `act` and `advance` from any thread."""

    def __init__(self, handle: Handler, options: Options, store: Store) -> None:
        self.options = options
        self.workspace = options.workspace
        self.store = store
        self.news = News()
        self.turns = Turns(options.max_concurrent, self._fell)
        self.folders = Folders(options.folder / "sessions", lambda: [turn.context_id for turn in self.turns.running])
        self.on_fall: list[Any] = []
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, Turn] = {}
        self._past: dict[str, Turn] = {}
        self._progress = 0.0

    @property
    def progress(self) -> float:
        """Grows while work advances, and stands still in a turn that hangs."""
        return self._progress

    def advance(self, steps: float = 1.0) -> None:
        self._progress += steps

    def found(self, queue_id: str | None, session_id: str | None) -> Turn | None:
        """The turn that works on an item or has answered it; a delivery that finds it running is attached."""
        if queue_id is None:
            return None
        running = self.turns.of_item(queue_id)
        if running is not None:
            self.attach(running, queue_id, session_id)
            log.info("attached queue_id=%s session=%s", queue_id, session_id)
            return running
        kept = self.store.answer(queue_id)
        return self._past_answer(queue_id) if kept is None else told.again(kept)

    def _past_answer(self, queue_id: str) -> Turn | None:
        """An answer that the disk did not take."""
        answered = (turn for turn in self._past.values() if turn.ending is not None and turn.ending.is_kept)
        return next((turn for turn in answered if turn.queue_id == queue_id), None)

    def attach(self, turn: Turn, queue_id: str | None, session_id: str | None) -> None:
        """Know a turn by one more session: of a delivery that joined it, or one that only asks for its Task."""
        if session_id and queue_id == turn.queue_id:
            turn.session_ids.add(session_id)
        self.news.tell()

    def task(self, task_id: str) -> Turn | None:
        known = self._tasks.get(task_id) or self._past.get(task_id)
        if known is not None:
            return known
        kept = self.store.answer_of_task(task_id)
        return None if kept is None else told.again(kept)

    def begin(self, call: Call, *, queue_id: str | None, delivery: int, session_id: str | None) -> Turn:
        """Take a slot and start the handler. Whether a slot is free is the caller's question."""
        context_id = call.context_id or str(uuid.uuid5(_OF_ITEM, queue_id) if queue_id else uuid.uuid4())
        turn = Turn(
            context_id=context_id,
            queue_id=queue_id,
            delivery=delivery,
            session_ids={session_id} if session_id else set(),
            on_change=self.news.tell,
        )
        self._tasks[turn.task_id] = turn
        held = ExitStack()
        held.enter_context(self.turns.slot(turn))  # now, not when the task first runs: the next message may be here
        turn.task = asyncio.create_task(self._run(turn, call), name=f"turn {queue_id or turn.task_id}")
        turn.task.add_done_callback(partial(self._ended, turn, held))
        self.news.tell()
        return turn

    async def _run(self, turn: Turn, call: Call) -> None:
        try:
            answer = await self._answered(turn, call)
        except Checkpoint as checkpoint:
            self._say(turn, checkpoint.partial)
            _end_early(turn, checkpoint.asked)
        except Failed as failed:
            self._say(turn, failed.partial)
            turn.end(Ending.FAILED, TaskState.FAILED, note=str(failed))
        except asyncio.CancelledError:
            _end_canceled(turn)
        except (Exception, SystemExit) as error:  # what a handler calls may think that it is a program
            log.exception("handler_failed queue_id=%s", turn.queue_id)
            turn.end(Ending.BROKEN, TaskState.FAILED, note=f"The agent failed: {type(error).__name__}.")
        else:
            turn.end(Ending.DONE, TaskState(answer.state), metadata=answer.metadata)

    def _ended(self, turn: Turn, held: ExitStack, task: asyncio.Task[None]) -> None:
        """Free the slot, however the task ended: one that is canceled before it began runs no line of its own."""
        is_kept = False
        with held:
            if turn.ending is None and not task.cancelled():
                turn.end(Ending.BROKEN, TaskState.FAILED, note=f"The agent failed: {type(task.exception()).__name__}.")
            elif turn.ending is None:
                _end_canceled(turn)
            elif turn.queue_id and turn.ending.is_kept:
                is_kept = self.store.keep_answer(turn.queue_id, turn.task_id, told.kept(turn))
        self._remember(turn, is_kept=is_kept)
        ending = turn.ending.value if turn.ending else None
        log.info("turn_ended queue_id=%s ending=%s state=%s", turn.queue_id, ending, turn.state.value)

    def _remember(self, turn: Turn, *, is_kept: bool) -> None:
        del self._tasks[turn.task_id]
        if not is_kept:
            self._past[turn.task_id] = turn
            while len(self._past) > TASKS_REMEMBERED:
                del self._past[next(iter(self._past))]

    async def _answered(self, turn: Turn, call: Call) -> Answer:
        given: Any = self._handle(message_of(call), Session(turn, self))
        if inspect.isawaitable(given):
            given = await given
        if hasattr(given, "__aiter__"):
            return await self._streamed(turn, given)
        answer = given if isinstance(given, Answer) else Answer(given)
        turn.say(made(answer.content))
        return answer

    async def _streamed(self, turn: Turn, chunks: AsyncIterator[Any]) -> Answer:
        answer = Answer(None)
        async with aclosing(_closable(chunks)) as closing:
            async for chunk in closing:
                answer = chunk if isinstance(chunk, Answer) else answer
                turn.say(made(chunk.content if isinstance(chunk, Answer) else chunk))
                self.advance()
        return answer

    def _say(self, turn: Turn, partial: Any) -> None:
        try:
            turn.say(made(partial))
        except TypeError:
            log.exception("partial_unfit queue_id=%s", turn.queue_id)

    def act(self, directive: Mapping[str, Any]) -> Result:
        """Do what a directive asks, to the turns of its session."""
        kind, reason, session_id = (word(directive, name) for name in ("kind", "reason", "session_id"))
        turns = self.turns.of_session(session_id) if session_id else []
        result = decide(
            kind, reason, checkpoint=self.options.checkpoint, stop="obey", runs=bool(turns), hears=True
        )  # fmt: skip
        for turn in turns:
            if result is Result.STOPPING:
                self._loop.call_soon_threadsafe(turn.cancel, "stop", self.options.stop_grace_s)
            elif kind == "checkpoint":
                asked = Asked(reason or "", _moment(word(directive, "deadline")), ends=result is Result.SAVING)
                turn.ask(asked, self._loop)
        return Result.ASKED if result is Result.SAVING else result

    async def close(self) -> None:
        """Take nothing new, and give back what has not ended in time, also what outlives its cancelation."""
        await self.turns.close(self.options.grace_s, self.options.stop_grace_s)
        for turn in self.turns.running:
            log.warning("turn_abandoned queue_id=%s", turn.queue_id)
            _end_early(turn, Asked(SHUTDOWN))
            turn.close()

    def _fell(self) -> None:
        for tell in self.on_fall:
            tell()
        self.news.tell()


async def _closable(chunks: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """Any iterator as a generator, which can be closed; closes what it goes over, if that can be."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        if hasattr(chunks, "aclose"):
            await chunks.aclose()


def _end_early(turn: Turn, asked: Asked) -> None:
    if asked.is_given_back:
        turn.end(
            Ending.GIVEN_BACK, TaskState.CANCELED, metadata={EXTENSION: {"preempted": True, "reason": asked.reason}}
        )
    else:
        turn.end(
            Ending.SAVED, TaskState.COMPLETED, metadata={EXTENSION: {"checkpointed": True, "reason": asked.reason}}
        )


def _end_canceled(turn: Turn) -> None:
    if turn.stopped_for is None:
        turn.end(Ending.BROKEN, TaskState.FAILED, note="The agent failed: it canceled its own work.")
    elif turn.asked is not None and turn.stopped_for == turn.asked.reason and turn.asked.is_given_back:
        _end_early(turn, turn.asked)
    else:
        turn.end(Ending.CANCELED, TaskState.CANCELED)


def _moment(said: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(said) if said else None
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
