"""The queue service's side of the bus without the service: sees what a proxy asks and keeps, and answers as told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import aio_pika
from uuid_utils.compat import uuid7

from shared.database import Connection
from shared.facts import BacklogSnapshot, ItemKept, MessageBusy, QueryAnswered, QueueQuery, WorkspaceBacklog
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica
from tests.integration.proxy_kit import Proxy, nothing_left

Said = tuple[int, Mapping[str, Any]]
UNKNOWN: Said = (404, {"code": "item_unknown", "detail": "There is no such item, or it is not yours."})
_QUEUES = ("message.busy", "queue.query", "workspace.registered", "workspace.changed", "workspace.removed")


class StandIn:
    """Keeps what is to be kept in a list per workspace; whatever else is asked of it stands in `says`."""

    def __init__(self, side: Replica) -> None:
        self._side = side
        self.publisher = side.publisher
        self._rev = 0
        self.asked: list[QueueQuery] = []
        self.lines: dict[str, list[MessageBusy]] = {}
        self.says: dict[str, Callable[[QueueQuery], Said | None]] = {}
        """By verb; None: no answer."""
        self.on_kept: Callable[[MessageBusy], Mapping[str, Any] | None] = lambda _: {}
        """What ItemKept says beside the place; None: it is not told."""

    async def start(self) -> None:
        self._side.reader.hear(QueueQuery, self._query)
        self._side.reader.store(MessageBusy, self._keep)
        await self._side.reader.start()

    async def tell(self, front: Proxy, name: str, waiting: int, **more: Any) -> None:
        """Say what waits in a workspace, and wait until the proxy goes by it alone."""
        self._rev += 1
        rev = self._rev
        fact = WorkspaceBacklog(workspace_id=name, rev=rev, waiting=waiting, in_use=0, **more)
        await self.publisher.publish(fact)

        async def is_known() -> bool:
            return front.copies.backlogs.view(name).rev == rev and not front.copies.keeps.pending(name)

        await until(is_known)

    def verbs(self) -> list[str]:
        """What was asked, in order, but for snapshots."""
        return [query.verb for query in self.asked]

    async def _query(self, facts: Sequence[QueueQuery]) -> None:
        for fact in facts:
            if fact.verb == "snapshot":
                self.publisher.post(BacklogSnapshot(rev=0, snapshot_id=uuid7(), part=0, parts=1))
                continue
            self.asked.append(fact)
            said = self.says[fact.verb](fact)
            if said is not None:
                status, body = said
                answer = QueryAnswered(
                    workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id, status=status,
                    body=json.dumps(body).encode(),
                )  # fmt: skip
                self.publisher.post(answer, to=fact.reply_to)

    async def _keep(self, _connection: Connection, facts: Sequence[MessageBusy]) -> Callable[[], None]:
        told = []
        for fact in facts:
            line = self.lines.setdefault(fact.workspace_id, [])
            line.append(fact)
            said = self.on_kept(fact)
            if said is not None:
                place = {"depth": len(line), "position": len(line), **said}
                kept = ItemKept(workspace_id=fact.workspace_id, rev=1, queue_id=fact.queue_id, **place)
                told.append((fact.reply_to, kept))

        def tell() -> None:
            for reply_to, kept in told:
                self.publisher.post(kept, to=reply_to)

        return tell


@asynccontextmanager
async def stand_in(stack: Stack) -> AsyncIterator[StandIn]:
    """Reads from empty queues, and leaves them empty for whoever comes next."""
    await _purge(stack)
    async with nothing_left(), replica(stack, "queue") as side:
        there = StandIn(side)
        await there.start()
        yield there
    await _purge(stack)


async def _purge(stack: Stack) -> None:
    async with await aio_pika.connect(stack.amqp_url) as connection:
        for name in _QUEUES:
            channel = await connection.channel()
            try:
                await (await channel.get_queue(f"queue.{name}")).purge()
            except aio_pika.exceptions.ChannelNotFoundEntity:
                continue


def item(queue_id: UUID | str, workspace_id: str, **more: Any) -> dict[str, Any]:
    """An item as the queue shows it."""
    at = datetime.now(UTC).isoformat()
    return {
        "queue_id": str(queue_id), "workspace_id": workspace_id, "caller_id": "lead", "status": "queued",
        "reason": None, "priority": "TASK", "position": 1, "why": "it is first", "enqueued_at": at, "answer": None,
        **more,
    }  # fmt: skip
