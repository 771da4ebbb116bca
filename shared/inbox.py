"""The inbox: each fact takes effect once, however often it is delivered (3-bus rule 5).

A handler inserts the ids first, in its own transaction, and works on those that were new. The table is partitioned by
the hour in the uuid7; an hour's partition is made when its first fact arrives, so no clocks have to agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg

from shared.database import ACQUIRE_TIMEOUT_S, Connection, Pool, load_queries
from shared.facts import FactT
from shared.telemetry import log

_SQL = load_queries(Path(__file__).parent / "queries.sql")
_HOUR_MS = 3_600_000
_RANDOM_BITS = 80
"""Below the 48 bits of milliseconds of a uuid7."""
_PARTITION = re.compile(r"^inbox_(\d+)$")


def hour_of(fact_id: UUID) -> int:
    """Hours since 1970 at which the fact was made."""
    return (fact_id.int >> _RANDOM_BITS) // _HOUR_MS


class Inbox:
    """What one replica knows about the inbox of its schema: which partitions are there."""

    def __init__(self, pool: Pool, *, keep_s: float) -> None:
        self._pool = pool
        self._keep = timedelta(seconds=keep_s)
        self._hours: set[int] = set()

    async def prepare(self, facts: Iterable[FactT]) -> None:
        """Make the partitions that `facts` need. Outside the batch's transaction: it would hold the table's lock."""
        for hour in sorted({hour_of(fact.fact_id) for fact in facts} - self._hours):
            await self._create(hour)
            self._hours.add(hour)

    async def admit(self, connection: Connection, facts: Sequence[FactT]) -> list[FactT]:
        """Remember `facts` in the caller's transaction; return those that were new, in their order."""
        ids = sorted({fact.fact_id for fact in facts})
        new = {record["fact_id"] for record in await connection.fetch(_SQL["insert_inbox"], ids)}
        first: dict[UUID, FactT] = {}
        for fact in facts:
            if fact.fact_id in new:
                first.setdefault(fact.fact_id, fact)  # one that stands twice in a batch is new once
        return list(first.values())

    def distrust(self) -> None:
        """Look again which partitions are there: a sibling may have dropped one that a very old fact needs."""
        self._hours.clear()

    async def forget(self, now: datetime | None = None) -> float:
        """Drop the partitions that are older than what is kept; return the seconds until the next look."""
        oldest = int(((now or datetime.now(UTC)) - self._keep).timestamp() * 1000) // _HOUR_MS
        for record in await self._pool.fetch(_SQL["inbox_partitions"]):
            found = _PARTITION.match(record["name"])
            if found and int(found[1]) < oldest:
                await self._drop(record["name"], int(found[1]), now)
        return 3600.0

    async def _drop(self, name: str, hour: int, now: datetime | None) -> None:
        """Drop a partition whose facts all took effect long ago: an old fact may have been applied a moment ago."""
        # The name is one that we made, and has been matched against its form.
        recent = f"SELECT EXISTS (SELECT FROM {name} WHERE at > coalesce($1::timestamptz, now()) - $2::interval)"  # noqa: S608
        async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
            if await connection.fetchval(recent, now, self._keep):
                return
            # Writers queue behind a waiting DROP: it gives up soon and comes again.
            await connection.execute("SET LOCAL lock_timeout = '200ms'")
            await connection.execute(f"DROP TABLE IF EXISTS {name}")
        self._hours.discard(hour)
        log.info("inbox_forgotten", partition=name)

    async def _create(self, hour: int) -> None:
        name = f"inbox_{hour}"
        low, high = (UUID(int=(edge * _HOUR_MS) << _RANDOM_BITS) for edge in (hour, hour + 1))
        async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
            if await connection.fetchval(_SQL["inbox_partition_exists"], name):
                return
            try:
                async with connection.transaction():
                    # ATTACH lets writers go on; CREATE … PARTITION OF would wait for all of them and stop new ones.
                    await connection.execute(f"CREATE TABLE {name} (LIKE inbox INCLUDING ALL)")
                    await connection.execute(
                        f"ALTER TABLE inbox ATTACH PARTITION {name} FOR VALUES FROM ('{low}') TO ('{high}')"
                    )
            except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
                return  # Another replica made it meanwhile.
        log.info("inbox_partition_made", partition=name)
