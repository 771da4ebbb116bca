"""What an agent is doing: its turns, its own foreign work, how each ends, and the number that heartbeats tell.

Everything counted here is taken off in a `finally`: a count that leaks would make the agent busy for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial

from bide_agent.decide import gives_back

FOREIGN = "foreign:"
"""How the id of a session begins that Bide opened for work which none of its messages explains."""
RESTART = "restart:"
"""How the id of a directive's session begins that means all that runs: the agent is about to be restarted."""


class Ending(Enum):
    """How a turn ends; the values are the outcomes in the record."""

    DONE = "answered"
    SAVED = "checkpointed"
    GIVEN_BACK = "preempted"
    CANCELED = "canceled"
    CUT = "cut_short"


class Turn:
    """One piece of work. It ends when its holder says so; `save`, `cancel` and `cut` only ask.

    One that does not advance hangs, and hears nothing but the cut.
    """

    def __init__(self, *, session_id: str | None = None, advances: bool = True) -> None:
        self.session_id = session_id
        self.advances = advances
        self.began_at = time.monotonic()
        self.saved_for: str | None = None
        self.canceled = False
        self.was_cut = False
        self.on_asked: Callable[[], None] | None = None
        self._asked = asyncio.Event()
        self._saving = False

    @property
    def ending(self) -> Ending:
        """How it ends if it ends now: the harshest of what it was asked."""
        if self.was_cut:
            return Ending.CUT
        if self.canceled:
            return Ending.CANCELED
        if self.saved_for is None:
            return Ending.DONE
        return Ending.GIVEN_BACK if gives_back(self.saved_for) else Ending.SAVED

    async def work(self, seconds: float) -> None:
        """Work for so long, or until the turn is saved, canceled or cut."""
        if seconds <= 0:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()

    def save(self, reason: str, after_s: float) -> None:
        """End early in `after_s`; where that was asked before, the first reason and time hold.

        A turn that is done by then was not cut short, and answers as ever.
        """
        if self.advances and not self._saving:
            self._saving = True
            asyncio.get_running_loop().call_later(after_s, self._saved, reason)

    def cancel(self) -> None:
        if self.advances:
            self.canceled = True
            self._ask()

    def cut(self) -> None:
        """The agent ends: no answer is owed any more."""
        self.was_cut = True
        self._ask()

    def _saved(self, reason: str) -> None:
        self.saved_for = reason
        self._ask()

    def _ask(self) -> None:
        self._asked.set()
        if self.on_asked:
            self.on_asked()


class Turns:
    """The slots of one agent. `on_fall` is called whenever fewer are taken than before."""

    def __init__(self, max_concurrent: int, on_fall: Callable[[], None]) -> None:
        self.max_concurrent = max_concurrent
        self._on_fall = on_fall
        self._running: set[Turn] = set()
        self._foreign: list[Turn] = []
        self._foreign_ends: asyncio.TimerHandle | None = None
        self._done_s = 0.0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        return len(self._running) + len(self._foreign)

    @property
    def full(self) -> bool:
        return self._closed or self.active >= self.max_concurrent

    @property
    def progress(self) -> float:
        """Seconds worked since the start: grows while work advances, and stands still in a turn that hangs."""
        now = time.monotonic()
        running = (now - turn.began_at for turn in (*self._running, *self._foreign) if turn.advances)
        return round(self._done_s + sum(running), 6)

    @property
    def session_ids(self) -> list[str]:
        """The sessions whose turns run, oldest first; foreign work has none that an agent could know."""
        running = sorted(self._running, key=lambda turn: turn.began_at)
        return [turn.session_id for turn in running if turn.session_id is not None]

    def of(self, session_id: str) -> list[Turn]:
        """What runs in a session; in a foreign one, all of the agent's own work; in a restart, everything."""
        if session_id.startswith(FOREIGN):
            return [*self._foreign]
        if session_id.startswith(RESTART):
            return [*self._running, *self._foreign]
        return [turn for turn in self._running if turn.session_id == session_id]

    @contextmanager
    def begin(self, *, session_id: str | None = None, advances: bool = True) -> Iterator[Turn]:
        """Take a slot for the length of the block. Whether one is free is the caller's question (`full`)."""
        turn = Turn(session_id=session_id, advances=advances)
        self._running.add(turn)
        self._idle.clear()
        try:
            yield turn
        finally:
            self._running.discard(turn)
            self._finished(turn)
            if not self._running:
                self._idle.set()
            self._on_fall()

    def busy_for(self, seconds: float, tasks: int | None = None) -> None:
        """Do foreign work from now on: `tasks` slots (default: all) for so long; 0 ends what there is."""
        before = self.active
        self._end_foreign()
        if seconds > 0:
            self._foreign = [Turn() for _ in range(self.max_concurrent if tasks is None else tasks)]
            for turn in self._foreign:
                turn.on_asked = partial(self._give_up, turn)
            self._foreign_ends = asyncio.get_running_loop().call_later(seconds, self.busy_for, 0)
        if self.active < before:
            self._on_fall()

    async def close(self, grace_s: float) -> None:
        """Take nothing new, let running turns end for `grace_s`, then cut them; hung ones are cut at once."""
        self._closed = True
        self._end_foreign()
        for turn in [turn for turn in self._running if not turn.advances]:
            turn.cut()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        for turn in [*self._running]:
            turn.cut()

    def _give_up(self, foreign: Turn) -> None:
        # A save that was asked of earlier work says nothing about what runs now.
        if foreign in self._foreign:
            self.busy_for(0)

    def _end_foreign(self) -> None:
        if self._foreign_ends:
            self._foreign_ends.cancel()
        self._foreign_ends = None
        for turn in self._foreign:
            self._finished(turn)
        self._foreign = []

    def _finished(self, turn: Turn) -> None:
        if turn.advances:
            self._done_s += time.monotonic() - turn.began_at
