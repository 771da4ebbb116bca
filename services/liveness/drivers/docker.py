"""Agents as containers of a Docker engine, known by their label `bide.workspace=<workspace_id>`.

The operator creates the container; this driver looks at it, starts it and stops it, and touches none without the label.
A life of an agent is `container id@StartedAt`: a restarted container is another one. One list call serves a sweep; what
a list does not tell (StartedAt) is asked once for each life and forgotten when the engine's events speak of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import aiohttp
from aiodocker import Docker, DockerError

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target
from shared.database import backoff_s
from shared.telemetry import log

LABEL = "bide.workspace"
_INSPECTS = 8
"""At once: a frozen or slow engine is not buried under questions."""
_STOP_S = 10
"""Docker's own, for a container that does not say how long it takes to stop."""
_QUIET_S = 300.0
"""After so long without an event the stream is opened anew: a cut that nobody told of ends here."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Docker's own rule; the name becomes part of a path."""
_EVENTS = ("start", "die", "kill", "pause", "unpause", "destroy", "rename")
_SEEN = {
    "running": Seen.RUNNING,
    "exited": Seen.STOPPED,
    "dead": Seen.STOPPED,
    "created": Seen.TRANSITION,
    "restarting": Seen.TRANSITION,
    "paused": Seen.TRANSITION,
    "removing": Seen.TRANSITION,
}
_UP = frozenset({"running", "paused", "restarting"})
_FAILED = (DockerError, aiohttp.ClientError, OSError, ValueError, TypeError, LookupError)
"""All that an engine which is away, frozen, ill or talking nonsense makes of a call."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Row:
    """One container, as the list names it."""

    id: str
    names: frozenset[str]
    workspace_id: str
    state: str
    """`State.Status`; `State.Running` is true of a paused and of a restarting container too."""

    def is_called(self, name: str) -> bool:
        return name in self.names or (len(name) >= 12 and self.id.startswith(name))  # noqa: PLR2004 - a short id


@dataclass(frozen=True, slots=True)
class _Container:
    """One container, as an inspect shows it."""

    id: str
    labelled: str | None
    state: str
    life: str
    started_at: datetime | None
    exit_code: int
    stop_s: int
    stop_signal: str

    @property
    def observation(self) -> Observation:
        why = f"the container is {self.state}"
        if self.state == "exited":
            why = f"the container has exited with {self.exit_code}"
        return Observation(_SEEN.get(self.state, Seen.UNKNOWN), self.life, self.started_at, why)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The last start that this driver asked for: its fence, and the life that was there before."""

    fence: int
    was: str


