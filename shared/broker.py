"""Publishing: one connection, one lane per destination, and everything that waits goes out together.

While a batch waits for its confirm, later facts gather; when it comes they leave as the next batch (group commit). No
timer is involved: a lone fact leaves at once. Publishers have their own connection, because RabbitMQ blocks publishing
connections under alarm, and a blocked one could not ack. Reading is `shared/consumer.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractRobustConnection, DeliveryMode
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AMQPError,
    AuthenticationError,
    ChannelPreconditionFailed,
    DeliveryError,
    ProbableAuthenticationError,
)
from yarl import URL

from shared import topology
from shared.batches import BATCH_BYTES_MAX, BATCH_FACTS_MAX, encode, encode_batch
from shared.database import backoff_s
from shared.facts import Fact, routing_key
from shared.settings import SharedSettings
from shared.telemetry import BATCH_FACTS, BUS_CONNECTED, FACTS_PUBLISHED, log

HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 5.0
_LOOK_S = 1.0
_STUCK_LOOKS = 5
"""A lost connection is taken up again within 1.5 s; one that still lies there after so many looks will be never."""
REFUSED = (AuthenticationError, ProbableAuthenticationError, ChannelPreconditionFailed)
"""What the broker will say again however often it is asked: the operator has to change something."""
LANE_BYTES_MAX = 64 << 20
"""What may wait in one lane; more is refused at once, so that a slow broker cannot fill the memory."""


class NotPublished(Exception):  # noqa: N818 - a state of the fact, not an error of the program
    """The broker does not have the fact and will not get it: nothing was promised."""


class PublishUnknown(Exception):  # noqa: N818
    """The fact was sent and no confirm came: the broker may have it or not."""


@dataclass(slots=True)
class _Waiting:
    encoded: bytes
    done: asyncio.Future[None]


class _Lane:
    """What waits for one destination. At most one batch of it is in flight, so its facts keep their order."""

    def __init__(self, kind: type[Fact]) -> None:
        self.kind = kind
        self.durable = topology.is_durable(kind)
        self.waiting: deque[_Waiting] = deque()
        self.bytes = 0
        self.task: asyncio.Task[None] | None = None

    def add(self, waiting: _Waiting) -> None:
        self.waiting.append(waiting)
        self.bytes += len(waiting.encoded)

    def take(self) -> list[_Waiting]:
        """The next batch. Facts whose publisher has given up are dropped: nobody was promised them."""
        batch: list[_Waiting] = []
        size = 0
        while self.waiting and len(batch) < BATCH_FACTS_MAX:
            head = self.waiting[0]
            if batch and size + len(head.encoded) > BATCH_BYTES_MAX:
                break
            self.waiting.popleft()
            self.bytes -= len(head.encoded)
            if not head.done.done():
                batch.append(head)
                size += len(head.encoded) + 1
        return batch

    def settle(self, batch: list[_Waiting], outcome: str, error: Exception | None = None) -> None:
        for waiting in batch:
            if waiting.done.done():
                continue
            if error is None:
                waiting.done.set_result(None)
            else:
                waiting.done.set_exception(error)
        FACTS_PUBLISHED.labels(self.kind.__name__, outcome).inc(len(batch))

    def refuse_all(self, reason: str) -> None:
        everything = list(self.waiting)
        self.waiting.clear()
        self.bytes = 0
        self.settle(everything, "not_published", NotPublished(reason))


class Publisher:
    """Sends facts to the exchange, or to a reply queue; tells for each what the broker said."""

    def __init__(
        self,
        connection: AbstractRobustConnection,
        channel: AbstractChannel,
        exchange: AbstractExchange,
        *,
        confirm_timeout_s: float,
        sender: str,
    ) -> None:
        self._sender = sender
        self._connection = connection
        self._channel = channel
        self._exchange = exchange
        self._confirm_timeout_s = confirm_timeout_s
        self._lanes: dict[tuple[type[Fact], str], _Lane] = {}
        self.reconnects = 0
        """Grows with each: what came meanwhile may be lost, however short the cut was."""
        for route in topology.ROUTES:
            for outcome in ("confirmed", "not_published", "unknown"):
                FACTS_PUBLISHED.labels(route.fact.__name__, outcome)

    async def publish(self, fact: Fact, *, to: str | None = None) -> None:
        """Return when the broker has confirmed `fact`; `to` names a reply queue instead of the exchange.

        Raises:
            NotPublished: the broker does not have it (away, refused, unroutable, or too much waits).
            PublishUnknown: sent, but not confirmed within `confirm_timeout_s`.
        """
        await self.post(fact, to=to)

    def post(self, fact: Fact, *, to: str | None = None) -> asyncio.Future[None]:
        """Like `publish`, without waiting; an outcome that nobody awaits is only counted."""
        return self.post_encoded(type(fact), encode(fact), to=to)

    def post_encoded(self, kind: type[Fact], encoded: bytes, *, to: str | None = None) -> asyncio.Future[None]:
        lane = self._lanes.setdefault((kind, to or ""), _Lane(kind))
        done = asyncio.get_running_loop().create_future()
        done.add_done_callback(_retrieve)
        waiting = _Waiting(encoded, done)
        if lane.bytes + len(encoded) > LANE_BYTES_MAX and lane.waiting:
            lane.settle([waiting], "not_published", NotPublished(f"{lane.bytes} bytes wait for the broker already"))
            return done
        lane.add(waiting)
        if lane.task is None:
            lane.task = asyncio.create_task(self._drain(lane, to), name=f"publish-{kind.__name__}")
        return done

    async def flush(self, within_s: float) -> None:
        """Wait until every lane is empty, or refuse what is left after `within_s`."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def probe(self) -> None:
        """One round trip to the broker, for /readyz: `ping` stays true against a frozen one."""
        await probe(self._connection)

    def reconnected(self, *_: object) -> None:
        self.reconnects += 1

    @property
    def is_connected(self) -> bool:
        return self._connection.connected.is_set()

    async def _drain(self, lane: _Lane, to: str | None) -> None:
        try:
            while batch := lane.take():
                await self._send(lane, batch, to)
        finally:
            lane.task = None
            if lane.waiting:  # cancelled: the process stops
                lane.refuse_all("the publisher stopped")
            elif to is not None:
                self._lanes.pop((lane.kind, to), None)

    async def _send(self, lane: _Lane, batch: list[_Waiting], to: str | None) -> None:
        if not self.is_connected:
            lane.settle(batch, "not_published", NotPublished("not connected to RabbitMQ"))
            return
        BATCH_FACTS.labels(lane.kind.__name__).observe(len(batch))
        try:
            async with asyncio.timeout(self._confirm_timeout_s):
                await self._publish(lane, encode_batch(waiting.encoded for waiting in batch), to)
        except DeliveryError as error:
            # Nacked (a full queue) or returned (no queue): the broker said no.
            lane.settle(batch, "not_published", NotPublished(f"the broker refused: {type(error).__name__}"))
        except TimeoutError:
            sentence = f"no confirm within {self._confirm_timeout_s:g} s"
            lane.settle(batch, "unknown", PublishUnknown(sentence))
            # Whoever waited behind it must not wait another timeout for a broker that does not answer.
            lane.refuse_all(f"the broker does not answer: {sentence}")
        except (AMQPError, OSError, RuntimeError) as error:
            lane.settle(batch, "unknown", PublishUnknown(f"the connection broke: {type(error).__name__}"))
        except Exception as error:  # noqa: BLE001 - logged, and told to each caller
            # Not foreseen: the callers must not wait for ever for it.
            lane.settle(batch, "unknown", PublishUnknown(f"{type(error).__name__}: {error}"))
            log.exception("publish_failed", fact=lane.kind.__name__)
        except asyncio.CancelledError:
            lane.settle(batch, "unknown", PublishUnknown("the connection closed"))
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not our task was cancelled but the confirm: the driver does that when it loses the connection.
        else:
            lane.settle(batch, "confirmed")

    async def _publish(self, lane: _Lane, body: bytes, to: str | None) -> None:
        # No message_id of ours: the driver matches returns by it, and one used twice at once confirms falsely.
        message = aio_pika.Message(
            body,
            app_id=self._sender,
            content_type="application/json",
            # The one place where persistence is decided; transient is the library's default.
            delivery_mode=DeliveryMode.PERSISTENT if lane.durable else DeliveryMode.NOT_PERSISTENT,
        )
        if to is not None:
            await self._channel.default_exchange.publish(message, to, mandatory=False)
        else:
            await self._exchange.publish(message, routing_key(lane.kind), mandatory=lane.durable)


