"""dramatiq over RabbitMQ with confirms: one worker of eight threads."""

from __future__ import annotations

import logging
import os
import threading
import time

import dramatiq
from common import BROKER, DRAIN_LIMIT_S, JOBS, PAYLOAD, Clock, tell
from dramatiq.brokers.rabbitmq import RabbitmqBroker

logging.disable(logging.CRITICAL)
broker = RabbitmqBroker(url=BROKER, confirm_delivery=True)
dramatiq.set_broker(broker)
lock = threading.Lock()
done = 0


@dramatiq.actor(queue_name="bench_dramatiq", max_retries=0)
def noop(payload: object) -> None:
    global done  # noqa: PLW0603 - the job is to count
    del payload
    with lock:
        done += 1


def send(number: int) -> None:
    for _ in range(number):
        noop.send(PAYLOAD)


broker.declare_queue("bench_dramatiq", ensure=True)
threads = [threading.Thread(target=send, args=(JOBS // 16,)) for _ in range(16)]
clock = Clock()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
jobs = JOBS // 16 * 16
enqueued = clock.per_s(jobs)
worker = dramatiq.Worker(broker, worker_threads=8)
clock, limit = Clock(), time.monotonic() + DRAIN_LIMIT_S
worker.start()
while done < jobs and time.monotonic() < limit:
    time.sleep(0.005)
tell(enqueue_per_s=enqueued, drain_per_s=clock.per_s(done), drain_cpu_us=clock.cpu_us(done), drained=done)
os._exit(0)  # its threads wait for their own timeouts
