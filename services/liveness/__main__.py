"""Wiring of liveness, and nothing else."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from services.liveness.answers import Answers
from services.liveness.drivers import Driver
from services.liveness.drivers.process import ProcessDriver
from services.liveness.drivers.webhook import WebhookDriver
from services.liveness.handlers import Handlers
from services.liveness.loops.looks import Looks
from services.liveness.loops.upkeep import Upkeep
from services.liveness.restart.carry import Restarts
from services.liveness.settings import Settings
from shared.facts import (
    LivenessQuery,
    ProxyBeat,
    SessionKill,
    WorkspaceChanged,
    WorkspaceEvidence,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from shared.loops import turning
from shared.service import running, start

MIGRATIONS = Path(__file__).parent / "migrations"
STUCK_S = 120.0
"""No turn of these loops lasts half as long: each of its calls has a limit."""


def drivers_of(settings: Settings) -> dict[str, Driver]:
    """The drivers that these settings allow, by the name that `runtime` calls them."""
    drivers: dict[str, Driver] = {"process": ProcessDriver(settings.agents_file, settings.agents_folder)}
    if settings.docker_url is not None:
        from services.liveness.drivers.docker import DockerDriver  # noqa: PLC0415 - what it imports is an extra

        drivers["docker"] = DockerDriver(settings.docker_url)
    if settings.webhook_secret is not None:
        drivers["webhook"] = WebhookDriver(settings.webhook_secret.get_secret_value())
    return drivers


async def main(settings: Settings) -> None:
    async with running("liveness", settings, MIGRATIONS) as service:
        drivers = drivers_of(settings)
        restarts = Restarts(settings, service.pool, drivers, told=service.relay.wake)
        looks = Looks(settings, service.pool, drivers, died=restarts.loop.wake, told=service.relay.wake)
        upkeep = Upkeep(settings, service.pool, service.publisher)
        acting = frozenset(drivers) if settings.mode == "act" else frozenset[str]()
        handlers = Handlers(acting, looks.loop.wake, restarts.loop.wake)
        service.reader.store(WorkspaceRegistered, handlers.registered)
        service.reader.store(WorkspaceChanged, handlers.registered)
        service.reader.store(WorkspaceRemoved, handlers.removed)
        service.reader.store(WorkspaceHeartbeat, handlers.heartbeats)
        service.reader.store(WorkspaceEvidence, handlers.evidence)
        service.reader.store(ProxyBeat, handlers.proxy_beats)
        service.reader.store(SessionKill, handlers.kill)
        answers = Answers(settings, service.publisher, handlers.wake)
        service.reader.store(LivenessQuery, answers.query)
        exits = [asyncio.create_task(looks.exits(driver), name=f"exits {name}") for name, driver in drivers.items()]
        for loop in (looks.loop, restarts.loop):
            service.health.add_pulse(loop.name, loop.age_s, limit_s=STUCK_S)
        try:
            async with turning([restarts.loop, looks.loop, *upkeep.loops()]):
                await service.serve()
        finally:
            for task in exits:
                task.cancel()
            await restarts.stop(settings.drain_s)
            for driver in drivers.values():
                await driver.close()


if __name__ == "__main__":
    sys.exit(start("liveness", Settings, main))
