"""celery over RabbitMQ with confirms and late acknowledgement: one solo worker process, results ignored."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from celery import Celery
from common import AT_ONCE, BROKER, DRAIN_LIMIT_S, JOBS, PAYLOAD, Clock, tell

app = Celery("celery_jobs", broker=BROKER)
app.conf.update(
    task_ignore_result=True,
    task_default_queue="bench.celery",
    worker_prefetch_multiplier=100,
    worker_hijack_root_logger=False,
    task_acks_late=True,
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
)
_maps: list[mmap.mmap] = []


def counter() -> mmap.mmap:
    if not _maps:
        with Path(os.environ["PEER_COUNTER"]).open("r+b") as file:
            _maps.append(mmap.mmap(file.fileno(), 8))
    return _maps[0]


def count() -> int:
    return int(struct.unpack_from("q", counter(), 0)[0])


@app.task(name="noop")
def noop(payload: object) -> None:
    del payload
    struct.pack_into("q", counter(), 0, count() + 1)


def send(number: int) -> None:
    for _ in range(number):
        noop.delay(PAYLOAD)


def main() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\0" * 8)
        file.flush()
        os.environ["PEER_COUNTER"] = file.name
        threads = [threading.Thread(target=send, args=(JOBS // 16,)) for _ in range(min(16, AT_ONCE))]
        noop.delay(PAYLOAD)
        clock = Clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        jobs = JOBS // 16 * 16
        enqueued = clock.per_s(jobs)
        command = ["celery", "-A", "celery_jobs", "worker", "-P", "solo", "-c", "1", "-l", "ERROR"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        worker = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while count() < 1:
            time.sleep(0.001)
        first, clock, limit = count(), Clock(), time.monotonic() + DRAIN_LIMIT_S
        while count() < jobs + 1 and time.monotonic() < limit:
            time.sleep(0.005)
        drained = count() - first
        tell(enqueue_per_s=enqueued, drain_per_s=clock.per_s(drained), drained=drained)
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    main()
