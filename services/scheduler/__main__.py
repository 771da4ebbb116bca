"""Wiring of scheduler, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from services.scheduler.answers import Answers
from services.scheduler.handlers import Handlers
from services.scheduler.sessions import Sessions
from services.scheduler.settings import Settings
from services.scheduler.ticking import Ticking
from shared.facts import (
    BacklogSnapshot,
    GateClosed,
    KillDone,
    ScheduleQuery,
    TickSettled,
    WorkspaceChanged,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from shared.loops import Loop, turning
from shared.service import running, start

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(settings: Settings) -> None:
    async with running("scheduler", settings, MIGRATIONS) as service:
        ticking = Ticking(settings, service.pool, told=service.relay.wake)
        sessions = Sessions(settings, service.pool, service.publisher, told=service.relay.wake)
        handlers = Handlers(ticking.loop.wake, sessions.loop.wake)
        answers = Answers(settings, service.publisher, ticking.loop.wake, sessions.loop.wake)
        service.reader.hear(BacklogSnapshot, sessions.snapshots)
        service.reader.store(GateClosed, sessions.gates_closed)
        service.reader.store(KillDone, sessions.kills_done)
        service.reader.store(ScheduleQuery, answers.query)
        service.reader.store(TickSettled, handlers.settled)
        service.reader.store(WorkspaceRegistered, handlers.registered)
        service.reader.store(WorkspaceChanged, handlers.registered)
        service.reader.store(WorkspaceRemoved, handlers.removed)
        service.health.add("ticking", ticking.probe)
        service.health.add("sessions", sessions.probe)
        loops = [
            ticking.loop,
            sessions.loop,
            Loop("measure", ticking.measure),
            Loop("measure_sessions", sessions.measure),
            Loop("forget", ticking.forget),
        ]
        async with turning(loops):
            await service.serve()


if __name__ == "__main__":
    sys.exit(start("scheduler", Settings, main))
