"""The queue's own machinery on a real Postgres, with its three edges in the test's hand: agents, broker, and time.

A replica is a `Drain` with its handlers and loops, which do not turn by themselves: the test takes each turn. What an
agent answers is put into a parked request; facts come in through the reader's own batches, with the inbox.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from unittest import mock
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.queue import drain as drain_module
from services.queue.answers import Answers
from services.queue.drain import Drain
from services.queue.handlers import Handlers
from services.queue.loops import Loops
from services.queue.sessions import Sessions
from services.queue.settings import Settings
from shared import topology
from shared.agents import BodyLost, NotSent, Unanswered
from shared.batches import encode, encode_batch
from shared.database import Connection, Pool, transact
from shared.facts import Fact, FactT, ItemKept, QueryAnswered
from shared.inbox import Inbox
from shared.intake import Batch, Store
from shared.outcomes import Answer, Fault
from tests.chaos.kit.model import GRACE_S, STARVES_S
from tests.chaos.kit.model_clock import IN_TEST_TIME, Clock, moment, standing_clock
from tests.conftest import Stack
from tests.integration.queue_kit import queue_settings

Held = tuple[str, int]


class Broker:
    """Takes what is told."""

    def __init__(self) -> None:
        self.kept: list[ItemKept] = []
        self.answered: dict[UUID, QueryAnswered] = {}

    def post(self, fact: Fact, *, to: str | None = None) -> None:
        assert (to is not None) == isinstance(fact, ItemKept | QueryAnswered)
        if isinstance(fact, ItemKept):
            self.kept.append(fact)
        elif isinstance(fact, QueryAnswered):
            self.answered[fact.query_id] = fact


@dataclass(frozen=True, slots=True)
class Parked:
    """A request that waits in an agent for what the test lets it answer."""

    about_task: bool
    reply: asyncio.Future[Response]


class AgentsEdge:
    """All agents: every request parks until the test answers it."""

    def __init__(self) -> None:
        self.parked: dict[Held, Parked] = {}
        self._arrivals: dict[Held, asyncio.Event] = {}

    async def send(self, url: str, body: bytes, headers: Sequence[tuple[bytes, bytes]], **_: object) -> Response:
        assert url, "nothing is sent to an agent that has not registered"
        values = dict(headers)
        key = (values[b"x-queue-id"].decode(), int(values[b"x-bide-delivery"]))
        assert key not in self.parked, "one delivery sends one request at a time"
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.parked[key] = Parked(json.loads(body)["method"] == "tasks/get", future)
        self.arrival(key).set()
        try:
            reply = await future
        finally:
            del self.parked[key]
        if isinstance(reply.error, NotSent | Unanswered):
            raise reply.error
        return reply

    def arrival(self, key: Held) -> asyncio.Event:
        return self._arrivals.setdefault(key, asyncio.Event())


@dataclass(frozen=True, slots=True)
class Response:
    """What `Agents.send` gives: a head, and a body that may be lost."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: Exception | None = None
    seen_at: float = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        pass

    async def read(self, _: int) -> bytes:
        if self.error is not None:
            raise self.error
        return self.body


def _rpc(**values: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, **values}).encode()


def _error(code: int, mark: str | None = None) -> bytes:
    return _rpc(error={"code": code, "message": "no", "data": {"code": mark}})


RETRY_AFTER_S = 3.0
ANSWERS: dict[str, Response] = {
    "delivered": Response(body=_rpc(result={"kind": "message", "messageId": "a", "role": "agent", "parts": []})),
    "canceled": Response(body=_rpc(result={"kind": "task", "id": "t", "status": {"state": "canceled"}})),
    "accepted": Response(body=_rpc(result={"kind": "task", "id": "t", "status": {"state": "working"}})),
    "no_such_task": Response(body=_error(-32001)),
    "busy": Response(429, {"retry-after": f"{RETRY_AFTER_S:g}"}),
    "unavailable": Response(502),
    "not_delivered": Response(error=NotSent(Fault.CONNECTION_REFUSED, "refused")),
    "preempted": Response(body=_error(-32000, "preempted")),
    "failed_attempt": Response(500),
    "refused": Response(body=_error(-32602)),
    "unknown": Response(error=Unanswered(Fault.RESET, "reset", stale=False)),
    "answer_lost": Response(error=BodyLost(Answer(200, {}, None, Fault.EOF), "eof")),
}  # fmt: skip
WORDS = {"unavailable": "busy", "canceled": "delivered"}
"""Answers that mean the same as another."""


@dataclass(slots=True)
class Replica:
    """One replica of queue that takes its turns when it is told to."""

    name: str
    drain: Drain
    handlers: Handlers
    answers: Answers
    loops: Loops
    sessions: Sessions

    def endings(self) -> list[Any]:
        """What its next turn writes: of each item the first."""
        first: dict[UUID, Any] = {}
        for ending in self.drain._endings.values():
            first.setdefault(ending.item.queue_id, ending)
        return list(first.values())

    def ready(self) -> list[str]:
        return list(self.drain._ready)

    def tasks(self) -> list[asyncio.Task[None]]:
        return [task for _, task in self.drain.running.values()]


