"""From "the agent has finished" to "the next item reaches it", at a heartbeat of 30 s: F4 of the performance goals.

The queue service, RabbitMQ and PostgreSQL, one agent whose turn takes `TURN_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from tests.bench.table import Row
from tests.conftest import Stack
from tests.integration.queue_kit import agent, door, queue_service

ITEMS = 200
TURN_S = 0.01


async def measure(stack: Stack) -> list[float]:
    """Milliseconds between the end of one turn and the begin of the next, sorted."""
    async with door(stack) as front, queue_service(stack), agent("w", work_s=TURN_S) as worker:
        facts = [front.busy("w", str(number)) for number in range(ITEMS)]
        await asyncio.gather(*(front.keep(fact) for fact in facts))
        await front.register("w", worker.url)
        await front.ended(*(fact.queue_id for fact in facts), within_s=120)
        return sorted(((b.started_at or 0.0) - (a.ended_at or 0.0)) * 1000 for a, b in pairwise(worker.received))


def rows(gaps: Sequence[float]) -> list[Row]:
    note = f"{len(gaps)} items, turns of {TURN_S * 1000:.0f} ms"
    return [
        Row(figure="F4", what="capacity freed → next delivery at the agent: p50", value=gaps[len(gaps) // 2], unit="ms",
            goal=10, at_most=True, note=note),
        Row(figure="F4", what="capacity freed → next delivery at the agent: p99", value=gaps[int(len(gaps) * 0.99)],
            unit="ms", goal=50, at_most=True),
    ]  # fmt: skip
