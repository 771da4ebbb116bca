"""Wiring of queue, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from services.queue.answers import Answers
from services.queue.aside import end_unreadable, settle_unreadable
from services.queue.drain import Drain
from services.queue.handlers import Handlers
from services.queue.history import History
from services.queue.loops import Loops
from services.queue.sessions import Sessions
from services.queue.settings import Settings
from services.queue.ticks import Ticks
from shared.addresses import AddressRules
from shared.agents import Agents
from shared.database import open_pool
from shared.facts import (
    KillDone,
    MessageBusy,
    ProxyBeat,
    QueueQuery,
    ScheduleChanged,
    ScheduleTick,
    SessionGate,
    SessionStop,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
    WorkspaceStatus,
)
from shared.loops import turning
from shared.service import running, start

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(settings: Settings) -> None:
    one = settings.model_copy(update={"database_pool_max": 1})
    async with running("queue", settings, MIGRATIONS) as service, open_pool(one) as own:
        agents = Agents(AddressRules(allow_loopback=settings.allow_loopback))
        drain = Drain(settings, service.pool, service.publisher, agents, told=service.relay.wake)
        handlers = Handlers(settings, service.publisher, drain)
        ticks = Ticks(service.publisher, drain)
        sessions = Sessions(settings, service.publisher, drain)
        loops = Loops(settings, service.pool, own, service.publisher, drain)
        answers = Answers(service.publisher, drain, loops.snapshots.wake)
        service.reader.store(MessageBusy, handlers.message_busy, aside=end_unreadable)
        service.reader.store(WorkspaceHeartbeat, handlers.heartbeats)
        service.reader.store(ProxyBeat, handlers.proxy_beats)
        service.reader.store(WorkspaceRegistered, handlers.registered)
        service.reader.store(WorkspaceChanged, handlers.registered)
        service.reader.store(WorkspaceRemoved, handlers.removed)
        service.reader.store(WorkspaceStatus, handlers.statuses)
        service.reader.store(QueueQuery, answers.query)
        service.reader.store(ScheduleChanged, ticks.changed)
        service.reader.store(ScheduleTick, ticks.fired, aside=settle_unreadable)
        service.reader.store(SessionGate, sessions.gate)
        service.reader.store(SessionStop, sessions.stop)
        service.reader.store(KillDone, sessions.kill_done)
        service.reader.store_undeliverable()
        await loops.take_bounds()
        await loops.beat()  # a delivery of ours must never stand without an owner that beats
        try:
            async with turning([drain.loop, *loops.all(), History(settings, service.pool).loop]):
                try:
                    await service.serve()
                finally:
                    drain.close()
                    await service.reader.stop()
                    await drain.stop(settings.drain_s)
        finally:
            await loops.leave()
            await agents.close()


if __name__ == "__main__":
    sys.exit(start("queue", Settings, main))
