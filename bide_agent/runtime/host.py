"""An agent around a handler: `serve(handle, workspace=…, bide=…, token=…)`, or `async with hosted(…)` in a loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from bide_agent.decide import Result
from bide_agent.directives import Directives
from bide_agent.runtime.door import Door
from bide_agent.runtime.options import Options
from bide_agent.runtime.pulse import Pulse
from bide_agent.runtime.replies import Replies
from bide_agent.runtime.sdk import Executor, adapted
from bide_agent.runtime.store import Store
from bide_agent.runtime.told import card
from bide_agent.runtime.words import Handler
from bide_agent.runtime.work import Work
from bide_agent.server import listen, serving

LEAVE_S = 5.0
"""When all callers have been answered, a process is not held open for longer: asyncio would wait for ever."""

log = logging.getLogger("bide_agent")


class Host:
    """A running agent, seen from outside."""

    def __init__(self, work: Work, pulse: Pulse, directives: Directives) -> None:
        self._work = work
        self._pulse = pulse
        self._directives = directives

    @property
    def url(self) -> str:
        return self._pulse.url

    @property
    def workspace(self) -> str:
        return self._work.workspace

    @property
    def boot_id(self) -> str:
        return self._pulse.boot_id

    @property
    def active(self) -> int:
        return self._work.turns.active

    @property
    def registered(self) -> bool:
        return self._pulse.is_registered

    @property
    def beats(self) -> int:
        """Heartbeats that Bide has taken."""
        return self._pulse.beats

    @property
    def directives(self) -> list[dict[str, Any]]:
        """Each once, as it came."""
        return list(self._directives.heard)

    def beat_now(self) -> None:
        self._pulse.beat_now()

    def working(self) -> AbstractContextManager[None]:
        """Count work that no message asked for as active, for the length of the block."""
        return self._work.turns.own_work()

    async def until(self, holds: Callable[[], bool], within_s: float = 30.0) -> None:
        """Come back when `holds`, asked at every turn and beat. Raises `TimeoutError`."""
        await self._work.news.until(holds, within_s)


class _Worker:
    """Directives act on turns, and what is new is acknowledged at once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.on_news: Callable[[], None] = lambda: None

    def act(self, directive: Mapping[str, Any]) -> Result:
        return self._work.act(directive)

    def told(self, directive: Mapping[str, Any], result: Result) -> None:
        facts = (directive.get(name) for name in ("kind", "reason", "session_id"))
        log.info("directive kind=%s reason=%s session=%s result=%s", *facts, result.value)
        self.on_news()


@asynccontextmanager
async def hosted(handle: Handler | Executor, **options: Any) -> AsyncIterator[Host]:
    """Run an agent for the length of the block; `options` are those of `runtime.options.Options`.

    `handle` is an async function of a message and a session, or an `AgentExecutor` of a2a-sdk.

    It serves at once and tells callers to come again until Bide knows it (`host.registered`). At the end it takes
    nothing new, asks running turns to end at their next checkpoint, cancels what still runs after `grace_s`, and gives
    those messages back.

    Raises:
        OSError: the port is taken, or the state folder cannot be written.
    """
    settings = Options(**options)
    with listen(settings.port, settings.host) as listener, Store(settings.folder / "items.sqlite") as store:
        url = settings.url or f"http://{settings.host}:{listener.getsockname()[1]}"
        work = Work(adapted(handle), settings, store)
        worker = _Worker(work)
        directives = Directives(worker)
        pulse = Pulse(work, directives, url)
        worker.on_news = pulse.beat_now
        async with serving(Door(Replies(work), directives, pulse, card(settings, url)), listener):
            with pulse:  # to the last turn: with a long grace it would look dead, and hear of no ceiling
                try:
                    yield Host(work, pulse, directives)
                finally:
                    await work.close()


def serve(handle: Handler | Executor, **options: Any) -> None:
    """Run an agent until SIGTERM or SIGINT; `options` as for `hosted`.

    Prints one JSON line when it serves, `{"workspace": …, "url": …, "boot_id": …}`, and speaks on stderr.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    leave = threading.Timer(LEAVE_S, _leave)
    leave.daemon = True
    try:
        asyncio.run(_serve(handle, options, leave))
    finally:
        leave.cancel()


def _leave() -> None:
    log.warning("left_behind: a handler, or a thread of one, goes on after its cancelation; the agent ends without it")
    logging.shutdown()
    os._exit(1)


async def _serve(handle: Handler | Executor, options: Mapping[str, Any], leave: threading.Timer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with hosted(handle, **options) as host:
        said = {"workspace": host.workspace, "url": host.url, "boot_id": host.boot_id}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        await stop.wait()
    leave.start()
