"""What a handler works with: one turn of one conversation, seen from inside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bide_agent.runtime.words import Asked, Checkpoint

if TYPE_CHECKING:
    from bide_agent.runtime.turns import Turn
    from bide_agent.runtime.work import Work


class Session:
    """One turn. A new contextId is a new conversation; within one, each message is a turn with a session of its own.

    `id` is the contextId; `queue_id` names the message for Bide, however often it is delivered. Both are empty-handed
    for a fire of a schedule: it begins a new conversation, and knows of earlier ones what the agent itself kept.
    """

    def __init__(self, turn: Turn, work: Work) -> None:
        self._turn = turn
        self._work = work
        self.id = turn.context_id
        self.workspace = work.workspace
        self.task_id = turn.task_id
        self.queue_id = turn.queue_id
        self.delivery = turn.delivery
        """How often Bide has delivered this message, this time included; 0: straight from its caller."""
        self.saved: Any = work.store.saved(turn.queue_id) if turn.queue_id else None
        """What an earlier delivery of the same message saved; None: nothing, or there was none."""

    @property
    def folder(self) -> Path:
        """A working directory of this conversation's own, made when first asked for."""
        return self._work.folders.of(self.id)

    @property
    def asked(self) -> Asked | None:
        """What Bide asks of this turn now. May be read from any thread, also while the loop is blocked."""
        return self._turn.asked

    async def until_asked(self) -> Asked:
        """Come back when the turn is asked to end, for a handler that waits for something long."""
        return await self._turn.until_asked()

    async def checkpoint(self, partial: Any = None) -> None:
        """Stand between two tool calls: the turn goes on, unless Bide has asked for its end.

        `partial` is what there is of the answer. It becomes the answer, marked as cut short, or, where a critical
        message takes the turn's place, the message is given back and delivered again: `save` before.

        Raises:
            Checkpoint: the turn is to end here; let it pass.
        """
        self.progress()
        await asyncio.sleep(0)  # let in what waits: directives, beats, a stop
        asked = self._turn.asked
        if asked is not None and asked.ends:
            raise Checkpoint(asked, partial)

    def save(self, state: Any) -> None:
        """Keep `state` (JSON, up to 1 MiB) for the next delivery of this message, which finds it as `saved`.

        On disk when it returns. Forgotten when the message has its answer. A message that did not come through Bide
        is never delivered again, and nothing is kept for it.

        Raises:
            ValueError, TypeError: it is too large, or no JSON.
            sqlite3.Error: it could not be written, as on a full disk.
        """
        self.progress()
        if self.queue_id:
            self._work.store.save(self.queue_id, state)
        self.saved = state

    def progress(self, steps: float = 1.0) -> None:
        """Tell that work advances: heartbeats carry a number that grows with this. Any thread may."""
        self._work.advance(steps)

    def stop_with(self, stop: Callable[[], None]) -> None:
        """Have `stop()` called, should the handler outlive its cancelation: for what it started and must not leave."""
        self._turn.leftovers.append(stop)