class Rig:
    """Postgres, replicas, edges."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.settings, self.pool = settings, pool
        self.inbox = Inbox(pool, keep_s=3600)
        self.broker, self.agents, self.clock = Broker(), AgentsEdge(), Clock()

    async def tick(self) -> float:
        """It is later than it ever was: for Postgres too, until the next tick."""
        now = self.clock.said = self.clock.now()
        await self.pool.execute("UPDATE model_time.clock SET now = $1", moment(now))
        return now

    async def empty(self) -> None:
        self.clock = Clock()
        await self.pool.execute(
            "TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, "
            "replicas, proxies, outbox, dead_letters"
        )

    async def replica(self) -> Replica:
        """A new one, as `__main__` starts it: it beats before it does anything."""
        settings = self.settings.model_copy(update={"replica_id": f"r-{uuid7().hex}"})
        edges: Any = (self.broker, self.agents)
        drain = Drain(settings, self.pool, *edges)
        handlers = Handlers(settings, edges[0], drain)
        loops = Loops(settings, self.pool, self.pool, edges[0], drain)
        await loops.beat()
        answers = Answers(edges[0], drain, loops.snapshots.wake)
        return Replica(settings.replica_id, drain, handlers, answers, loops, Sessions(settings, edges[0], drain))

    async def crash(self, replica: Replica) -> None:
        """It is gone in the middle of everything: what it held in memory too."""
        for task in (tasks := replica.tasks()):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        replica.drain._endings.clear()

    async def read(self, kind: type[FactT], handle: Store[FactT], facts: Sequence[FactT]) -> float:
        """Facts come in as one batch of the bus; say when."""
        now = await self.tick()
        route = topology.route(kind, "queue")
        await Batch(
            self.pool, asyncio.Semaphore(), self.inbox, route, handle, [encode_batch(map(encode, facts))], aside=None
        ).write()
        return now

    async def turn(self, replica: Replica, *, confirmed: bool = True) -> float:
        """One turn, and when it was; if it is not confirmed, it has committed and the replica does not know."""
        now = await self.tick()
        if confirmed:
            await replica.drain.run_once(moment(now))
            await self.started(replica)
            return now

        async def cut(pool: Pool, work: Callable[[Connection], Any]) -> None:
            await transact(pool, work)
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

        with mock.patch.object(drain_module, "transact", cut), suppress(asyncpg.ConnectionDoesNotExistError):
            await replica.drain.run_once(moment(now))
        return now

    async def started(self, replica: Replica) -> None:
        """Come back when each of its deliveries has reached its agent."""
        for key in list(replica.drain.running):
            await self.agents.arrival(key).wait()

    async def answer(self, replica: Replica, key: Held, said: str) -> None:
        """The agent answers; come back when that has become an ending, or the next request."""
        _, task = replica.drain.running[key]
        arrival = self.agents.arrival(key)
        arrival.clear()
        self.agents.parked[key].reply.set_result(ANSWERS[said])
        again = asyncio.create_task(arrival.wait())
        await asyncio.wait({task, again}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()

    async def silence(self, names: Sequence[str]) -> None:
        await self.pool.execute(
            "UPDATE replicas SET beat_at = now() - interval '1 minute' WHERE replica_id = ANY($1::text[])", list(names)
        )

    @asynccontextmanager
    async def long_ago(self, owners: Collection[str]) -> AsyncIterator[None]:
        """Claims of these are as old as their silence, for the length of the block: a claim is a sign of life too."""
        query = "SELECT queue_id, dispatched_at FROM a2a_queue WHERE status = 'dispatched' AND owner = ANY($1::text[])"
        rows = await self.pool.fetch(query, list(owners))
        update = "UPDATE a2a_queue SET dispatched_at = $2 WHERE queue_id = $1"
        await self.pool.executemany(update, [(row["queue_id"], moment(0)) for row in rows])
        yield
        await self.pool.executemany(update, [tuple(row) for row in rows])

    async def alive(self, names: Collection[str]) -> None:
        """They have beaten until now, however much time has been let pass."""
        await self.pool.execute("UPDATE replicas SET beat_at = now() WHERE replica_id = ANY($1::text[])", list(names))

    async def ripen(self, name: str) -> None:
        """It has beaten without a break for long enough to judge."""
        await self.pool.execute(
            "INSERT INTO replicas VALUES ($1, now(), now() - interval '1 hour') ON CONFLICT (replica_id) "
            "DO UPDATE SET beat_at = excluded.beat_at, unbroken_since = excluded.unbroken_since",
            name,
        )


@asynccontextmanager
async def open_rig(stack: Stack) -> AsyncIterator[Rig]:
    settings = queue_settings(
        stack, follow_min_s=0.001, follow_max_s=0.001, starvation_limit_s=STARVES_S, stop_grace_s=GRACE_S
    )
    async with (
        standing_clock(stack),
        asyncpg.create_pool(
            settings.database_url.get_secret_value(), min_size=1, max_size=4, server_settings=IN_TEST_TIME,
            reset=_nothing_to_reset,
        ) as pool,
    ):  # fmt: skip
        yield Rig(settings, pool)


async def _nothing_to_reset(_: object) -> None:
    """As the services have it."""