class DockerDriver:
    """Looks at, starts and ends the labelled containers of one engine.

    `look_s` bounds a look; a restart may take as long as its container takes to stop, at most `stop_max_s`, and two
    looks. What a fence has started is remembered here; other replicas know it by the life that they expected.
    """

    def __init__(self, url: str, *, look_s: float = 5.0, stop_max_s: int = 30) -> None:
        self._url = url
        self._look_s = look_s
        self._stop_max_s = stop_max_s
        self._docker: Docker | None = None
        self._listener: asyncio.Task[None] | None = None
        self._inspects = asyncio.Semaphore(_INSPECTS)
        self._flights: dict[str, asyncio.Task[Observation]] = {}
        self._known: dict[str, _Container] = {}
        self._fresh: set[str] = set()
        self._told: defaultdict[str, int] = defaultdict(int)
        """How many events have spoken of a container: an inspect that one of them overtook is not kept."""
        self._stopping: set[str] = set()
        self._begun: dict[str, _Begun] = {}
        self._exits: asyncio.Queue[Exit] = asyncio.Queue()

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        try:
            async with asyncio.timeout(self._look_s):
                rows = await self._rows(LABEL)
        except _FAILED as error:
            return {target.workspace_id: _unknown(error) for target in targets}
        seen = await asyncio.gather(*(self._see(target, rows[target.workspace_id]) for target in targets))
        return {target.workspace_id: each for target, each in zip(targets, seen, strict=True)}

    async def inspect(self, target: Target) -> Observation:
        key = f"{target.workspace_id} {target.runtime.get('container', '')}"
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._look(target))
            flight.add_done_callback(lambda _: self._flights.pop(key))
        return await asyncio.shield(flight)

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        return await self._bounded(self._restart(target, expected, fence))

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        return await self._bounded(self._kill(target, expected, fence))

    async def exits(self) -> AsyncIterator[Exit]:
        self._client()
        while True:
            yield await self._exits.get()

    async def close(self) -> None:
        flights = [*self._flights.values(), *([self._listener] if self._listener is not None else [])]
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        if self._docker is not None:
            await self._docker.close()

    # ── looks ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _look(self, target: Target) -> Observation:
        try:
            async with asyncio.timeout(self._look_s):
                rows = await self._rows(f"{LABEL}={target.workspace_id}")
        except _FAILED as error:
            return _unknown(error)
        return await self._see(target, rows[target.workspace_id])

    async def _see(self, target: Target, rows: Sequence[_Row]) -> Observation:
        try:
            async with asyncio.timeout(self._look_s):
                row = await self._pick(target, rows)
                if row is None:
                    return Observation(Seen.NOT_FOUND, why=f"no container has the label {_label(target)}")
                known = self._known.get(row.id)
                if known is None or row.id not in self._fresh or known.state != row.state or not self._hears():
                    known = await self._inspect(row.id)
        except CannotRunError as error:
            return Observation(Seen.UNKNOWN, why=str(error))
        except _FAILED as error:
            return _unknown(error)
        if known is None:
            return Observation(Seen.NOT_FOUND, why="the container has just been removed")
        return known.observation

    async def _rows(self, label: str) -> Mapping[str, Sequence[_Row]]:
        """One list call: containers with this label, by workspace."""
        found: defaultdict[str, list[_Row]] = defaultdict(list)
        for each in await self._client().containers.list(all=True, filters=json.dumps({"label": [label]})):
            names = frozenset(name.removeprefix("/") for name in each["Names"] or ())
            row = _Row(each.id, names, each["Labels"][LABEL], each["State"])
            found[row.workspace_id].append(row)
        return found

    async def _pick(self, target: Target, rows: Sequence[_Row]) -> _Row | None:
        """Choose the container that is meant: the one that `runtime` names, else the one that is up, else any.

        Raises:
            CannotRunError: the named one has not the label, or more than one are meant.
        """
        name = target.runtime.get("container")
        if name is not None:
            if _NAME.fullmatch(name) is None:
                raise CannotRunError(f"{name!r} is no name of a container")
            named = [row for row in rows if row.is_called(name)]
            if not named and await self._inspect(name) is not None:
                raise CannotRunError(f"the container {name} has not the label {_label(target)}: it is left alone")
            return named[0] if named else None
        up = [row for row in rows if row.state in _UP]
        if len(up) > 1 or (not up and len(rows) > 1):
            raise CannotRunError(f"{len(up) or len(rows)} containers have the label {_label(target)}: name one")
        return next(iter(up or rows), None)

    async def _inspect(self, name: str) -> _Container | None:
        """Ask for one container. None: there is none of this name or id."""
        told, hears = self._told.get(name, 0), self._hears()
        try:
            async with self._inspects:
                container = _read(await self._client().containers.container(name).show())
        except DockerError as error:
            if error.status == 404:  # noqa: PLR2004 - HTTP
                self._forget(name)
                return None
            raise
        if container.labelled is not None:
            self._known[container.id] = container
            self._fresh.discard(container.id)
            if hears and told == self._told.get(container.id, 0):
                self._fresh.add(container.id)
        return container

    # ── acts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _bounded(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._stop_max_s + 2 * self._look_s):
                return await work
        except _FAILED as error:
            raise DriverError(_words(error)) from error

    async def _meant(self, target: Target) -> _Container | None:
        rows = await self._rows(f"{LABEL}={target.workspace_id}")
        row = await self._pick(target, rows[target.workspace_id])
        return await self._inspect(row.id) if row is not None else None

    async def _restart(self, target: Target, expected: str | None, fence: int) -> Observation:
        container = await self._meant(target)
        if container is None:
            raise CannotRunError(f"no container has the label {_label(target)}")
        begun = self._begun_before(target, fence)
        if begun is not None and begun.fence == fence and begun.was != container.life:
            return container.observation
        if container.state in {"running", "paused"} and container.life != expected:
            if expected is None:
                return container.observation
            raise FencedError(f"{container.life} runs in {target.workspace_id}, not {expected}")
        if container.state in {"restarting", "removing"}:
            raise DriverError(f"the engine is at {container.life} itself: it is {container.state}")
        self._begun[target.workspace_id] = _Begun(fence, container.life)
        failed = await self._start(container)
        after = await self._inspect(container.id)
        # Whatever the call answered (500 and 409 come also after the deed): another StartedAt is a start.
        if after is None or after.life == container.life:
            raise DriverError(f"{container.life} was not started: {failed}") from failed
        return after.observation

    async def _start(self, container: _Container) -> BaseException | None:
        """Start it, or end it and start it. Returns what the engine complained of."""
        handle = self._client().containers.container(container.id)
        try:
            async with asyncio.timeout(self._wait_s(container)):
                if container.state == "paused":
                    await handle.unpause()
                if container.state in _UP:
                    # t: between SIGTERM and SIGKILL; `timeout` would be the patience of the HTTP call alone.
                    await handle.restart(t=self._stop_s(container))
                else:
                    await handle.start()
        except _FAILED as error:
            return error
        return None

    async def _kill(self, target: Target, expected: str | None, fence: int) -> Killed:
        container = await self._meant(target)
        self._begun_before(target, fence)
        if container is None or container.state not in _UP:
            return Killed.GONE
        if container.life != expected:
            return Killed.REPLACED
        handle = self._client().containers.container(container.id)
        failed: BaseException | None = None
        try:
            async with asyncio.timeout(self._wait_s(container)):
                if container.state == "paused":
                    await handle.unpause()
                await handle.stop(t=self._stop_s(container))
        except _FAILED as error:
            failed = error
        after = await self._inspect(container.id)
        if after is not None and after.life == container.life and after.state in _UP:
            raise DriverError(f"{container.life} was not stopped: {failed}") from failed
        return Killed.APPLIED

    def _begun_before(self, target: Target, fence: int) -> _Begun | None:
        begun = self._begun.get(target.workspace_id)
        if begun is not None and begun.fence > fence:
            raise FencedError(f"start {begun.fence} of {target.workspace_id} came after {fence}")
        return begun

    def _stop_s(self, container: _Container) -> int:
        forever = container.stop_s < 0
        return self._stop_max_s if forever else min(container.stop_s, self._stop_max_s)

    def _wait_s(self, container: _Container) -> float:
        return self._stop_s(container) + self._look_s

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _client(self) -> Docker:
        if self._docker is None:
            self._docker = Docker(self._url)
            self._listener = asyncio.create_task(self._listen(self._docker, time.time_ns()), name="docker events")
        return self._docker

    def _hears(self) -> bool:
        return self._docker is not None and self._docker.events.json_stream is not None

    async def _listen(self, docker: Docker, since_ns: int) -> None:
        """Hear the engine for as long as the driver is open; what happened during a cut is told afterwards."""
        attempt = 0
        while True:
            try:
                async for event in _events(docker, since_ns):
                    attempt = 0
                    since_ns = max(since_ns, event["timeNano"])
                    self._hear(event)
                why = "the stream ended"
            except _FAILED as error:
                why = _words(error)
            self._fresh.clear()
            log.warning("docker_events_cut", why=why)
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1

    def _hear(self, event: Mapping[str, Any]) -> None:
        """Take one event: an end counts for the life that was seen, unless somebody asked the engine for it.

        A stop by hand is no crash: looks find it, and find first whether it is meant to be stopped. The same holds for
        `docker restart` and a redeployment, which are not to be raced. SIGKILL by hand is as a crash.
        """
        container_id, action = event["Actor"]["ID"], event["Action"]
        known = self._known.get(container_id)
        self._told[container_id] += 1
        self._fresh.discard(container_id)
        match action:
            case "kill":
                if known is not None and event["Actor"]["Attributes"].get("signal") == known.stop_signal:
                    self._stopping.add(container_id)
            case "die":
                self._known.pop(container_id, None)
                if container_id in self._stopping:
                    self._stopping.discard(container_id)
                elif known is not None and known.labelled is not None and known.state in _UP:
                    self._exits.put_nowait(Exit(known.labelled, known.life))
            case "start":
                self._known.pop(container_id, None)
                self._stopping.discard(container_id)
            case "destroy":
                self._forget(container_id)

    def _forget(self, container_id: str) -> None:
        self._known.pop(container_id, None)
        self._told.pop(container_id, None)
        self._fresh.discard(container_id)
        self._stopping.discard(container_id)


