"""The scheduler's words about sessions, and the proxies' about gates, for tests of the queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aio_pika
from uuid_utils.compat import uuid7

from shared.database import Connection, Pool
from shared.facts import (
    FLEET,
    BacklogSnapshot,
    GateClosed,
    KillDone,
    NamedBacklog,
    ProxyBeat,
    Running,
    SessionGate,
    SessionStop,
    WorkspaceBacklog,
    WorkspaceEvidence,
    WorkspaceStatus,
)
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.queue_kit import Door, door

TABLES = (
    "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, schedules, proxies, "
    "inbox, outbox, dead_letters"
)
READ_BY_OTHERS = (
    "scheduler.gate.closed", "scheduler.tick.settled", "liveness.workspace.evidence", "queue.session.gate",
    "queue.session.stop", "queue.kill.done", "queue.proxy.beat", "queue.workspace.heartbeat", "queue.workspace.status",
)  # fmt: skip


class Supervisor:
    """Ends sessions, as the scheduler does; hears what it hears. `proxy_*` speak for proxies."""

    def __init__(self, front: Door) -> None:
        self.front = front
        self.gates: list[GateClosed] = []
        self.evidence: list[WorkspaceEvidence] = []
        self.backlogs: list[WorkspaceBacklog] = []
        self._named: dict[str, NamedBacklog] = {}
        self._snapshots = 0
        self._revs = 0

    @property
    def rows(self) -> Pool:
        return self.front.side.pool

    def rev(self) -> int:
        self._revs += 1
        return self._revs

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def gate(
        self, name: str, session: str = "s", *, closed: bool = True, for_s: float = 120, rev: int | None = None
    ) -> SessionGate:
        """Say a word about the gate, and come back when the queue's row says it."""
        fact = SessionGate(
            workspace_id=name, rev=rev or self.rev(), session_id=session, incarnation=1, closed=closed,
            gate_until=in_s(for_s),
        )  # fmt: skip
        await self.front.publisher.publish(fact)
        if rev is None:
            await until(lambda: self._holds(fact))
        return fact

    async def _holds(self, fact: SessionGate) -> bool:
        gates = await self.rows.fetchval("SELECT gates FROM workspaces WHERE workspace_id = $1", fact.workspace_id)
        word = json.loads(gates or "{}").get(fact.session_id)
        return word is not None and (word[0], word[2]) == (fact.rev, not fact.closed)

    async def stop(self, name: str, queue_id: UUID, reason: str = "ceiling", *, number: int = 1) -> None:
        """Say it, and come back when it is written."""
        session = f"{queue_id}:{number}"
        await self.front.publisher.publish(
            SessionStop(workspace_id=name, rev=self.rev(), session_id=session, incarnation=1, reason=reason)
        )

        async def written() -> bool:
            waits = "SELECT stop_at IS NULL FROM a2a_queue WHERE queue_id = $1"
            return await self.rows.fetchval(waits, queue_id) is not True

        await until(written)

    async def killed(self, name: str, session: str, result: Any) -> None:
        await self.front.publisher.publish(
            KillDone(
                workspace_id=name, rev=self.rev(), session_id=session, incarnation=1, order_id=uuid7(), result=result
            )
        )

    # ── what liveness says ───────────────────────────────────────────────────────────────────────────────────────────

    async def life(self, name: str, status: Any, *, incarnation: int = 1) -> None:
        """Say what is believed of an agent's life, and come back when the queue has heard it."""
        word = WorkspaceStatus(
            workspace_id=name, rev=self.rev(), incarnation=incarnation, status=status, reason="a test"
        )  # fmt: skip
        await self.front.publisher.publish(word)
        heard = "SELECT count(*) = 1 FROM inbox WHERE fact_id = $1"
        await until(lambda: self._true(heard, word.fact_id))

    # ── what proxies say ─────────────────────────────────────────────────────────────────────────────────────────────

    async def proxy_lives(self, proxy_id: str) -> None:
        await self.front.publisher.publish(ProxyBeat(workspace_id=FLEET, rev=self.rev(), proxy_id=proxy_id))
        await until(lambda: self._true("SELECT EXISTS (SELECT FROM proxies WHERE proxy_id = $1)", proxy_id))

    async def proxy_says(
        self, proxy_id: str, name: str, *sessions: str, generation: int = 0, for_s: float | None = None
    ) -> None:
        """A proxy tells of its forwards and of the gate as it has it; come back when the queue has heard it."""
        now = datetime.now(UTC)
        beat = ProxyBeat(
            workspace_id=name, rev=self.rev(), proxy_id=proxy_id,
            forwards=[Running(session_id=session, started_at=now) for session in sessions],
            gate_generation=generation, gate_until=in_s(for_s) if for_s is not None else None,
        )  # fmt: skip
        await self.front.publisher.publish(beat)
        query = "SELECT (forwards -> $2 ->> 'rev')::bigint = $3 FROM workspaces WHERE workspace_id = $1"
        await until(lambda: self._true(query, name, proxy_id, beat.rev))

    async def _true(self, query: str, *values: Any) -> bool:
        return bool(await self.rows.fetchval(query, *values))

    # ── what it hears ────────────────────────────────────────────────────────────────────────────────────────────────

    async def closed(self, name: str, count: int = 1) -> list[GateClosed]:
        """Come back when it was told so many times that this gate is closed."""

        async def told() -> bool:
            return len(self.closings(name)) >= count

        await until(told)
        return self.closings(name)

    def closings(self, name: str) -> list[GateClosed]:
        return [fact for fact in self.gates if fact.workspace_id == name]

    async def snapshot(self) -> dict[str, NamedBacklog]:
        """The next one that was read after this moment."""
        before = self._snapshots

        async def came() -> bool:
            return self._snapshots > before + 1

        await until(came)
        return self._named

    async def running(self, queue_id: UUID) -> None:
        """Come back when it is being delivered."""
        await until(
            lambda: self._true("SELECT status = 'dispatched' FROM a2a_queue WHERE queue_id = $1", queue_id)
        )  # fmt: skip

    def hear(self, fact: BacklogSnapshot) -> None:
        if fact.part == 0:
            self._named = {}
        self._named |= {each.workspace_id: each for each in fact.backlogs}
        self._snapshots += fact.part == fact.parts - 1


