"""Liveness itself over the store in memory: its handlers, its loops and its door, as `__main__` wires them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, cast
from unittest.mock import patch

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import DriverError, Exit, Killed, Target
from services.liveness.handlers import Handlers
from services.liveness.loops.looks import Looks
from services.liveness.loops.upkeep import Upkeep
from services.liveness.restart.carry import Restarts
from services.liveness.settings import Settings
from shared.broker import Publisher
from shared.database import Pool, transact
from shared.facts import FLEET, Fact, ProxyBeat, WorkspaceHeartbeat, WorkspaceRegistered
from shared.loops import turning
from tests.bench.fleet.clock import BEGIN, VirtualLoop
from tests.bench.fleet.memory import Memory
from tests.bench.fleet.script import CADENCE_S
from tests.bench.fleet.world import Agent, EngineError, World

SETTINGS = Settings.model_validate({"database_url": "postgresql://memory/", "amqp_url": "amqp://nobody/"})
"""The defaults, as an operator meets them."""


class WorldDriver:
    """The engine as a driver: what it is asked takes a moment, and may fail."""

    def __init__(self, world: World) -> None:
        self.ended: asyncio.Queue[Exit] = asyncio.Queue()
        self._world = world
        self._fences: dict[str, int] = {}

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        self._world.tally.lists += 1
        await asyncio.sleep(0.05)
        return {target.workspace_id: self._world.look(target.workspace_id) for target in targets}

    async def inspect(self, target: Target) -> Observation:
        return (await self.list([target]))[target.workspace_id]

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        del expected
        name = target.workspace_id
        assert self._fences.get(name, 0) <= fence, "fences grow"
        try:
            container_id = await self._world.restart(name)
        except EngineError as error:
            raise DriverError(str(error)) from error
        assert self._fences.get(name, 0) < fence, "one fence, one start"
        self._fences[name] = fence
        return Observation(Seen.RUNNING, container_id)

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        raise NotImplementedError("nobody orders a kill here")

    async def exits(self) -> AsyncIterator[Exit]:
        while True:
            yield await self.ended.get()

    async def close(self) -> None:
        pass


class Ours:
    """A `Listener` that gives facts to the handlers, as the reader would."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.memory = Memory(loop.now)
        self._pool = cast("Pool", self.memory)
        self._loop = loop
        self._revs = 0
        self._heard: list[WorkspaceHeartbeat] = []

    def beat(self, agent: Agent) -> None:
        """Beats of a tenth of a second come as one batch."""
        if not self._heard:
            self._loop.call_later(0.1, self._give_beats)
        rev = int(self._loop.time() * 1e6)
        self._heard.append(
            WorkspaceHeartbeat(
                workspace_id=agent.name, rev=rev, incarnation=agent.incarnation, active_tasks=agent.active,
                cadence_s=CADENCE_S,
            )
        )  # fmt: skip

    def _give_beats(self) -> None:
        facts, self._heard = self._heard, []
        self._give(self._handlers.heartbeats, facts)

    def registered(self, agent: Agent) -> None:
        self._revs += 1
        fact = WorkspaceRegistered(
            workspace_id=agent.name, rev=self._revs, incarnation=agent.incarnation, url="http://agent/",
            heartbeat_interval_s=CADENCE_S, runtime={"driver": "process"}, settings={"restart_wedged": True},
        )  # fmt: skip
        self._give(self._handlers.registered, [fact])

    def proxy_beat(self, proxy_id: str) -> None:
        self._give(self._handlers.proxy_beats, [ProxyBeat(workspace_id=FLEET, rev=1, proxy_id=proxy_id)])

    def exited(self, agent: Agent, container_id: str) -> None:
        self._driver.ended.put_nowait(Exit(agent.name, container_id))

    def post(self, fact: Fact, *, to: str | None = None) -> None:
        """What loops call of a publisher; nobody listens."""

    def _give(self, handler: Any, facts: Sequence[Fact]) -> None:
        async def give() -> None:
            tell = await transact(self._pool, partial(_call, handler, facts))
            if tell is not None:
                tell()

        task = self._loop.create_task(give())
        task.add_done_callback(_raise)

    @asynccontextmanager
    async def deciding(self, world: World) -> AsyncIterator[None]:
        """Run the service for the length of the block; then say whom it declared dead."""
        self._driver = WorldDriver(world)
        drivers = {"process": self._driver}
        restarts = Restarts(SETTINGS, self._pool, drivers, told=_nothing)
        looks = Looks(SETTINGS, self._pool, drivers, died=restarts.loop.wake, told=_nothing, _started=self._loop.time())
        upkeep = Upkeep(SETTINGS, self._pool, cast("Publisher", self))
        self._handlers = Handlers(frozenset(drivers), looks.loop.wake, restarts.loop.wake)
        with ExitStack() as patches:
            for module in ("services.liveness.loops.looks", "services.liveness.restart.carry"):
                patches.enter_context(patch(f"{module}.time", self._loop))
            exits = asyncio.create_task(looks.exits(self._driver))
            async with turning([restarts.loop, looks.loop, *upkeep.loops()]):
                yield
            exits.cancel()
            with suppress(asyncio.CancelledError):
                await exits
            await restarts.stop(0)
        rows = sorted(self.memory.restarts.values(), key=lambda row: row["decided_at"])
        world.tally.declared = [(_at_s(row["decided_at"]), row["workspace_id"]) for row in rows]

    def status_of(self, name: str) -> str:
        return str(self.memory.agents[name]["status"])


async def _call(handler: Any, facts: Sequence[Fact], connection: Any) -> Any:
    return await handler(connection, facts)


def _raise(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


def _at_s(moment: datetime) -> float:
    return (moment - BEGIN).total_seconds()


def _nothing() -> None:
    pass
