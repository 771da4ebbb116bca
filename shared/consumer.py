"""Reading the bus: batches in, each fact in effect once, one bad fact never takes others along.

A handler is called inside the transaction that also remembers its facts (inbox) and sets the unreadable ones aside. It
returns what is to be told once that has committed. Trouble of Postgres is waited out here, un-acked: prefetch is the
backpressure, and a nack loop would dead-letter everything within a second (3-bus rules 3 to 5).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitMessage, RabbitQueue

from shared import topology
from shared.batches import Unreadable, decode_batch, encode
from shared.broker import CONNECT_TIMEOUT_S, broker_url, reconnect_interval_s
from shared.database import Connection, Pool, Trouble, backoff_s, classify, load_queries, transact
from shared.facts import FactT, routing_key
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

_SQL = load_queries(Path(__file__).parent / "queries.sql")
_PREFETCH = 8
"""Batches in work at once per queue; each holds a connection of the pool while it is written."""


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
        self._pool = pool
        self._inbox = inbox
        self._committed = committed
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

    def store(self, fact: type[FactT], handle: Store[FactT], *, reader: str | None = None) -> None:
        """Let `handle` write `fact`; `reader` if the queue is not named after the service."""
        route = topology.route(fact, reader or self._service)
        self._subscribe(route, partial(self._store_message, route, handle))

    def hear(self, fact: type[FactT], handle: Hear[FactT]) -> None:
        """Let `handle` take `fact` into memory."""
        route = topology.route(fact, self._service)
        self._subscribe(route, partial(self._hear_message, route, handle))

    async def start(self) -> None:
        await self.broker.start()
        BUS_CONNECTED.labels("reader").set(1)

    async def stop(self) -> None:
        """Take nothing new and wait up to `drain_s` for batches in work; the rest is delivered again elsewhere."""
        await self.broker.stop()

    def _subscribe(self, route: Route, on_message: Callable[[RabbitMessage], Awaitable[None]]) -> None:
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
            channel=Channel(prefetch_count=_PREFETCH),
            ack_policy=AckPolicy.MANUAL,
            decoder=_undecoded,
        )
        subscriber(receive)

    async def _store_message(self, route: Route, handle: Store[FactT], message: RabbitMessage) -> None:
        started = time.perf_counter()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(fact=route.fact.__name__)
        kind: type[FactT] = route.fact  # type: ignore[assignment]
        facts, unreadable = decode_batch(kind, message.body)
        if facts or unreadable:
            batch = _Batch(self._pool, self._inbox, route=route, handle=handle, facts=facts, unreadable=unreadable)
            await batch.write()
            self._committed()
        await message.ack()
        took_ms = (time.perf_counter() - started) * 1000
        log.debug("batch_stored", facts=len(facts), unreadable=len(unreadable), took_ms=round(took_ms, 1))

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


async def _undecoded(message: RabbitMessage) -> RabbitMessage:
    """What FastStream hands to `receive`: without its dependency injection a handler gets only the decoded value."""
    return message


class _Batch:
    """One batch on its way into the database: whole if that works, else fact by fact."""

    def __init__(
        self,
        pool: Pool,
        inbox: Inbox,
        *,
        route: Route,
        handle: Store[FactT],
        facts: list[FactT],
        unreadable: list[Unreadable],
    ) -> None:
        self._pool = pool
        self._inbox = inbox
        self._once = route.kind is Kind.QUORUM
        self._name = route.fact.__name__
        self._handle = handle
        self._facts = facts
        self._unreadable = unreadable

    async def write(self) -> None:
        """Commit the batch; come back only then."""
        attempt = 0
        work = self._whole
        while True:
            try:
                if self._once:
                    await self._inbox.prepare(self._facts)
                tells = await transact(self._pool, work)
            except Exception as error:  # noqa: BLE001 - classify says what it means, and nothing is swallowed
                trouble = classify(error)
                if work == self._whole and trouble in (Trouble.DATA, None):
                    log.warning("batch_repeated_singly", error=f"{type(error).__name__}: {error}"[:300])
                    self._inbox.distrust()
                    work = self._singly
                    continue
                INFRASTRUCTURE_WAITS.labels(self._name).inc()
                log.warning("waiting_for_postgres", error=f"{type(error).__name__}: {error}"[:300], attempt=attempt)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                for tell in tells:
                    tell()
                return

    async def _whole(self, connection: Connection) -> list[Tell]:
        await self._set_unreadable_aside(connection)
        new = await self._inbox.admit(connection, self._facts) if self._once else self._facts
        tell = await self._handle(connection, new) if new else None
        FACTS_READ.labels(self._name, "duplicate").inc(len(self._facts) - len(new))
        FACTS_READ.labels(self._name, "applied").inc(len(new))
        return [tell] if tell else []

    async def _singly(self, connection: Connection) -> list[Tell]:
        await self._set_unreadable_aside(connection)
        new = await self._inbox.admit(connection, self._facts) if self._once else self._facts
        tells: list[Tell] = []
        for fact in new:
            try:
                async with connection.transaction():
                    tell = await self._handle(connection, [fact])
            except Exception as error:
                trouble = classify(error)
                if trouble in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                    raise
                reason = "unstorable" if trouble is Trouble.DATA else "handler_error"
                await set_aside(connection, self._name, encode(fact), reason, f"{type(error).__name__}: {error}")
                continue
            if tell:
                tells.append(tell)
        return tells

    async def _set_unreadable_aside(self, connection: Connection) -> None:
        for bad in sorted(self._unreadable, key=lambda bad: bad.raw):
            await set_aside(connection, self._name, bad.raw, "invalid", bad.error)


async def set_aside(connection: Connection, fact_type: str, raw: bytes, reason: str, error: str) -> None:
    """Keep a fact that cannot take effect, with the reason; the same one only once."""
    digest = hashlib.sha256(fact_type.encode() + b"\0" + raw).digest()
    # NUL and lone surrogates are what brings facts here: they must not stop the sentence about them.
    sentence = error.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:1000]
    result = await connection.execute(_SQL["insert_dead_letter"], digest, fact_type, reason, sentence, raw)
    if result.endswith(" 1"):
        DEAD_LETTERS.labels(fact_type, reason).inc()
        log.error("fact_set_aside", fact_type=fact_type, reason=reason, error=sentence)
