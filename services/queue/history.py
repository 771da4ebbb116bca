"""How long queue keeps what is over: items that ended, deleted schedules, explicit keys, letters that were set aside.

What has ended is kept by the UTC day of its ending. Days are made ahead, and forgetting one is DROP TABLE; an ending
whose day has no partition goes to the default one, where it is found like any other, and moves when its day is made.
Whoever writes or reads an item needs these tables, so each step here waits for a lock only a moment and comes again.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterable
from datetime import UTC, date, datetime, time, timedelta
from uuid import UUID

import asyncpg

from services.queue.metrics import DEAD_LETTERS_KEPT
from services.queue.settings import Settings
from services.queue.store import SQL
from shared.database import ACQUIRE_TIMEOUT_S, Pool
from shared.loops import Loop
from shared.telemetry import log

_LOOK_S = 30.0
_AHEAD = 3
"""Days made besides today's: the loop may fail for that long before an ending goes to the default partition."""
_BATCH = 1000
_LETTERS_MAX = 10_000
_REASONS = ("invalid", "unstorable", "handler_error", "undeliverable")
_PARTITION = re.compile(r"^a2a_finished_(\d{8})$")
_NO_ID = UUID(int=0)

# Others queue up behind one who waits for a lock on these tables, and stand still while it is held.
_PATIENCE = "SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '2s'"
_THERE_ALREADY = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.UniqueViolationError,
    asyncpg.InvalidObjectDefinitionError,  # its day lies in a partition that is there
)
_NOT_NOW = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError)


class History:
    """One replica's share of forgetting; any number of them at once are harmless."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._settings = settings
        self._pool = pool
        self._left: set[date] = set()
        """Days of which the default partition holds more than can be moved while everybody waits."""
        self._blanked: datetime | None = None
        """Bodies of all that ended before are gone."""
        self._page = (datetime.min.replace(tzinfo=UTC), _NO_ID)
        """Up to when they are being given up, and the last id that was."""
        self.loop = Loop("history", self.run_once)

    async def run_once(self, now: datetime | None = None) -> float:
        """Make days, drop days, and take one batch of everything that goes by batch; 0 if there may be more."""
        today = datetime.fromtimestamp(await self._pool.fetchval(SQL["read_clock"], now), UTC).date()
        present = set(_days_of(row["name"] for row in await self._pool.fetch(SQL["finished_days"])))
        for day in sorted({today + timedelta(days=ahead) for ahead in range(_AHEAD + 1)} - present - self._left):
            await self._undisturbed("made", day, self._make(day))
        for day in sorted(day for day in present if day < self._oldest(today)):
            await self._undisturbed("dropped", day, self._drop(day))
        full = [
            await self._batch("forget_finished", _midnight(self._oldest(today)), _BATCH),
            await self._batch("forget_schedules", _midnight(self._oldest(today)), _BATCH),
            await self._batch("forget_keys", now, _BATCH),
            await self._batch("forget_letters", now, self._settings.dead_letters_days, _BATCH),
            await self._blank(today),
        ]
        await self._count_letters()
        return 0.0 if any(full) else _LOOK_S

    def _oldest(self, today: date) -> date:
        """The oldest day that is kept: a day is over at midnight, and goes once it has been over for all of them."""
        return today - timedelta(days=self._settings.retention_days)

    async def _undisturbed(self, done: str, day: date, work: Awaitable[bool]) -> None:
        """Let `work` happen if nobody has to wait long for it; the next look comes back to it."""
        try:
            if await work:
                log.info("history_day", done=done, day=str(day))
        except _NOT_NOW as error:
            log.info("history_day_in_use", day=str(day), error=str(error)[:100])

    async def _make(self, day: date) -> bool:
        """Make the partition of a day, with what ended on it in the default one; whether we did."""
        name, low, high = _name(day), _midnight(day), _midnight(day + timedelta(days=1))
        # The name and the bounds are our own.
        move = f"""WITH gone AS (DELETE FROM a2a_finished_default WHERE ended_at >= $1 AND ended_at < $2 RETURNING *)
                   INSERT INTO {name} SELECT * FROM gone"""  # noqa: S608
        try:
            async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
                await connection.execute(_PATIENCE)
                # All of it, as DROP does: ATTACH alone would let readers go on, but one that had planned without the
                # new partition and then waited for the default one would find the moved rows in neither.
                await connection.execute("LOCK TABLE ONLY a2a_finished IN ACCESS EXCLUSIVE MODE")
                await connection.execute(f"CREATE TABLE {name} (LIKE a2a_finished INCLUDING ALL)")
                await connection.execute(move, low, high)
                await connection.execute(
                    f"ALTER TABLE a2a_finished ATTACH PARTITION {name} FOR VALUES FROM ('{low}') TO ('{high}')"
                )
        except _THERE_ALREADY:
            return False  # another replica made it meanwhile
        except asyncpg.QueryCanceledError:
            self._left.add(day)  # found where it is, and goes by batch
            raise
        return True

    async def _drop(self, day: date) -> bool:
        async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
            await connection.execute(_PATIENCE)
            # Before the name is looked up: of two replicas that drop one day, the second finds it gone, not half gone.
            await connection.execute("LOCK TABLE ONLY a2a_finished IN ACCESS EXCLUSIVE MODE")
            await connection.execute(f"DROP TABLE IF EXISTS {_name(day)}")
        return True

    async def _batch(self, name: str, *arguments: object) -> bool:
        """Run one statement that deletes a batch; whether it was full."""
        return await self._pool.execute(SQL[name], *arguments) == f"DELETE {_BATCH}"

    async def _blank(self, today: date) -> bool:
        """Give up the bodies of a page of items that are older than bodies are kept; whether there may be more."""
        days = self._settings.bodies_days
        if days is None or days >= self._settings.retention_days:
            return False  # they go with their items
        until = _midnight(today - timedelta(days=days))
        if self._blanked is not None and until <= self._blanked:
            return False
        after = self._page[1] if self._page[0] == until else _NO_ID
        rows = await self._pool.fetch(SQL["blank_bodies"], self._blanked, until, after, _BATCH)
        if len(rows) < _BATCH:
            self._blanked = until
            return False
        self._page = (until, max(row["queue_id"] for row in rows))
        return True

    async def _count_letters(self) -> None:
        for row in await self._pool.fetch(SQL["count_letters"], list(_REASONS), _LETTERS_MAX):
            DEAD_LETTERS_KEPT.labels(row["reason"]).set(row["waiting"])


def _days_of(names: Iterable[str]) -> Iterable[date]:
    for name in names:
        if found := _PARTITION.match(name):
            yield datetime.strptime(found[1], "%Y%m%d").replace(tzinfo=UTC).date()


def _name(day: date) -> str:
    return f"a2a_finished_{day:%Y%m%d}"


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
