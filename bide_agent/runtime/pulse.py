"""The heart in a thread of its own: a handler that blocks the agent's loop does not silence it, and beats say so.

The thread runs a loop for nothing else. Once a second it asks the agent's loop for an echo; how long that takes, or has
been taking, is the lag that beats tell: as `loop_lag_s`, and over a second in `runtime_state` too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from contextlib import suppress
from typing import Any, Self

from bide_agent.directives import Directives
from bide_agent.heart import RETRY_MAX_S, Heart
from bide_agent.runtime import told
from bide_agent.runtime.work import Work
from bide_agent.tokens import Tokens

ECHO_EVERY_S = 1.0
LAG_TOLD_S = 1.0
"""A lag over this is a state worth a sentence."""
END_S = 10.0
"""A beat in the middle of its request is waited for so long when the agent ends."""

log = logging.getLogger("bide_agent")


class Pulse:
    """What the heart beats for, and the thread in which it does. Without a Bide it is still."""

    def __init__(self, work: Work, directives: Directives, url: str) -> None:
        options = work.options
        self.url = url
        self.boot_id = uuid.uuid4().hex
        self.tokens = Tokens(options.workspace, options.token, options.folder)
        self.wake = asyncio.Event()
        self._work = work
        self._lag = Lag(asyncio.get_running_loop())
        self._main = asyncio.get_running_loop()
        self._own: asyncio.AbstractEventLoop | None = None
        self._heart = Heart(self, options.bide, directives) if options.bide else None
        self._thread = threading.Thread(target=self._run, name=f"heart of {options.workspace}", daemon=True)
        self._task: asyncio.Task[None] | None = None
        self._runs = threading.Event()
        self._started_at = time.monotonic()

    def __enter__(self) -> Self:
        self._work.on_fall.append(self.beat_now)
        if self._heart:
            self._thread.start()
            self._runs.wait()
        return self

    def __exit__(self, *_: object) -> None:
        own, task = self._own, self._task
        if own is not None and task is not None:
            with suppress(RuntimeError):
                own.call_soon_threadsafe(task.cancel)
            self._thread.join(END_S)

    @property
    def workspace(self) -> str:
        return self._work.workspace

    @property
    def heartbeat_s(self) -> float:
        return self._work.options.heartbeat_s

    @property
    def is_deaf(self) -> bool:
        return False

    @property
    def delivery_token(self) -> str | None:
        return self.tokens.delivery

    @property
    def lets_everybody_in(self) -> bool:
        """It belongs to no Bide, or to one that shows nothing when it calls."""
        return self._heart is None or (self.is_registered and self.tokens.delivery is None)

    @property
    def beats(self) -> int:
        return self._heart.beats if self._heart else 0

    @property
    def is_registered(self) -> bool:
        return self._heart is not None and self._heart.registered.is_set()

    def beat_now(self) -> None:
        """From any thread."""
        if self._own is not None:
            with suppress(RuntimeError):  # the heart has stopped
                self._own.call_soon_threadsafe(self.wake.set)

    def registration(self) -> dict[str, Any]:
        options = self._work.options
        return {
            "id": options.workspace,
            "url": self.url,
            "agent_card": told.card(options, self.url),
            "boot_id": self.boot_id,
            "max_concurrent_tasks": options.max_concurrent,
            "heartbeat_interval_s": options.heartbeat_s,
            "capabilities": ["control", "refuses_when_busy"],
        }

    def alive(self) -> dict[str, Any]:
        lag_s = self._lag.seconds
        return {
            "workspace_id": self.workspace,
            "active_tasks": self._work.turns.active,
            "boot_id": self.boot_id,
            "max_concurrent_tasks": self._work.options.max_concurrent,
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "progress": self._work.progress,
            "loop_lag_s": round(lag_s, 3),
            "runtime_state": f"the agent's loop lags {lag_s:.1f} s" if lag_s > LAG_TOLD_S else "ok",
        }

    def news_of_heart(self) -> None:
        with suppress(RuntimeError):  # the agent's loop has ended
            self._main.call_soon_threadsafe(self._work.news.tell)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._beat())

    async def _beat(self) -> None:
        assert self._heart is not None
        self._task = asyncio.current_task()
        self._own = asyncio.get_running_loop()
        self._runs.set()
        listening = asyncio.create_task(self._listen())
        try:
            await self._go_on(self._heart)
        finally:
            listening.cancel()

    async def _go_on(self, heart: Heart) -> None:
        """Beat for ever: what nobody has thought of, as a full disk under the token, costs a pause."""
        while True:
            try:
                await heart.run()
            except Exception:
                log.exception("heart_stumbled workspace=%s", self.workspace)
                await asyncio.sleep(RETRY_MAX_S)

    async def _listen(self) -> None:
        while True:
            self._lag.ask()
            await asyncio.sleep(min(ECHO_EVERY_S, self.heartbeat_s / 2))


class Lag:
    """How late a loop is: asked for an echo from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked_at: float | None = None
        self._last_s = 0.0

    @property
    def seconds(self) -> float:
        """How long the last echo took, or how long the next one has been out, whichever is more."""
        asked_at = self._asked_at
        out_s = 0.0 if asked_at is None else time.monotonic() - asked_at
        return max(self._last_s, out_s)

    def ask(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._echo, self._asked_at)

    def _echo(self, asked_at: float) -> None:
        self._last_s = time.monotonic() - asked_at
        self._asked_at = None
