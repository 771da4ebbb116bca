"""Group commit against one message per fact: facts per second through RabbitMQ into Postgres, side by side in one run.

`make bench` prints one table; `--json` one line. Ratios are what counts: machines are noisy, the pairs interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import structlog

from deploy.local.roles import apply_roles
from deploy.local.servers import servers
from shared import broker
from shared.database import Connection
from shared.facts import SessionStop
from shared.migrate import SHARED_MIGRATIONS, migrate, read_migrations
from tests.conftest import Stack
from tests.integration.conftest import EFFECTS, replica, stop

ROUNDS = 5
FACTS = 2000
WRITERS = 64


async def write(connection: Connection, facts: Sequence[SessionStop]) -> None:
    names = [fact.session_id for fact in facts]
    await connection.execute("INSERT INTO effects (session_id) SELECT unnest($1::text[])", names)


async def measure(stack: Stack, batch_facts: int) -> dict[str, float]:
    """Publish FACTS from WRITERS tasks and wait until all are applied; `batch_facts` 1 switches group commit off."""
    setattr(broker, "BATCH_FACTS_MAX", batch_facts)  # noqa: B010 - the very thing that is compared
    async with replica(stack) as one:
        await one.pool.execute("TRUNCATE effects")
        one.reader.store(SessionStop, write)
        await one.reader.start()
        await one.publisher.publish(stop("warm"))
        cpu, begun = time.process_time(), time.perf_counter()

        async def writer(number: int) -> None:
            for i in range(FACTS // WRITERS):
                await one.publisher.publish(stop(f"{number}-{i}"))

        await asyncio.gather(*(writer(number) for number in range(WRITERS)))
        confirmed = time.perf_counter() - begun
        count = FACTS // WRITERS * WRITERS + 1
        while await one.pool.fetchval("SELECT count(*) FROM effects") < count:  # noqa: ASYNC110 - what it measures
            await asyncio.sleep(0.002)
        applied = time.perf_counter() - begun
        cpu = time.process_time() - cpu
    return {
        "confirmed_per_s": count / confirmed,
        "applied_per_s": count / applied,
        "cpu_us_per_fact": cpu / count * 1e6,
    }


async def compare(stack: Stack) -> dict[str, dict[str, float]]:
    connection = await asyncpg.connect(stack.settings().database_url.get_secret_value())
    await connection.execute(EFFECTS)
    await connection.close()
    async with replica(stack) as one:
        await migrate(one.pool, read_migrations("shared", SHARED_MIGRATIONS))
    runs: dict[str, list[dict[str, float]]] = {"one message per fact": [], "group commit": []}
    for _ in range(ROUNDS):
        runs["one message per fact"].append(await measure(stack, 1))
        runs["group commit"].append(await measure(stack, 256))
    return {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with (
        tempfile.TemporaryDirectory(prefix="bide-bench-") as folder,
        servers(Path(folder), durable=True, report=lambda line: print(line, file=sys.stderr)) as running,
    ):
        apply_roles(running.postgres.url)
        table = asyncio.run(compare(Stack(running.postgres.url, running.rabbitmq.url)))
    ratio = table["group commit"]["applied_per_s"] / table["one message per fact"]["applied_per_s"]
    if arguments.json:
        print(json.dumps({"bus": table, "ratio": ratio, "load": os.getloadavg()}))
        return 0
    print(f"{'bus, durable, 64 writers':26} {'confirmed/s':>12} {'applied/s':>12} {'CPU µs/fact':>12}")
    for name, row in table.items():
        print(f"{name:26} {row['confirmed_per_s']:12.0f} {row['applied_per_s']:12.0f} {row['cpu_us_per_fact']:12.0f}")
    print(f"group commit applies {ratio:.1f} times as many; medians of {ROUNDS} pairs; load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