async def probe(connection: AbstractRobustConnection) -> None:
    """Ask the broker something that it must answer, on a channel of its own.

    A robust declaration is answered from memory the second time, and one on a publishing channel would close it.
    """
    if not connection.connected.is_set():
        raise NotPublished("not connected to RabbitMQ")
    async with connection.channel(publisher_confirms=False) as channel:
        await channel.declare_queue(topology.DEAD_QUEUE, passive=True, robust=False)


def _retrieve(done: asyncio.Future[None]) -> None:
    if not done.cancelled():
        done.exception()


async def unstick(connection: AbstractRobustConnection) -> None:
    """Free the driver where it waits for itself, as long as this runs.

    While aio-pika 10.2.1 brings cancelled consumers back it waits for `connected`, which only its own next attempt
    would set: a connection that breaks just then, as when a broker's node stops, is never made again. Once that is set,
    the closed channel is noticed, and it connects.
    """
    looks = 0
    while True:
        await asyncio.sleep(_LOOK_S)
        transport = connection.transport
        lost = transport is not None and transport.connection.is_closed and not connection.connected.is_set()
        looks = looks + 1 if lost else 0
        if looks >= _STUCK_LOOKS:
            log.warning("reconnect_freed", hint="the driver waited for itself")
            connection.connected.set()
            looks = 0


