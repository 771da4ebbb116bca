"""The frame of a service: settings → health → Postgres → migrations → RabbitMQ → handlers → run until SIGTERM → drain.

A service's `__main__` says only what is its own. Health answers from the first moment, so that an orchestrator sees a
service that waits for its servers as alive and not ready.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import asyncpg
import uvloop

from shared.broker import REFUSED, Publisher, open_publisher
from shared.consumer import Reader
from shared.database import Pool, open_pool, probe
from shared.http import App, health_app, serving
from shared.inbox import Inbox
from shared.loops import Loop, turning
from shared.migrate import SHARED_MIGRATIONS, MigrationError, migrate, read_migrations
from shared.outbox import Relay
from shared.settings import SettingsError, SettingsT, SharedSettings, load
from shared.telemetry import Health, log, start_logging

_STRAYS_S = 5.0
_NEW_OBJECTS = 50_000
_CANNOT = (
    *REFUSED,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    MigrationError,
    OSError,
)
_HINT = "check BIDE_DATABASE_URL, BIDE_AMQP_URL, BIDE_HTTP_HOST and BIDE_HTTP_PORT"


@dataclass(frozen=True, slots=True)
class Service:
    """What a service's own parts are made from."""

    settings: SharedSettings
    pool: Pool
    publisher: Publisher
    reader: Reader
    relay: Relay
    health: Health

    async def serve(self) -> None:
        """Begin to read, say that the service is up, and go on until cancelled."""
        await self.reader.start()
        self.health.add("reader", self.reader.probe)
        self.health.started()
        log.info("ready")
        await asyncio.Event().wait()


@asynccontextmanager
async def running(
    name: str, settings: SharedSettings, migrations: Path, *, app: Callable[[Health], App] = health_app
) -> AsyncIterator[Service]:
    """Bring up, in order, what each service has; take it down in the opposite one.

    The block registers its handlers on `service.reader` and then awaits `service.serve()`. `app` makes the HTTP face of
    a service that has more than health.
    """
    health = Health()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(app(health), settings))
        pool = await stack.enter_async_context(open_pool(settings))
        health.add("postgres", partial(probe, settings))
        await migrate(pool, [*read_migrations("shared", SHARED_MIGRATIONS), *read_migrations(name, migrations)])
        publisher = await stack.enter_async_context(open_publisher(settings))
        health.add("rabbitmq", publisher.probe)
        inbox = Inbox(pool, keep_s=settings.inbox_keep_s)
        relay = Relay(pool, publisher, claim_s=settings.outbox_claim_s, sweep_s=settings.outbox_sweep_s)
        await stack.enter_async_context(turning([relay.loop, Loop("inbox", inbox.forget)]))
        reader = Reader(settings, name, pool, inbox, committed=relay.wake)
        stack.push_async_callback(reader.stop)
        yield Service(settings, pool, publisher, reader, relay, health)


def start(name: str, kind: type[SettingsT], main: Callable[[SettingsT], Coroutine[None, None, None]]) -> int:
    """Run a service until SIGTERM or SIGINT; return the exit code (2: the settings cannot be used)."""
    try:
        settings = load(name, kind, os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    start_logging(name, settings, cached=True)
    _spare_the_collector()
    try:
        uvloop.run(_until_signalled(main(settings)))
    except _CANNOT as error:
        log.error("cannot_start", error=f"{type(error).__name__}: {error}", hint=_HINT)
        return 1
    log.info("stopped")
    return 0


def _spare_the_collector() -> None:
    """Let the garbage collector leave alone what was imported, and look for cycles a hundred times less often.

    A request makes some hundred objects and hardly a cycle; with Python's own thresholds a tenth of its time was spent
    on looking at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 20, 20)


async def _until_signalled(main: Awaitable[None]) -> None:
    task = asyncio.ensure_future(main)
    signalled = False

    def stop() -> None:
        nonlocal signalled
        if not signalled:  # a second signal must not cut the drain short; SIGKILL is there for that
            signalled = True
            log.info("stopping")
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled:
            raise
    finally:
        await _end_strays()


async def _end_strays() -> None:
    """Cancel what is left until it ends: aio-pika takes a cancel during an attempt for a lost connection."""
    deadline = time.monotonic() + _STRAYS_S
    while strays := asyncio.all_tasks() - {asyncio.current_task()}:
        for stray in strays:
            stray.cancel()
        await asyncio.wait(strays, timeout=0.1)
        if time.monotonic() > deadline:
            log.error("tasks_left", names=sorted(stray.get_name() for stray in strays))
            return
