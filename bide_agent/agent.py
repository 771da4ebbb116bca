"""One agent as a library: `async with running(Options(workspace="w1", bide=url, token=token)) as agent:`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from bide_agent.behaviour import Behaviour
from bide_agent.directives import Directives
from bide_agent.door import Door
from bide_agent.heart import Heart
from bide_agent.messages import Messages
from bide_agent.options import Options
from bide_agent.record import Received
from bide_agent.server import listen, serving
from bide_agent.state import State


class Agent:
    """A running agent, seen from outside."""

    def __init__(self, state: State, heart: Heart | None, directives: Directives) -> None:
        self._state = state
        self._directives = directives
        self._heart = heart

    @property
    def url(self) -> str:
        return self._state.url

    @property
    def workspace(self) -> str:
        return self._state.options.workspace

    @property
    def boot_id(self) -> str:
        return self._state.boot_id

    @property
    def active(self) -> int:
        return self._state.turns.active

    @property
    def behaviour(self) -> Behaviour:
        return self._state.behaviour

    @property
    def received(self) -> Sequence[Received]:
        """Every message that began a turn, in that order; `ended_at` is None while it runs."""
        return self._state.record.begun

    @property
    def refused(self) -> Sequence[Received]:
        """Every message that began none; `outcome` says why."""
        return self._state.record.refused

    @property
    def registered(self) -> bool:
        return self._heart is not None and self._heart.registered.is_set()

    @property
    def incarnation(self) -> int | None:
        return self._heart.incarnation if self._heart else None

    @property
    def beats(self) -> int:
        """Heartbeats that Bide has taken."""
        return self._heart.beats if self._heart else 0

    @property
    def sessions(self) -> Sequence[str]:
        """The ids under which Bide knows the turns that run (`X-Bide-Session`), oldest first."""
        return self._state.turns.session_ids

    @property
    def directives(self) -> Sequence[dict[str, Any]]:
        """Each once, as it came, whether in the reply to a beat or over HTTP."""
        return list(self._directives.heard)

    def behave(self, **changes: Any) -> None:
        """Behave differently from now on (`Behaviour`, and `busy_s`). Raises `BehaviourError`; then nothing changed."""
        self._state.behave(changes)

    def busy_for(self, seconds: float, tasks: int | None = None) -> None:
        """Do work of its own for so long, on `tasks` slots (default: all); 0 ends it.

        Bide hears of it with the next beat, or of a refusal; `beat_now` tells it at once.
        """
        self._state.turns.busy_for(seconds, tasks)

    def beat_now(self) -> None:
        self._state.wake.set()

    async def until(self, holds: Callable[[], bool], within_s: float = 30.0) -> None:
        """Come back when `holds`, asked at every message, beat and change. Raises `TimeoutError`."""
        await self._state.news.until(holds, within_s)


@asynccontextmanager
async def running(options: Options) -> AsyncIterator[Agent]:
    """Run an agent for the length of the block. It serves at once; Bide may come later (`agent.registered`).

    At the end no more beats are sent, running turns have `grace_s` to end, and what is left is hung up on.

    Raises:
        OSError: the port is taken, or the record cannot be opened.
        BehaviourError: `options.behaviour` names what there is not.
    """
    listener = listen(options.port)
    with listener:
        state = State(options, url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        messages = Messages(state)
        directives = Directives(state)
        heart = Heart(state, options.bide, directives) if options.bide else None
        with state.record:
            async with serving(Door(state, messages, directives), listener):
                try:
                    async with _beating(heart):
                        yield Agent(state, heart, directives)
                finally:
                    await state.turns.close(options.grace_s)
                    await messages.close()


@asynccontextmanager
async def _beating(heart: Heart | None) -> AsyncIterator[None]:
    task = asyncio.create_task(heart.run(), name="agent heart") if heart else None
    try:
        yield
    finally:
        if task:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
