"""The outbox: facts that leave although the process that wrote them may die (3-bus rule 6).

`add` writes them in the caller's transaction. The relay of any replica claims rows for `outbox_claim_s`, publishes them
outside every transaction, and deletes what the broker confirmed. A fact may be published twice, never not at all; the
reader's inbox makes it one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import asyncpg

from shared.batches import encode
from shared.broker import Publisher
from shared.database import Connection, Pool, leave_standby, load_queries
from shared.facts import Fact
from shared.loops import Loop
from shared.telemetry import OUTBOX_OLDEST, OUTBOX_PUBLISHED, log
from shared.topology import ROUTES

_SQL = load_queries(Path(__file__).parent / "queries.sql")
_CLAIM_ROWS = 500
_KINDS = {route.fact.__name__: route.fact for route in ROUTES}


async def add(connection: Connection, facts: Sequence[Fact]) -> None:
    """Write `facts` in the transaction of `connection`; wake the relay after its commit."""
    names = [type(fact).__name__ for fact in facts]
    await connection.execute(_SQL["insert_outbox"], names, [encode(fact) for fact in facts])


async def add_encoded(connection: Connection, kind: type[Fact], facts: Sequence[bytes]) -> None:
    """As `add`, for facts of one kind that are JSON already."""
    await connection.execute(_SQL["insert_outbox"], [kind.__name__] * len(facts), facts)


class Relay:
    """Publishes what stands in the outbox of this service's schema."""

    def __init__(self, pool: Pool, publisher: Publisher, *, claim_s: float, sweep_s: float) -> None:
        self._pool = pool
        self._publisher = publisher
        self._claim_s = claim_s
        self._sweep_s = sweep_s
        self.loop = Loop("outbox", self.run_once)
        self.wake = self.loop.wake

    async def run_once(self, now: datetime | None = None) -> float:
        """Publish one batch of due rows; return 0 when there may be more."""
        if not self._publisher.is_connected:
            return self._sweep_s
        try:
            rows = await self._pool.fetch(_SQL["claim_outbox"], _CLAIM_ROWS, self._claim_s, now)
        except asyncpg.ReadOnlySQLTransactionError as error:
            await leave_standby(self._pool, error)
            raise
        OUTBOX_OLDEST.set(await self._pool.fetchval(_SQL["outbox_oldest_age"]))
        if not rows:
            return self._sweep_s
        confirmed: list[int] = []
        failed: list[int] = []
        # A type that we do not know was written by a newer replica, which will publish it. Its claim stays until it
        # runs out, so that it does not stand in the way of what comes behind it.
        known = sorted((row["id"], row["fact_type"], row["fact"]) for row in rows if row["fact_type"] in _KINDS)
        sent = [(row_id, self._publisher.post_encoded(_KINDS[kind], fact)) for row_id, kind, fact in known]
        if sent:
            await asyncio.wait([done for _, done in sent])
        for row_id, done in sent:
            (failed if done.exception() else confirmed).append(row_id)
        if confirmed:
            await self._pool.execute(_SQL["delete_outbox"], confirmed)
            OUTBOX_PUBLISHED.inc(len(confirmed))
        if failed:
            log.warning("outbox_publish_failed", facts=len(failed))
            await self._pool.execute(_SQL["release_outbox"], failed, rows[0]["claimed_until"])
            return self._sweep_s
        return 0 if len(rows) == _CLAIM_ROWS else self._sweep_s