async def _events(docker: Docker, since_ns: int) -> AsyncIterator[dict[str, Any]]:
    """One connection to the engine's events, those after `since_ns`."""
    events: Any = docker.events
    heard = events.subscribe(create_task=False)
    wanted = {"type": ["container"], "label": [LABEL], "event": list(_EVENTS)}
    patience = aiohttp.ClientTimeout(sock_connect=5.0, sock_read=_QUIET_S)
    reading = asyncio.create_task(
        events.run(filters=json.dumps(wanted), since=f"{since_ns // 10**9}.{since_ns % 10**9:09d}", timeout=patience)
    )
    try:
        while (event := await heard.get()) is not None:
            if event["timeNano"] > since_ns:
                yield event
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, *_FAILED):
            await reading


def _read(shown: Mapping[str, Any]) -> _Container:
    state, config = shown["State"], shown["Config"]
    started: str = state["StartedAt"]
    at = datetime.fromisoformat(started)
    stop_signal = config.get("StopSignal") or "SIGTERM"
    stop_s = config.get("StopTimeout")
    return _Container(
        id=shown["Id"],
        labelled=(config.get("Labels") or {}).get(LABEL),
        state=state["Status"],
        life=f"{shown['Id'][:12]}@{started}",
        started_at=at if at.year > 1 else None,
        exit_code=state["ExitCode"],
        stop_s=_STOP_S if stop_s is None else stop_s,
        stop_signal=_number(stop_signal),
    )


def _number(name: str) -> str:
    """Write a signal as events do."""
    if name.isdigit():
        return name
    found = getattr(signal, name if name.startswith("SIG") else f"SIG{name}", None)
    return str(int(found)) if found is not None else name


def _label(target: Target) -> str:
    return f"{LABEL}={target.workspace_id}"


def _unknown(error: BaseException) -> Observation:
    return Observation(Seen.UNKNOWN, why=_words(error))


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the engine did not answer in time"
    return f"{type(error).__name__}: {error}"[:300]