def in_s(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@asynccontextmanager
async def supervisor(stack: Stack) -> AsyncIterator[Supervisor]:
    """Of an empty queue, whose service the test starts."""
    async with replica(stack, "scheduler") as side, replica(stack, "liveness") as other, door(stack) as front:
        await front.side.pool.execute(f"TRUNCATE {TABLES}")
        async with await aio_pika.connect(stack.amqp_url) as connection:
            channel = await connection.channel()
            for name in READ_BY_OTHERS:
                await (await channel.get_queue(name)).purge()
        opened = Supervisor(front)

        async def closed(_: Connection, facts: Sequence[GateClosed]) -> None:
            opened.gates += facts

        async def evident(_: Connection, facts: Sequence[WorkspaceEvidence]) -> None:
            opened.evidence += facts

        async def heard(facts: Sequence[BacklogSnapshot]) -> None:
            for fact in facts:
                opened.hear(fact)

        side.reader.store(GateClosed, closed)
        side.reader.hear(BacklogSnapshot, heard)
        other.reader.store(WorkspaceEvidence, evident)
        await side.reader.start()
        await other.reader.start()
        yield opened


# ── an agent whose every word is the test's ──────────────────────────────────────────────────────────────────────────

Answer = Callable[[dict[str, Any]], Awaitable[Any]]


@dataclass(slots=True)
class Puppet:
    """An agent that answers each method as the test says; a method that is not there is never answered.

    An answer with a `code` is an error.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
                request = json.loads(await reader.readexactly(length))
                self.asked.append(request["method"])
                answer = self.answers.get(request["method"])
                if answer is None:
                    await reader.read()  # until the other side hangs up
                    return
                said = await answer(request)
                word = "error" if "code" in said else "result"
                body = json.dumps({"jsonrpc": "2.0", "id": request["id"], word: said}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def task(state: str) -> dict[str, Any]:
    return {"kind": "task", "id": "t", "contextId": "c", "status": {"state": state}}


@asynccontextmanager
async def puppet(**answers: Answer) -> AsyncIterator[Puppet]:
    """Methods by their last word: `send`, `get`, `cancel`."""
    names = {"send": "message/send", "get": "tasks/get", "cancel": "tasks/cancel"}
    made = Puppet({names[name]: answer for name, answer in answers.items()})
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
