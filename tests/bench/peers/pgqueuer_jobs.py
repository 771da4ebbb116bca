"""pgqueuer: jobs in Postgres, taken in batches of ten."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import sys
import time

import asyncpg
from common import AT_ONCE, DATABASE, DRAIN_LIMIT_S, JOBS, PAYLOAD, Clock, tell
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, PgQueuer, Queries

logging.disable(logging.CRITICAL)
done = 0


async def main() -> None:
    connection = await asyncpg.connect(DATABASE)
    await Queries(AsyncpgDriver(connection)).install()
    pool = await asyncpg.create_pool(DATABASE, min_size=8, max_size=8)
    queries = Queries(AsyncpgPoolDriver(pool))
    payload = json.dumps(PAYLOAD).encode()
    slots = asyncio.Semaphore(AT_ONCE)

    async def enqueue() -> None:
        async with slots:
            await queries.enqueue("noop", payload)

    clock = Clock()
    await asyncio.gather(*(enqueue() for _ in range(JOBS)))
    enqueued = clock.per_s(JOBS)
    worker = PgQueuer(AsyncpgDriver(await asyncpg.connect(DATABASE)))

    @worker.entrypoint("noop")
    async def noop(_job: object) -> None:
        global done  # noqa: PLW0603 - the job is to count
        done += 1

    clock = Clock()
    running = asyncio.create_task(worker.run(batch_size=10, dequeue_timeout=dt.timedelta(seconds=1)))
    limit = time.monotonic() + DRAIN_LIMIT_S
    while done < JOBS and time.monotonic() < limit and not running.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    tell(enqueue_per_s=enqueued, drain_per_s=clock.per_s(done), drain_cpu_us=clock.cpu_us(done), drained=done)
    sys.stdout.flush()
    os._exit(0)  # it waits for its own timeouts


asyncio.run(main())
