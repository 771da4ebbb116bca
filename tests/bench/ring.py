"""From "the agent has finished" to "the next item reaches it", at a heartbeat of 30 s: F4 of the performance goals.

The queue service, RabbitMQ and PostgreSQL, one agent whose turn takes `TURN_S`: `python -m tests.bench.ring`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import structlog

from deploy.local.servers import servers
from tests.conftest import Stack, make_template
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with (
        tempfile.TemporaryDirectory(prefix="bide-bench-", ignore_cleanup_errors=True) as folder,
        servers(Path(folder), durable=True, report=lambda line: print(line, file=sys.stderr)) as running,
    ):
        make_template(running)
        gaps = asyncio.run(
            measure(Stack(running.postgres.create_database("bench", "bide_template"), running.rabbitmq.url))
        )
    p50, p99 = gaps[len(gaps) // 2], gaps[int(len(gaps) * 0.99)]
    if arguments.json:
        print(json.dumps({"freed_to_next_ms": {"p50": p50, "p99": p99}, "load": os.getloadavg()}))
    else:
        print(f"freed to next: p50 {p50:.1f} ms, p99 {p99:.1f} ms over {len(gaps)} items (goal: 10 and 50 ms); "
              f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
