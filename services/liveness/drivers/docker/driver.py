"""Agents as containers of a Docker engine, known by their label `bide.workspace=<workspace_id>`.

The operator creates the container; this driver looks at it, starts it and stops it, and touches none without the label.
A life of an agent is `container id@StartedAt`: a restarted container is another one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target
from services.liveness.drivers.docker.engine import FAILED, LABEL, UP, Container, Engine, Row, words

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Docker's own rule; the name becomes part of a path."""
T = TypeVar("T")


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
        self._engine = Engine(url)
        self._look_s = look_s
        self._stop_max_s = stop_max_s
        self._flights: dict[str, asyncio.Task[Observation]] = {}
        self._begun: dict[str, _Begun] = {}

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        try:
            async with asyncio.timeout(self._look_s):
                rows = await self._engine.rows(LABEL)
        except FAILED as error:
            return {target.workspace_id: _unknown(error) for target in targets}
        seen = await asyncio.gather(*(self._see(target, rows.get(target.workspace_id, ())) for target in targets))
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
        self._engine.open()
        while True:
            yield await self._engine.exits.get()

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._engine.close()

    # ── looks ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _look(self, target: Target) -> Observation:
        try:
            async with asyncio.timeout(self._look_s):
                rows = await self._engine.rows(f"{LABEL}={target.workspace_id}")
        except FAILED as error:
            return _unknown(error)
        return await self._see(target, rows.get(target.workspace_id, ()))

    async def _see(self, target: Target, rows: Sequence[Row]) -> Observation:
        try:
            async with asyncio.timeout(self._look_s):
                row = await self._pick(target, rows)
                if row is None:
                    return Observation(Seen.NOT_FOUND, why=f"no container has the label {_label(target)}")
                container = await self._engine.look(row)
        except CannotRunError as error:
            return Observation(Seen.UNKNOWN, why=str(error))
        except FAILED as error:
            return _unknown(error)
        if container is None:
            return Observation(Seen.NOT_FOUND, why="the container has just been removed")
        return container.observation

    async def _pick(self, target: Target, rows: Sequence[Row]) -> Row | None:
        """Choose the container that is meant: the one that `runtime` names, else the one that is up, else any.

        Raises:
            CannotRunError: the named one has not the label, or more than one are meant.
        """
        name = target.runtime.get("container")
        if name is not None:
            if _NAME.fullmatch(name) is None:
                raise CannotRunError(f"{name!r} is no name of a container")
            named = [row for row in rows if row.is_called(name)]
            if not named and await self._engine.inspect(name) is not None:
                raise CannotRunError(f"the container {name} has not the label {_label(target)}: it is left alone")
            return named[0] if named else None
        up = [row for row in rows if row.state in UP]
        if len(up) > 1 or (not up and len(rows) > 1):
            raise CannotRunError(f"{len(up) or len(rows)} containers have the label {_label(target)}: name one")
        return next(iter(up or rows), None)

    # ── acts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _bounded(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._stop_max_s + 2 * self._look_s):
                return await work
        except FAILED as error:
            raise DriverError(words(error)) from error

    async def _meant(self, target: Target) -> Container | None:
        rows = await self._engine.rows(f"{LABEL}={target.workspace_id}")
        row = await self._pick(target, rows.get(target.workspace_id, ()))
        return await self._engine.inspect(row.id) if row is not None else None

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
        after = await self._engine.inspect(container.id)
        # Whatever the call answered (500 and 409 come also after the deed): another StartedAt is a start.
        if after is None or after.life == container.life:
            raise DriverError(f"{container.life} was not started: {failed}") from failed
        return after.observation

    async def _start(self, container: Container) -> BaseException | None:
        """Start it, or end it and start it. Returns what the engine complained of."""
        handle = self._engine.handle(container)
        try:
            async with asyncio.timeout(self._wait_s(container)):
                if container.state == "paused":
                    await handle.unpause()
                if container.state in UP:
                    # t: between SIGTERM and SIGKILL; `timeout` would be the patience of the HTTP call alone.
                    await handle.restart(t=self._stop_s(container))
                else:
                    await handle.start()
        except FAILED as error:
            return error
        return None

    async def _kill(self, target: Target, expected: str | None, fence: int) -> Killed:
        container = await self._meant(target)
        self._begun_before(target, fence)
        if container is None or container.state not in UP:
            return Killed.GONE
        if container.life != expected:
            return Killed.REPLACED
        handle = self._engine.handle(container)
        failed: BaseException | None = None
        try:
            async with asyncio.timeout(self._wait_s(container)):
                if container.state == "paused":
                    await handle.unpause()
                await handle.stop(t=self._stop_s(container))
        except FAILED as error:
            failed = error
        after = await self._engine.inspect(container.id)
        if after is not None and after.life == container.life and after.state in UP:
            raise DriverError(f"{container.life} was not stopped: {failed}") from failed
        return Killed.APPLIED

    def _begun_before(self, target: Target, fence: int) -> _Begun | None:
        begun = self._begun.get(target.workspace_id)
        if begun is not None and begun.fence > fence:
            raise FencedError(f"start {begun.fence} of {target.workspace_id} came after {fence}")
        return begun

    def _stop_s(self, container: Container) -> int:
        forever = container.stop_s < 0
        return self._stop_max_s if forever else min(container.stop_s, self._stop_max_s)

    def _wait_s(self, container: Container) -> float:
        return self._stop_s(container) + self._look_s


def _label(target: Target) -> str:
    return f"{LABEL}={target.workspace_id}"


def _unknown(error: BaseException) -> Observation:
    return Observation(Seen.UNKNOWN, why=words(error))
