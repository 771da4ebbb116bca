"""Batches on their way into the database: each fact in effect once, one bad fact set aside alone (3-bus rules 3 to 5).

Trouble of Postgres is waited out here; what is wrong with a fact costs that fact.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.batches import decode_batch, encode, split
from shared.database import Connection, Pool, Trouble, backoff_s, classify, in_words, load_queries, transact
from shared.facts import Fact, FactT
from shared.inbox import Inbox
from shared.telemetry import DEAD_LETTERS, FACTS_READ, INFRASTRUCTURE_WAITS, log
from shared.topology import Kind, Route

Tell = Callable[[], None]
"""What a handler wants done after its commit: post facts, wake a loop. It must not block."""

Store = Callable[[Connection, Sequence[FactT]], Awaitable[Tell | None]]
"""A handler of facts that are written: called in their transaction; must be repeatable."""

Aside = Callable[[Connection, bytes, str], Awaitable[None]]
"""What is owed for a fact that was set aside: called with its bytes and the reason, in the transaction of its dead
letter, and last, because it may lock what handlers lock."""

_SQL = load_queries(Path(__file__).parent / "queries.sql")


@dataclass(slots=True)
class _Written:
    """What one try of a batch did; counted and told only once it has committed."""

    applied: int = 0
    duplicate: int = 0
    tells: list[Tell] = field(default_factory=list)
    aside: list[tuple[str, str, bytes]] = field(default_factory=list)
    """(reason, sentence, the fact's bytes)"""


class Batch:
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
                words = in_words(error)
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
                await self._set_aside(connection, written, self._raw(fact), reason, in_words(error))
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
