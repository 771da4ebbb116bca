"""Reading the bus: batches in, each fact in effect once, one bad fact never takes others along.

A handler is called inside the transaction that also remembers its facts (inbox) and sets the unreadable ones aside. It
returns what is to be told once that has committed. Trouble of Postgres is waited out here, un-acked: prefetch is the
backpressure, and a nack loop would dead-letter everything within a second (3-bus rules 3 to 5).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import structlog
from faststream import AckPolicy
from faststream.rabbit import (
    Channel,
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitMessage,
    RabbitQueue,
)
from faststream.rabbit.subscriber import RabbitSubscriber

from shared import topology
from shared.batches import decode_batch
from shared.broker import CONNECT_TIMEOUT_S, broker_url, is_lost, probe, reconnect_interval_s, unstick
from shared.database import Connection, Pool, Trouble, backoff_s, classify, transact
from shared.facts import FactT, routing_key
from shared.inbox import Inbox
from shared.intake import Aside, Batch, Store, pay, set_aside, split_or_whole
from shared.settings import SharedSettings
from shared.telemetry import BUS_CONNECTED, DEAD_LETTERS, FACTS_READ, log
from shared.topology import Route

Hear = Callable[[Sequence[FactT]], Awaitable[None]]
"""A handler of facts that only change memory."""

_CLOSE_S = 5.0
_PREFETCH = 8
"""Batches in work at once per queue; each holds a connection of the pool while it is written, half of them at most."""
_PREFETCH_ORDERED = 32
"""Batches that may be written as one: an ordered queue is read by one replica, with one transaction at a time."""
_TOGETHER_BYTES_MAX = 4 << 20


class Reader:
    """All subscriptions of one replica. Register handlers, then `start`; `stop` waits for what is in work."""

    def __init__(
        self,
        settings: SharedSettings,
        service: str,
        pool: Pool,
        inbox: Inbox,
        *,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self._service = service
        self._replica_id = settings.replica_id
        self._drain_s = settings.drain_s
        self._pool = pool
        # Half of the pool: batches that wait for locks must leave the loops a connection, or nothing is delivered.
        self._writing = asyncio.Semaphore(settings.database_pool_max // 2)
        self._inbox = inbox
        self._committed = committed
        self._asides: dict[str, Aside] = {}
        self._lines: list[tuple[_Line, RabbitSubscriber]] = []
        self._unsticking: asyncio.Task[None] | None = None
        self._exchange = RabbitExchange(topology.EXCHANGE, type=ExchangeType.TOPIC, durable=True)
        self.broker = RabbitBroker(
            broker_url(settings, "reader"),
            timeout=CONNECT_TIMEOUT_S,
            fail_fast=False,
            reconnect_interval=reconnect_interval_s(),
            on_close=[lambda *_: BUS_CONNECTED.labels("reader").set(0)],
            on_reconnected=[lambda *_: BUS_CONNECTED.labels("reader").set(1)],
            graceful_timeout=settings.drain_s,
            apply_types=False,
            logger=None,
        )

    def store(
        self, fact: type[FactT], handle: Store[FactT], *, reader: str | None = None, aside: Aside | None = None
    ) -> None:
        """Let `handle` write `fact`; `reader` if the queue is not named after the service.

        `aside` is what is owed for one that was set aside, also by the broker.
        """
        route = topology.route(fact, reader or self._service)
        if aside is not None:
            self._asides[route.queue(self._replica_id)] = aside
        write = partial(self._write, route, handle)
        if not route.ordered:
            self._subscribe(route, partial(_alone, write))
            return
        line = _Line(write)
        self._lines.append((line, self._subscribe(route, line)))

    def hear(self, fact: type[FactT], handle: Hear[FactT], *, own: bool = True, reader: str | None = None) -> None:
        """Let `handle` take `fact` into memory; `reader` if the queue is not named after the service.

        `own` False: not what this replica has published itself.
        """
        route = topology.route(fact, reader or self._service)
        heard = partial(self._hear_message, route, handle)
        self._subscribe(route, heard if own else partial(self._hear_others, heard))

    async def start(self) -> None:
        """Declare what is read, and begin to read.

        Raises:
            ConnectionError: RabbitMQ went away meanwhile. Half a start cannot be taken back, so the process is to end.
        """
        try:
            await self.broker.start()
            connection = await self.broker.connect()
        except (Exception, asyncio.CancelledError) as error:
            if not is_lost(error):
                raise
            raise ConnectionError(f"RabbitMQ went away at the start: {type(error).__name__}: {error}") from error
        self._unsticking = asyncio.create_task(unstick(connection), name="unstick")
        BUS_CONNECTED.labels("reader").set(1)

    async def stop(self) -> None:
        """Take nothing new and wait up to `drain_s` for batches in work; the rest is delivered again elsewhere."""
        if self._unsticking is not None:
            self._unsticking.cancel()
        try:
            async with asyncio.timeout(self._drain_s + _CLOSE_S):
                for line, subscriber in self._lines:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._drain_s):
                            await line.close()
                    await _let_go(subscriber)
                await self.broker.stop()
        except TimeoutError:
            log.warning("reader_not_closed", hint="the broker did not answer; what was not acked comes again")

    async def probe(self) -> None:
        """One round trip on the reader's own connection: a publisher that is well says nothing about it."""
        await probe(await self.broker.connect())

    def store_undeliverable(self) -> None:
        """Keep what the broker itself gave up on as dead letters of this service."""

        async def receive(message: RabbitMessage) -> None:
            deaths: Any = message.headers.get("x-death") or [{}]
            source = str(deaths[0].get("queue", "unknown"))

            async def keep(connection: Connection) -> None:
                await set_aside(connection, source, message.body, "undeliverable", str(deaths[0].get("reason", "")))
                for raw in split_or_whole(message.body):
                    await pay(connection, self._asides.get(source), raw, "undeliverable")

            attempt = 0
            while True:  # as every batch: un-acked, for there is no other way in which it would come again
                try:
                    await transact(self._pool, keep)
                except Exception as error:
                    if classify(error) not in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                        log.exception("batch_not_acknowledged")
                        raise
                    log.warning("waiting_for_postgres", error=f"{type(error).__name__}: {error}"[:300])
                    await asyncio.sleep(backoff_s(attempt))
                    attempt += 1
                else:
                    break
            self._committed()
            DEAD_LETTERS.labels(source, "undeliverable").inc()
            await message.ack()

        queue = RabbitQueue(topology.DEAD_QUEUE, queue_type=QueueType.QUORUM, durable=True)
        subscriber = self.broker.subscriber(
            queue, channel=Channel(prefetch_count=1), ack_policy=AckPolicy.MANUAL, decoder=_undecoded
        )
        subscriber(receive)

    def _subscribe(self, route: Route, on_message: Callable[[RabbitMessage], Awaitable[None]]) -> RabbitSubscriber:
        for outcome in ("applied", "duplicate", "failed"):
            FACTS_READ.labels(route.fact.__name__, outcome)
        for reason in ("invalid", "unstorable", "handler_error"):
            DEAD_LETTERS.labels(route.fact.__name__, reason)
        arguments: Any = route.arguments()
        queue = RabbitQueue(
            route.queue(self._replica_id),
            durable=True,
            routing_key=routing_key(route.fact),
            arguments=arguments,
        )

        async def receive(message: RabbitMessage) -> None:
            try:
                await on_message(message)
            except Exception:
                # Un-acked: it comes again when the connection does. FastStream would swallow this without a word.
                log.exception("batch_not_acknowledged")
                raise

        subscriber = self.broker.subscriber(
            queue,
            self._exchange,
            channel=Channel(prefetch_count=_PREFETCH_ORDERED if route.ordered else _PREFETCH),
            ack_policy=AckPolicy.MANUAL,
            decoder=_undecoded,
        )
        subscriber(receive)
        return subscriber

    async def _write(self, route: Route, handle: Store[FactT], bodies: Sequence[bytes]) -> None:
        started = time.perf_counter()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(fact=route.fact.__name__)
        aside = self._asides.get(route.queue(self._replica_id))
        batch = Batch(self._pool, self._writing, self._inbox, route, handle, bodies, aside=aside)
        if batch.facts or batch.unreadable:
            await batch.write()
            self._committed()
        took_ms = (time.perf_counter() - started) * 1000
        log.debug("batch_stored", facts=len(batch.facts), unreadable=len(batch.unreadable), took_ms=round(took_ms, 1))

    async def _hear_others(self, heard: Callable[[RabbitMessage], Awaitable[None]], message: RabbitMessage) -> None:
        """Leave out our own: what this replica said it knows, and reading it again is half of what saying it cost."""
        if message.raw_message.app_id == self._replica_id:
            await message.ack()
        else:
            await heard(message)

    async def _hear_message(self, route: Route, handle: Hear[FactT], message: RabbitMessage) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(fact=route.fact.__name__)
        kind: type[FactT] = route.fact  # type: ignore[assignment]
        facts, unreadable = decode_batch(kind, message.body)
        for bad in unreadable:
            log.warning("fact_unreadable", error=bad.error)
        try:
            await handle(facts)
        except Exception:  # noqa: BLE001 - logged; see below
            # A copy in memory is healed by the next snapshot; a reader that died would never see one.
            log.exception("handler_failed")
            FACTS_READ.labels(route.fact.__name__, "failed").inc(len(facts))
        else:
            FACTS_READ.labels(route.fact.__name__, "applied").inc(len(facts))
        await message.ack()


