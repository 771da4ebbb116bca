"""Reading the bus: batches in, each fact in effect once, one bad fact never takes others along.

A handler is called inside the transaction that also remembers its facts (inbox) and sets the unreadable ones aside. It
returns what is to be told once that has committed. Trouble of Postgres is waited out here, un-acked: prefetch is the
backpressure, and a nack loop would dead-letter everything within a second (3-bus rules 3 to 5).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from shared.batches import decode_batch, encode, split
from shared.broker import CONNECT_TIMEOUT_S, broker_url, probe, reconnect_interval_s, unstick
from shared.database import Connection, Pool, Trouble, backoff_s, classify, load_queries, transact
from shared.facts import Fact, FactT, routing_key
from shared.inbox import Inbox
from shared.settings import SharedSettings
from shared.telemetry import BUS_CONNECTED, DEAD_LETTERS, FACTS_READ, INFRASTRUCTURE_WAITS, log
from shared.topology import Kind, Route

Tell = Callable[[], None]
"""What a handler wants done after its commit: post facts, wake a loop. It must not block."""

Store = Callable[[Connection, Sequence[FactT]], Awaitable[Tell | None]]
"""A handler of facts that are written: called in their transaction; must be repeatable."""

Hear = Callable[[Sequence[FactT]], Awaitable[None]]
"""A handler of facts that only change memory."""

Aside = Callable[[Connection, bytes, str], Awaitable[None]]
"""What is owed for a fact that was set aside: called with its bytes and the reason, in the transaction of its dead
letter, and last, because it may lock what handlers lock."""

_SQL = load_queries(Path(__file__).parent / "queries.sql")
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

    def hear(self, fact: type[FactT], handle: Hear[FactT], *, own: bool = True) -> None:
        """Let `handle` take `fact` into memory. `own` False: not what this replica has published itself."""
        route = topology.route(fact, self._service)
        heard = partial(self._hear_message, route, handle)
        self._subscribe(route, heard if own else partial(self._hear_others, heard))

    async def start(self) -> None:
        await self.broker.start()
        self._unsticking = asyncio.create_task(unstick(await self.broker.connect()), name="unstick")
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
        batch = _Batch(self._pool, self._writing, self._inbox, route, handle, bodies, aside=aside)
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


@dataclass(slots=True)
class _Written:
    """What one try of a batch did; counted and told only once it has committed."""

    applied: int = 0
    duplicate: int = 0
    tells: list[Tell] = field(default_factory=list)
    aside: list[tuple[str, str, bytes]] = field(default_factory=list)
    """(reason, sentence, the fact's bytes)"""


class _Batch:
    """Batches on their way into the database together: whole if that works, else fact by fact."""

    def __init__(  # noqa: PLR0917 - what the reader has, and what is its own
        self,
        pool: Pool,
        writing: asyncio.Semaphore,
        inbox: Inbox,
        route: Route,
        handle: Store[FactT],
        bodies: Sequence[bytes],
        *,
        aside: Aside | None,
    ) -> None:
        self._pool = pool
        self._writing = writing
        self._inbox = inbox
        self._once = route.kind is Kind.QUORUM
        self._name = route.fact.__name__
        self._handle = handle
        self._bodies = bodies
        self._aside = aside
        kind: type[FactT] = route.fact  # type: ignore[assignment]
        decoded = [decode_batch(kind, body) for body in bodies]
        self.facts = [fact for facts, _ in decoded for fact in facts]
        self.unreadable = [bad for _, unreadable in decoded for bad in unreadable]

    async def write(self) -> None:
        """Commit the batch; come back only then."""
        attempt = 0
        work = self._whole
        while True:
            try:
                async with self._writing:
                    if self._once:
                        await self._inbox.prepare(self.facts)
                    written = await transact(self._pool, work)
            except Exception as error:  # noqa: BLE001 - classify says what it means, and nothing is swallowed
                infrastructure = classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT)
                words = f"{type(error).__name__}: {error}"[:300]
                if not infrastructure:
                    self._inbox.distrust()
                if not infrastructure and work == self._whole:
                    log.warning("batch_repeated_singly", error=words)
                    work = self._singly
                    continue
                INFRASTRUCTURE_WAITS.labels(self._name).inc()
                log.warning("waiting_for_postgres" if infrastructure else "batch_failed", error=words, attempt=attempt)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                return self._tell(written)

    def _tell(self, written: _Written) -> None:
        FACTS_READ.labels(self._name, "applied").inc(written.applied)
        FACTS_READ.labels(self._name, "duplicate").inc(written.duplicate)
        for reason, sentence, _ in written.aside:
            DEAD_LETTERS.labels(self._name, reason).inc()
            log.error("fact_set_aside", reason=reason, error=sentence)
        for tell in written.tells:
            try:
                tell()
            except Exception:  # noqa: BLE001 - logged
                # It has committed: an un-acked batch would not be told again, only block the queue.
                log.exception("tell_failed")

    async def _whole(self, connection: Connection) -> _Written:
        written = await self._begin(connection)
        new = await self._admit(connection, written)
        if new and (tell := await self._handle(connection, new)):
            written.tells.append(tell)
        written.applied = len(new)
        return await self._pay(connection, written)

    async def _singly(self, connection: Connection) -> _Written:
        written = await self._begin(connection)
        for fact in await self._admit(connection, written):
            try:
                async with connection.transaction():
                    tell = await self._handle(connection, [fact])
            except Exception as error:
                trouble = classify(error)
                if trouble in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                    raise
                reason = "unstorable" if trouble is Trouble.DATA else "handler_error"
                await self._set_aside(connection, written, self._raw(fact), reason, f"{type(error).__name__}: {error}")
                continue
            written.applied += 1
            if tell:
                written.tells.append(tell)
        return await self._pay(connection, written)

    async def _pay(self, connection: Connection, written: _Written) -> _Written:
        for reason, _, raw in written.aside:
            await pay(connection, self._aside, raw, reason)
        return written

    async def _begin(self, connection: Connection) -> _Written:
        written = _Written()
        for bad in sorted(self.unreadable, key=lambda bad: bad.raw):
            await self._set_aside(connection, written, bad.raw, "invalid", bad.error)
        return written

    async def _admit(self, connection: Connection, written: _Written) -> list[Any]:
        new = await self._inbox.admit(connection, self.facts) if self._once else self.facts
        written.duplicate = len(self.facts) - len(new)
        return new

    async def _set_aside(self, connection: Connection, written: _Written, raw: bytes, reason: str, error: str) -> None:
        if sentence := await set_aside(connection, self._name, raw, reason, error):
            written.aside.append((reason, sentence, raw))

    def _raw(self, fact: Fact) -> bytes:
        """The fact's own bytes, with what a newer writer put in that we do not know."""
        mark = str(fact.fact_id).encode()
        return next((raw for body in self._bodies for raw in split(body) if mark in raw), encode(fact))


async def pay(connection: Connection, aside: Aside | None, raw: bytes, reason: str) -> None:
    """Do what is owed for a fact that was set aside.

    What is wrong with the fact may break that too; the dead letter stays.
    """
    if aside is None:
        return
    try:
        async with connection.transaction():
            await aside(connection, raw, reason)
    except Exception as error:
        if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
            raise
        log.exception("aside_failed", reason=reason)


def split_or_whole(body: bytes) -> list[bytes]:
    """The facts of a batch, or the body itself if it is none."""
    try:
        return split(body)
    except ValueError:
        return [body]


async def set_aside(connection: Connection, fact_type: str, raw: bytes, reason: str, error: str) -> str | None:
    """Keep a fact that cannot take effect, with the reason; the same one only once.

    Returns: the sentence that was kept; None: it was there already.
    """
    digest = hashlib.sha256(fact_type.encode() + b"\0" + raw).digest()
    # NUL and lone surrogates are what brings facts here: they must not stop the sentence about them.
    sentence = error.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:1000]
    result = await connection.execute(_SQL["insert_dead_letter"], digest, fact_type, reason, sentence, raw)
    return sentence if result.endswith(" 1") else None