def broker_url(settings: SharedSettings, name: str) -> str:
    """The AMQP URL with our heartbeat, and a name that an operator sees in RabbitMQ's list of connections."""
    url = URL(settings.amqp_url.get_secret_value())
    return str(url.update_query(heartbeat=str(HEARTBEAT_S), name=f"{settings.replica_id}/{name}"))


def reconnect_interval_s() -> float:
    """A pause of this process's own: two hundred of them must not come back in one moment (B-31)."""
    return random.uniform(0.5, 1.5)  # noqa: S311 - no secret


@asynccontextmanager
async def open_publisher(settings: SharedSettings) -> AsyncIterator[Publisher]:
    """Connect, declare the topology (again after each reconnect), publish; wait for a broker that is not there yet."""
    connection, publisher = await _open_when_there(settings)
    BUS_CONNECTED.labels("publisher").set_function(lambda: float(connection.connected.is_set()))
    async with connection:
        try:
            yield publisher
        finally:
            await publisher.flush(settings.confirm_timeout_s)


def is_lost(error: BaseException) -> bool:
    """Say whether the broker, or the way to it, went away: what it refused stays refused, and a cancel is a cancel.

    aiormq 7.2.4 also says it with StopAsyncIteration (closed between two frames of the greeting), with a bare Exception
    (while a channel is opened) and with a cancel that nobody asked for.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return type(error) is Exception or (isinstance(error, CONNECTION_EXCEPTIONS) and not isinstance(error, REFUSED))


async def _open_when_there(settings: SharedSettings) -> tuple[AbstractRobustConnection, Publisher]:
    attempt = 0
    while True:
        try:
            return await _open(settings)
        except (Exception, asyncio.CancelledError) as error:
            if not is_lost(error):
                raise
            log.warning("waiting_for_rabbitmq", error=f"{type(error).__name__}: {error}", attempt=attempt)
        await asyncio.sleep(backoff_s(attempt))
        attempt += 1


async def _open(settings: SharedSettings) -> tuple[AbstractRobustConnection, Publisher]:
    connection = await aio_pika.connect_robust(
        broker_url(settings, "publisher"),
        timeout=CONNECT_TIMEOUT_S,
        reconnect_interval=reconnect_interval_s(),
    )

    async def declare_again(*_: object) -> None:
        async with connection.channel() as channel:
            await topology.declare(channel)
        log.info("topology_declared")

    try:
        await declare_again()
        # A broker that lost its data comes back without queues: what is mandatory would be returned for ever.
        connection.reconnect_callbacks.add(declare_again)
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        # Not ensured: a passive declaration would be repeated at each reconnect, before ours, and fail without end on a
        # broker that lost its data.
        exchange = await channel.get_exchange(topology.EXCHANGE, ensure=False)
    except BaseException:
        await connection.close()
        raise
    publisher = Publisher(
        connection, channel, exchange, confirm_timeout_s=settings.confirm_timeout_s, sender=settings.replica_id
    )
    connection.reconnect_callbacks.add(publisher.reconnected)
    return connection, publisher
