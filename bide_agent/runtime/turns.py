"""The turns of one agent: what each has said, what it was asked, how it ended, and the slots they take.

A turn belongs to no connection: it goes on when its caller hangs up, and whoever asks for the same message again is
attached to it. Counting stands in one place, and what is counted is taken off in a `finally`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from bide_agent.decide import NEVER_EARLY
from bide_agent.runtime.parts import Part, joined
from bide_agent.runtime.words import SHUTDOWN, Asked
from bide_agent.tasks import TaskState
from bide_agent.turns import FOREIGN, RESTART

HARD = NEVER_EARLY | {SHUTDOWN}
"""What a turn is asked for one of these reasons outranks what it was asked as a favour."""


class Ending(Enum):
    """How a turn ended. The first two are the last word on its message; after the others it may run again."""

    DONE = "done"
    SAVED = "saved"
    GIVEN_BACK = "given_back"
    CANCELED = "canceled"
    FAILED = "failed"
    BROKEN = "broken"

    @property
    def is_kept(self) -> bool:
        return self in {Ending.DONE, Ending.SAVED}


@dataclass(eq=False, slots=True, kw_only=True)
class Turn:
    """One turn, with the Task that stands for it."""

    context_id: str
    queue_id: str | None = None
    delivery: int = 0
    session_ids: set[str] = field(default_factory=set)
    """Under which Bide knows it: another one with each delivery that was attached."""
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: TaskState = TaskState.WORKING
    changed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    chunks: list[list[Part]] = field(default_factory=list)
    note: str | None = None
    """What is said beside the state: why it failed."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ending: Ending | None = None
    asked: Asked | None = None
    stopped_for: str | None = None
    task: asyncio.Task[None] | None = None
    leftovers: list[Callable[[], None]] = field(default_factory=list)
    followers: int = 0
    was_left: bool = False
    """Somebody who waited for it has hung up."""
    on_change: Callable[[], None] = lambda: None
    """Called when somebody begins or ceases to wait for it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _asked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def parts(self) -> list[Part]:
        return joined(part for chunk in self.chunks for part in chunk)

    @property
    def is_orphan(self) -> bool:
        return self.was_left and not self.followers

    def say(self, parts: list[Part]) -> None:
        if parts:
            self.chunks.append(parts)
            self._tell()

    def ask(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        """Note what Bide asks. From any thread: a handler that blocks the loop may look at it nevertheless."""
        weaker = self.asked is not None and self.asked.ends and asked.reason not in HARD
        if not weaker:
            self.asked = asked
        with suppress(RuntimeError):  # the loop has ended, and the turn with it
            loop.call_soon_threadsafe(self._asked.set)

    async def until_asked(self) -> Asked:
        while self.asked is None or not self.asked.ends:
            self._asked.clear()
            await self._asked.wait()
        return self.asked

    def cancel(self, why: str, insist_after_s: float) -> None:
        """Cancel the handler. One that goes on is told again, and what it started is stopped without it."""
        if self.task is None or self.ended.is_set():
            return
        self.stopped_for = self.stopped_for or why
        self.task.cancel()
        asyncio.get_running_loop().call_later(insist_after_s, self._insist)

    def end(
        self, ending: Ending, state: TaskState, *, note: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.ending, self.state, self.note = ending, state, note
        self.metadata = {**self.metadata, **(metadata or {})}
        self.changed_at = datetime.now(UTC)

    def close(self) -> None:
        """Tell who waits. Its slot is to be freed in the same step, with no await in between."""
        self.ended.set()
        self._tell()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Wait for the turn, for the length of the block; one that ends before the turn has hung up."""
        self.followers += 1
        self.on_change()
        try:
            yield
        finally:
            self.followers -= 1
            self.was_left = self.was_left or not self.ended.is_set()
            self.on_change()

    async def more_than(self, said: int) -> None:
        """Come back when there are more than `said` chunks, or the turn has ended."""
        while len(self.chunks) <= said and not self.ended.is_set():
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _insist(self) -> None:
        if not self.ended.is_set() and self.task is not None:
            for stop in self.leftovers:
                stop()
            self.task.cancel()


class Turns:
    """The slots. `on_fall` is called whenever fewer are taken than before."""

    def __init__(self, max_concurrent: int, on_fall: Callable[[], None]) -> None:
        self.max_concurrent = max_concurrent
        self._on_fall = on_fall
        self._running: dict[str, Turn] = {}
        self._own = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_closed = False

    @property
    def active(self) -> int:
        return len(self._running) + self._own

    @property
    def is_full(self) -> bool:
        return self.is_closed or self.active >= self.max_concurrent

    @property
    def running(self) -> list[Turn]:
        return list(self._running.values())

    def of_item(self, queue_id: str) -> Turn | None:
        return next((turn for turn in self.running if turn.queue_id == queue_id), None)

    def of_session(self, session_id: str) -> list[Turn]:
        """What runs in a session of Bide's; in a foreign one, the turns that nobody waits for; in a restart, all."""
        if session_id.startswith(RESTART):
            return self.running
        if session_id.startswith(FOREIGN):
            return [turn for turn in self.running if turn.is_orphan]
        return [turn for turn in self.running if session_id in turn.session_ids]

    @contextmanager
    def slot(self, turn: Turn) -> Iterator[None]:
        """Take a slot for the length of the block. Whether one is free is the caller's question (`is_full`)."""
        self._running[turn.task_id] = turn
        self._idle.clear()
        try:
            yield
        finally:
            del self._running[turn.task_id]
            if not self._running:
                self._idle.set()
            turn.close()
            self._on_fall()

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Count work that no message asked for, for the length of the block."""
        self._own += 1
        try:
            yield
        finally:
            self._own -= 1
            self._on_fall()

    async def close(self, grace_s: float, stop_grace_s: float) -> None:
        """Take nothing new; ask what runs to end within `grace_s`, then cancel it, and wait for that."""
        self.is_closed = True
        loop = asyncio.get_running_loop()
        for turn in self.running:
            turn.ask(Asked(SHUTDOWN, datetime.fromtimestamp(datetime.now(UTC).timestamp() + grace_s, UTC)), loop)
        await self._until_idle(grace_s)
        for turn in self.running:
            turn.cancel(SHUTDOWN, stop_grace_s)
        await self._until_idle(stop_grace_s * 2)

    async def _until_idle(self, within_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