async def _let_go(subscriber: RabbitSubscriber) -> None:
    """Give back what is not acknowledged before a sibling reads on: after a cancel it would read later ones first."""
    queue = subscriber._queue_obj  # noqa: SLF001 - the driver's own channel; FastStream closes it last of all
    if queue is not None and not queue.channel.is_closed:
        await queue.channel.close()


async def _undecoded(message: RabbitMessage) -> RabbitMessage:
    """What FastStream hands to `receive`: without its dependency injection a handler gets only the decoded value."""
    return message


Write = Callable[[Sequence[bytes]], Awaitable[None]]
"""Commits the facts of these message bodies; comes back only then."""


async def _alone(write: Write, message: RabbitMessage) -> None:
    await write([message.body])
    await message.ack()


class _Line:
    """Messages of one queue in the broker's order: one transaction at a time, for whatever waits by then."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._waiting: list[tuple[RabbitMessage, asyncio.Event]] = []
        self._one = asyncio.Lock()
        self._closed = False

    async def close(self) -> None:
        """Write nothing more; come back when what is under way is committed and acknowledged."""
        self._closed = True
        async with self._one:
            pass

    async def __call__(self, message: RabbitMessage) -> None:
        written = asyncio.Event()
        self._waiting.append((message, written))
        try:
            async with self._one:
                while not written.is_set():
                    if self._closed:
                        return  # un-acked: it goes back to its place
                    await self._write_next()
        finally:
            # Cancelled with its connection: the broker gives it to somebody else.
            self._waiting = [each for each in self._waiting if each[1] is not written]
        await message.ack()

    async def _write_next(self) -> None:
        together: list[tuple[RabbitMessage, asyncio.Event]] = []
        size = 0
        for each in self._waiting:
            size += len(each[0].body)
            if together and size > _TOGETHER_BYTES_MAX:
                break
            together.append(each)
        await self._write([message.body for message, _ in together])
        for each in together:
            each[1].set()
        self._waiting = [each for each in self._waiting if not each[1].is_set()]
