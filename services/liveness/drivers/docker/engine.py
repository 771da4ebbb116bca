"""What a Docker engine says of labelled containers: lists, inspects and events, each believed as long as it holds.

Decides nothing and changes nothing. What a list does not tell (StartedAt) is asked once for each life, and forgotten
when an event speaks of the container or the stream of events is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aiohttp
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import Exit
from shared.database import backoff_s
from shared.telemetry import log

LABEL = "bide.workspace"
UP = frozenset({"running", "paused", "restarting"})
FAILED = (DockerError, aiohttp.ClientError, OSError, ValueError, TypeError, LookupError)
"""All that an engine which is away, frozen, ill or talking nonsense makes of a call."""
_INSPECTS = 8
"""At once: a frozen or slow engine is not buried under questions."""
_STOP_S = 10
"""Docker's own, for a container that does not say how long it takes to stop."""
_QUIET_S = 900.0
"""After so long without an event the stream is opened anew: a cut that nobody told of ends here."""
_BEFORE_NS = 60 * 10**9
"""So much from before the first question is listened to as well: the engine's clock may be behind ours."""
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


@dataclass(frozen=True, slots=True)
class Row:
    """One container, as the list names it."""

    id: str
    names: frozenset[str]
    workspace_id: str
    state: str
    """`State.Status`; `State.Running` is true of a paused and of a restarting container too."""

    def is_called(self, name: str) -> bool:
        return name in self.names or (len(name) >= 12 and self.id.startswith(name))  # noqa: PLR2004 - a short id


@dataclass(frozen=True, slots=True)
class Container:
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
    def started_ns(self) -> int:
        """By the engine's clock, as its events are."""
        return int(self.started_at.timestamp() * 1e6) * 1000 if self.started_at is not None else 0

    @property
    def observation(self) -> Observation:
        why = f"the container is {self.state}"
        if self.state == "exited":
            why = f"the container has exited with {self.exit_code}"
        return Observation(_SEEN.get(self.state, Seen.UNKNOWN), self.life, self.started_at, why)


class Engine:
    """One engine, heard from the first question on; `exits` holds the ends of lives that were seen up."""

    def __init__(self, url: str) -> None:
        self.exits: asyncio.Queue[Exit] = asyncio.Queue()
        self._url = url
        self._docker: Docker | None = None
        self._listener: asyncio.Task[None] | None = None
        self._inspects = asyncio.Semaphore(_INSPECTS)
        self._known: dict[str, Container] = {}
        self._fresh: set[str] = set()
        self._told: defaultdict[str, int] = defaultdict(int)
        """How many events have spoken of a container: an inspect that one of them overtook is not kept."""
        self._stopping: set[str] = set()

    def open(self) -> Docker:
        """Return the client; the first call begins to listen."""
        if self._docker is None:
            self._docker = Docker(self._url)
            self._listener = asyncio.create_task(self._listen(self._docker), name="docker events")
        return self._docker

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        if self._docker is not None:
            await self._docker.close()

    def hears(self) -> bool:
        """Whether the stream of events stands."""
        return self._docker is not None and self._docker.events.json_stream is not None

    def handle(self, container: Container) -> DockerContainer:
        return self.open().containers.container(container.id)

    async def rows(self, label: str) -> Mapping[str, Sequence[Row]]:
        """One list call: containers with this label, by workspace."""
        found: defaultdict[str, list[Row]] = defaultdict(list)
        for each in await self.open().containers.list(all=True, filters=json.dumps({"label": [label]})):
            names = frozenset(name.removeprefix("/") for name in each["Names"] or ())
            row = Row(each.id, names, each["Labels"][LABEL], each["State"])
            found[row.workspace_id].append(row)
        return found

    async def look(self, row: Row) -> Container | None:
        """Say what is known of a listed container; ask where that may have passed."""
        known = self._known.get(row.id)
        if known is None or row.id not in self._fresh or known.state != row.state or not self.hears():
            return await self.inspect(row.id)
        return known

    async def inspect(self, name: str) -> Container | None:
        """Ask for one container. None: there is none of this name or id."""
        told, hears = self._told.get(name, 0), self.hears()
        try:
            async with self._inspects:
                container = _read(await self.open().containers.container(name).show())
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

    async def _listen(self, docker: Docker) -> None:
        """Hear the engine for as long as the driver is open; what happened during a cut is told afterwards."""
        attempt, since_ns = 0, time.time_ns() - _BEFORE_NS
        while True:
            try:
                async with contextlib.aclosing(_events(docker, since_ns)) as events:
                    async for event in events:
                        attempt, since_ns = 0, max(since_ns, event["timeNano"])
                        self._hear(event)
                why = "the stream ended"
            except FAILED as error:
                why = words(error)
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
        if known is not None and event["timeNano"] <= known.started_ns:
            return  # told late, after a cut: it is about an earlier life than the one that was seen since
        match action:
            case "kill":
                if known is not None and event["Actor"]["Attributes"].get("signal") == known.stop_signal:
                    self._stopping.add(container_id)
            case "die":
                self._known.pop(container_id, None)
                if container_id in self._stopping:
                    self._stopping.discard(container_id)
                elif known is not None and known.labelled is not None and known.state in UP:
                    self.exits.put_nowait(Exit(known.labelled, known.life))
            case "start":
                self._stopping.discard(container_id)
            case "destroy":
                self._forget(container_id)

    def _forget(self, container_id: str) -> None:
        self._known.pop(container_id, None)
        self._told.pop(container_id, None)
        self._fresh.discard(container_id)
        self._stopping.discard(container_id)


async def _events(docker: Docker, since_ns: int) -> AsyncGenerator[dict[str, Any], None]:
    """One connection to the engine's events, those from `since_ns` on: as many as it remembers, and then live."""
    events: Any = docker.events
    heard = events.subscribe(create_task=False)
    wanted = {"type": ["container"], "label": [LABEL], "event": list(_EVENTS)}
    patience = aiohttp.ClientTimeout(sock_connect=5.0, sock_read=_QUIET_S)
    reading = asyncio.create_task(
        events.run(filters=json.dumps(wanted), since=f"{since_ns // 10**9}.{since_ns % 10**9:09d}", timeout=patience)
    )
    try:
        while (event := await heard.get()) is not None:
            yield event
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, *FAILED):
            await reading


def _read(shown: Mapping[str, Any]) -> Container:
    state, config = shown["State"], shown["Config"]
    started: str = state["StartedAt"]
    at = datetime.fromisoformat(started)
    stop_signal = config.get("StopSignal") or "SIGTERM"
    stop_s = config.get("StopTimeout")
    return Container(
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


def words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the engine did not answer in time"
    return f"{type(error).__name__}: {error}"[:300]
