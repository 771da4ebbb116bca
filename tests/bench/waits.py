"""How long a message waits for its first delivery, by priority: TASK alone, behind an INFO flood, and with CRITICAL.

The queue service, RabbitMQ and PostgreSQL, one agent with turns of `TURN_S`. TASK messages come at a steady pace that
leaves it room; 300 INFO messages lie there from the start; CRITICAL comes now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from shared.facts import MessageBusy, Priority
from tests.bench.table import Row
from tests.conftest import Stack
from tests.integration.queue_kit import Door, agent, door, queue_service

TURN_S = 0.01
TASK_EVERY_S = 0.03
INFO = 300
CRITICAL_EVERY = 10
Waits = Mapping[Priority, Sequence[float]]


async def measure(stack: Stack, *, tasks: int) -> dict[str, Waits]:
    """Sorted waits in milliseconds, by load and priority."""
    found: dict[str, Waits] = {}
    async with door(stack) as front, queue_service(stack):
        for load, info, critical in (("TASK alone", 0, False), ("INFO flood", INFO, False), ("mixed", INFO, True)):
            name = load.replace(" ", "-")
            async with agent(name, work_s=TURN_S) as worker:
                found[load] = await _run(front, name, worker.url, tasks=tasks, info=info, critical=critical)
    return found


async def _run(front: Door, name: str, url: str, *, tasks: int, info: int, critical: bool) -> Waits:
    facts = [front.busy(name, f"info {number}", priority=Priority.INFO) for number in range(info)]
    await asyncio.gather(*(front.keep(fact) for fact in facts))
    await front.register(name, url)
    for number in range(tasks):
        message = front.busy(name, f"task {number}")
        await front.publisher.publish(message)
        facts.append(message)
        if critical and number % CRITICAL_EVERY == 0:
            urgent = front.busy(name, f"critical {number}", priority=Priority.CRITICAL)
            await front.publisher.publish(urgent)
            facts.append(urgent)
        await asyncio.sleep(TASK_EVERY_S)
    items = await front.ended(*(fact.queue_id for fact in facts), within_s=120)
    return {priority: sorted(_wait_ms(item) for item in _of(items, facts, priority)) for priority in Priority}


def _of(items: Sequence[Any], facts: Sequence[MessageBusy], priority: Priority) -> list[Any]:
    ids = {str(fact.queue_id) for fact in facts if fact.priority is priority}
    return [item for item in items if item["queue_id"] in ids]


def _wait_ms(item: Mapping[str, Any]) -> float:
    came, went = (datetime.fromisoformat(item[moment]) for moment in ("enqueued_at", "dispatched_at"))
    return (went - came).total_seconds() * 1000


def rows(found: Mapping[str, Waits]) -> list[Row]:
    made = []
    alone = found["TASK alone"][Priority.TASK]
    for load, waits in found.items():
        for priority, times in waits.items():
            if not times:
                continue
            note = f"p99 {times[int(len(times) * 0.99)]:.0f} ms, {len(times)} messages"
            if priority is Priority.TASK and times is not alone:
                note += f"; {times[len(times) // 2] - alone[len(alone) // 2]:+.1f} ms of alone"
            what = f"wait of {priority.value}, {load}: p50"
            made.append(Row(figure="wait", what=what, value=times[len(times) // 2], unit="ms", note=note))
    return made
