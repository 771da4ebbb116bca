"""procrastinate: jobs in Postgres, one worker of ten tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import procrastinate
from common import AT_ONCE, DATABASE, DRAIN_LIMIT_S, JOBS, PAYLOAD, Clock, tell

logging.disable(logging.CRITICAL)
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DATABASE, min_size=4, max_size=20))
done = 0


@app.task(queue="bench", name="noop")
async def noop(payload: object) -> None:
    global done  # noqa: PLW0603 - the job is to count
    del payload
    done += 1


async def main() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        slots = asyncio.Semaphore(AT_ONCE)

        async def defer() -> None:
            async with slots:
                await noop.defer_async(payload=PAYLOAD)

        clock = Clock()
        await asyncio.gather(*(defer() for _ in range(JOBS)))
        enqueued = clock.per_s(JOBS)
        clock = Clock()
        worker = asyncio.create_task(
            app.run_worker_async(
                queues=["bench"], concurrency=10, wait=True, install_signal_handlers=False, delete_jobs="never"
            )
        )
        limit = time.monotonic() + DRAIN_LIMIT_S
        while done < JOBS and time.monotonic() < limit:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        tell(enqueue_per_s=enqueued, drain_per_s=clock.per_s(done), drain_cpu_us=clock.cpu_us(done), drained=done)
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker


asyncio.run(main())
