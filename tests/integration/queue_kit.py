"""The queue service as it runs, and the proxy's side of the bus, for tests: real servers, real agents."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import SecretStr
from uuid_utils.compat import uuid7

from bide_agent.agent import Agent, running
from bide_agent.options import Options
from services.queue.__main__ import main
from services.queue.settings import Settings
from shared.broker import Publisher
from shared.database import Pool
from shared.facts import (
    ItemChanged,
    ItemKept,
    MessageBusy,
    ProxyBeat,
    QueryAnswered,
    QueueQuery,
    Running,
    ScheduleApplied,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
)
from shared.topology import route
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica


def queue_settings(stack: Stack, **changes: object) -> Settings:
    base = stack.settings("queue").model_dump()
    values = {**base, "allow_loopback": True, "delivery_secret": SecretStr("s"), "log_level": "warning", **changes}
    values.pop("replica_id", None)
    return Settings.model_validate(values)


@asynccontextmanager
async def queue_service(stack: Stack, **changes: object) -> AsyncIterator[asyncio.Task[None]]:
    """The service itself, in this process; at the end it is told to stop as by SIGTERM."""
    task = asyncio.create_task(main(queue_settings(stack, **{"drain_s": 5.0, **changes})))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Door:
    """What a proxy does towards the queue: registers, keeps, beats, asks."""

    def __init__(self, side: Replica) -> None:
        self.side = side
        self.kept: dict[UUID, asyncio.Future[ItemKept]] = {}
        self.answered: dict[UUID, asyncio.Future[QueryAnswered]] = {}
        self.changes: dict[UUID, list[ItemChanged]] = {}
        self.applied: list[ScheduleApplied] = []
        self._beats = 0

    @property
    def publisher(self) -> Publisher:
        return self.side.publisher

    def _reply_to(self, fact: type[ItemKept | QueryAnswered]) -> str:
        return route(fact, "proxy").queue(self.side.settings.replica_id)

    async def register(
        self, name: str, url: str, *, incarnation: int = 1, maximum: int = 1, paused: bool = False, **settings: float
    ) -> None:
        """Say where the agent is, and wait until the queue knows it."""
        await self.publisher.publish(
            WorkspaceRegistered(
                workspace_id=name,
                rev=uuid7().int >> 80,
                incarnation=incarnation,
                url=url,
                max_concurrent_tasks=maximum,
                paused=paused,
                settings=settings,
            )
        )

        async def known() -> bool:
            query = "SELECT url, paused FROM workspaces WHERE workspace_id = $1"
            row = await self.side.pool.fetchrow(query, name)
            return row is not None and (row["url"], row["paused"]) == (url, paused)

        await until(known)

    def busy(self, name: str, text: str, **changes: Any) -> MessageBusy:
        """A message that could not go straight through. `key` and `caller` as strings; `body` wins over `text`."""
        key = changes.pop("key", None) or str(uuid7())
        caller = changes.pop("caller", "caller")
        message = {"role": "user", "messageId": key, "parts": [{"kind": "text", "text": text}], "kind": "message"}
        request = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
        body = changes.pop("body", None) or json.dumps(request).encode()
        values: dict[str, Any] = {
            "workspace_id": name,
            "rev": 1,
            "queue_id": uuid7(),
            "caller_id": caller,
            "caller_hash": digest(caller),
            "key_hash": digest(key),
            "body_hash": hashlib.sha256(body).digest(),
            "reason": "at_capacity",
            "method": "message/send",
            "body": body,
            "reply_to": self._reply_to(ItemKept),
        }
        return MessageBusy(**{**values, **changes})

    async def keep(self, fact: MessageBusy) -> ItemKept:
        """Publish, and wait for the queue's word."""
        self.kept[fact.queue_id] = asyncio.get_running_loop().create_future()
        await self.publisher.publish(fact)
        return await asyncio.wait_for(self.kept[fact.queue_id], 60)

    async def heartbeat(self, name: str, *, active: int = 0, incarnation: int = 1, cadence_s: float = 30) -> None:
        now = datetime.now(UTC)
        await self.publisher.publish(
            WorkspaceHeartbeat(
                workspace_id=name,
                rev=int(now.timestamp() * 1e6),
                occurred_at=now,
                incarnation=incarnation,
                active_tasks=active,
                cadence_s=cadence_s,
            )
        )

    def beat(self, name: str, *sessions: str) -> ProxyBeat:
        """A ProxyBeat with these live forwards running."""
        self._beats += 1
        now = datetime.now(UTC)
        running = [Running(session_id=session, started_at=now) for session in sessions]
        return ProxyBeat(workspace_id=name, rev=self._beats, proxy_id="p1", forwards=running)

    async def ask(self, verb: str, name: str = "-", **values: Any) -> tuple[int, Any]:
        """A question to the queue, as HTTP would ask it: `(status, body)`."""
        query_id = uuid7()
        self.answered[query_id] = asyncio.get_running_loop().create_future()
        expires = datetime.now(UTC) + timedelta(seconds=60)
        query = QueueQuery(
            workspace_id=name, rev=1, query_id=query_id, verb=verb,
            **{"expires_at": expires, "reply_to": self._reply_to(QueryAnswered), **values},
        )  # fmt: skip
        await self.publisher.publish(query)
        answer = await asyncio.wait_for(self.answered[query_id], 60)
        return answer.status, json.loads(answer.body)

    async def item(self, queue_id: UUID) -> dict[str, Any]:
        status, body = await self.ask("item", queue_id=queue_id)
        assert status == 200, body
        found: dict[str, Any] = body
        return found

    async def ended(self, *queue_ids: UUID, within_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until all of them have ended; their items."""

        async def all_ended() -> bool:
            count = "SELECT count(*) FROM a2a_finished WHERE queue_id = ANY($1::uuid[])"
            found: int = await self.side.pool.fetchval(count, list(queue_ids))
            return found == len(queue_ids)

        await until(all_ended, within_s)
        return [await self.item(queue_id) for queue_id in queue_ids]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@asynccontextmanager
async def door(stack: Stack) -> AsyncIterator[Door]:
    """A proxy's side of the bus. Its pool is the queue's: tests look into the rows."""
    async with replica(stack, "proxy") as side, queue_pool(stack) as pool:
        front = Door(Replica(side.settings, pool, side.publisher, side.reader))

        async def kept(facts: Sequence[ItemKept]) -> None:
            for fact in facts:
                waiting = front.kept.get(fact.queue_id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(fact)

        async def answered(facts: Sequence[QueryAnswered]) -> None:
            for fact in facts:
                front.answered[fact.query_id].set_result(fact)

        async def changed(facts: Sequence[ItemChanged]) -> None:
            for fact in facts:
                front.changes.setdefault(fact.queue_id, []).append(fact)

        async def applied(facts: Sequence[ScheduleApplied]) -> None:
            front.applied += facts

        side.reader.hear(ScheduleApplied, applied)
        side.reader.hear(ItemKept, kept)
        side.reader.hear(QueryAnswered, answered)
        side.reader.hear(ItemChanged, changed)
        await side.reader.start()
        yield front


@asynccontextmanager
async def queue_pool(stack: Stack) -> AsyncIterator[Pool]:
    from shared.database import open_pool  # noqa: PLC0415

    async with open_pool(stack.settings("queue")) as pool:
        yield pool


@asynccontextmanager
async def agent(name: str, **options: Any) -> AsyncIterator[Agent]:
    """A small real agent that belongs to nobody: the test registers it itself."""
    async with running(Options(workspace=name, **{"work_s": 0.05, **options})) as started:
        yield started
