"""Who reads what, and on what kind of queue: the table of 3-bus, and nothing else.

Every service declares all of it before its first publish and after every reconnect, so that no start order matters.
One topic exchange; one queue `<reader>.<routing key>` per reader and fact, for which replicas compete; a fact that
every replica must hear has a queue per replica besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel

from shared.facts import (
    BacklogSnapshot,
    DeliveryEvent,
    Fact,
    GateClosed,
    ItemChanged,
    ItemKept,
    KillDone,
    LivenessQuery,
    MessageBusy,
    ProxyBeat,
    QueryAnswered,
    QueueQuery,
    ScheduleApplied,
    ScheduleChanged,
    ScheduleQuery,
    ScheduleTick,
    SessionDirective,
    SessionGate,
    SessionKill,
    SessionStop,
    TickSettled,
    WorkspaceBacklog,
    WorkspaceChanged,
    WorkspaceEvidence,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
    WorkspaceStatus,
    routing_key,
)

EXCHANGE = "bide"
DEAD_QUEUE = "bide.dead"
"""What the broker itself gave up on; the queue service drains it into its dead_letters."""

PERISHABLE_TTL_S = 30
_PERISHABLE_LENGTH_MAX = 10_000
_KEPT_BYTES_MAX = 1 << 30
_REPLICA_EXPIRES_S = 60
_DELIVERY_LIMIT = 1_000_000
"""RabbitMQ 4 defaults to 20 and counts lost connections; -1 on 3.10 dead-letters at the first return."""


class Kind(Enum):
    """What a queue promises."""

    QUORUM = "quorum"
    """Kept through a broker restart, each fact in effect once (inbox)."""
    PERISHABLE = "perishable"
    """The newest 30 s; a later fact says it again."""
    REPLICA = "replica"
    """One replica's own. It outlives a cut connection by a minute and then goes; snapshots heal what was missed."""


@dataclass(frozen=True, slots=True)
class Route:
    """One reader of one fact."""

    fact: type[Fact]
    reader: str
    kind: Kind
    bytes_max: int | None = None
    ordered: bool = False
    """Read by one replica at a time, in the broker's order; another takes over when its connection ends (I3)."""

    def queue(self, replica_id: str) -> str:
        """Name of the queue; the same for all replicas unless the route is for each of them."""
        shared = f"{self.reader}.{routing_key(self.fact)}"
        return f"{shared}.{replica_id}" if self.kind is Kind.REPLICA else shared

    def arguments(self) -> dict[str, Any]:
        """Arguments of the declaration. Changing them for a queue that exists is refused by the broker: rename it."""
        match self.kind:
            case Kind.QUORUM:
                arguments: dict[str, Any] = {
                    "x-queue-type": "quorum",
                    "x-delivery-limit": _DELIVERY_LIMIT,
                    "x-overflow": "reject-publish",  # at-least-once dead-lettering needs it
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": DEAD_QUEUE,
                    "x-dead-letter-strategy": "at-least-once",
                }
                if self.bytes_max is not None:
                    arguments["x-max-length-bytes"] = self.bytes_max
                if self.ordered:
                    arguments["x-single-active-consumer"] = True
                return arguments
            case Kind.PERISHABLE:
                return {
                    "x-queue-type": "classic",
                    "x-message-ttl": PERISHABLE_TTL_S * 1000,
                    "x-max-length": _PERISHABLE_LENGTH_MAX,
                    "x-overflow": "drop-head",
                }
            case Kind.REPLICA:
                # Not AMQP-exclusive: after a half-open cut the broker would refuse the replica its own queue (405)
                # until it noticed. Durable, because RabbitMQ 4 drops transient queues that are not exclusive.
                return {
                    "x-queue-type": "classic",
                    "x-expires": _REPLICA_EXPIRES_S * 1000,
                    "x-max-length": _PERISHABLE_LENGTH_MAX,
                    "x-overflow": "drop-head",
                }


def _routes() -> Iterator[Route]:
    quorum, perishable, replica = Kind.QUORUM, Kind.PERISHABLE, Kind.REPLICA
    yield Route(MessageBusy, "queue", quorum, bytes_max=_KEPT_BYTES_MAX, ordered=True)
    yield Route(ItemKept, "proxy", replica)
    yield Route(QueueQuery, "queue", perishable)
    yield Route(QueryAnswered, "proxy", replica)
    yield Route(ItemChanged, "proxy", replica)
    yield Route(DeliveryEvent, "proxy", replica)
    for fact in (WorkspaceRegistered, WorkspaceChanged, WorkspaceRemoved):
        yield Route(fact, "proxy", replica)
        for reader in ("queue", "scheduler", "liveness"):
            yield Route(fact, reader, quorum)
    for beat in (WorkspaceHeartbeat, ProxyBeat):
        yield Route(beat, "proxy", replica)
        for reader in ("queue", "liveness"):
            yield Route(beat, reader, perishable)
    yield Route(WorkspaceBacklog, "proxy", replica)
    for reader in ("proxy", "scheduler"):
        yield Route(BacklogSnapshot, reader, replica)
    yield Route(WorkspaceEvidence, "liveness", quorum)
    yield Route(WorkspaceStatus, "proxy", replica)
    yield Route(WorkspaceStatus, "queue", quorum)
    yield Route(ScheduleQuery, "scheduler", perishable)
    yield Route(ScheduleApplied, "proxy", replica)
    yield Route(ScheduleTick, "queue", quorum)
    yield Route(ScheduleChanged, "queue", quorum)
    yield Route(TickSettled, "scheduler", quorum)
    yield Route(SessionDirective, "proxy", replica)
    yield Route(SessionDirective, "proxy.control", perishable)
    yield Route(SessionStop, "queue", quorum)
    yield Route(SessionStop, "proxy", replica)
    yield Route(SessionGate, "queue", quorum)
    yield Route(GateClosed, "scheduler", quorum)
    yield Route(SessionKill, "liveness", quorum)
    for reader in ("scheduler", "queue"):
        yield Route(KillDone, reader, quorum)
    yield Route(LivenessQuery, "liveness", perishable)


ROUTES: tuple[Route, ...] = tuple(_routes())

REPLIES: frozenset[type[Fact]] = frozenset({ItemKept, QueryAnswered})
"""Sent to the asker's own queue (`reply_to`), not to the exchange; it may be gone, so they are never mandatory."""


def route(fact: type[Fact], reader: str) -> Route:
    """The one route of `fact` to `reader`.

    Raises:
        LookupError: the table has none.
    """
    for candidate in ROUTES:
        if candidate.fact is fact and candidate.reader == reader:
            return candidate
    raise LookupError(f"{reader} does not read {fact.__name__}: add a Route first")


def is_durable(fact: type[Fact]) -> bool:
    """Whether some reader must not miss it: then it is published persistent, mandatory and confirmed."""
    return any(candidate.fact is fact and candidate.kind is Kind.QUORUM for candidate in ROUTES)


async def declare(channel: AbstractChannel) -> None:
    """Declare the exchange and every shared queue with its binding. Idempotent; one connection's few round trips.

    Raises:
        ChannelPreconditionFailed: a queue exists with other arguments.
    """
    exchange = await channel.declare_exchange(EXCHANGE, ExchangeType.TOPIC, durable=True)
    await channel.declare_queue(DEAD_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    for candidate in ROUTES:
        if candidate.kind is not Kind.REPLICA:
            queue = await channel.declare_queue(candidate.queue(""), durable=True, arguments=candidate.arguments())
            await queue.bind(exchange, routing_key(candidate.fact))
