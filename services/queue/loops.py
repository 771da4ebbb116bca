"""What queue does by the clock: sweeps, counters, endings, owners, snapshots, and re-reading its own deliveries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

import asyncpg

from services.queue import decide, store
from services.queue.decide import Reply, Workspace
from services.queue.deliver import Delivery, Ending
from services.queue.drain import Drain
from services.queue.metrics import OUTLIVED, OWNERS_LOST, RECONCILED
from services.queue.settings import Settings
from services.queue.snapshots import read_snapshot
from services.queue.store import SQL
from services.queue.waiting import end_waiting
from shared.broker import Publisher
from shared.database import Connection, Pool, Trouble, classify, transact
from shared.loops import Loop
from shared.telemetry import log

_PAGE = 500
_COUNT_MAX = 1001
"""Waiting items that a look at a counter counts in one workspace: one more than the depth at which proxies refuse."""


@dataclass(slots=True)
class Loops:
    """Each method is one loop's `run_once`: due rows → write → seconds until the next turn."""

    settings: Settings
    pool: Pool
    own: Pool
    """Connections that nothing else of this replica waits for: its beats need one whatever the others do."""
    publisher: Publisher
    drain: Drain
    _page_after: str = ""
    _counted_after: str = ""
    _lost_after: UUID | None = None
    _ended_after: tuple[datetime | None, UUID | None] = (None, None)
    _snapshots: int = 0
    _snapshot_at: float = float("-inf")
    snapshots: Loop = field(init=False)
    """Woken by whoever needs a snapshot at once."""
    _orphans: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.snapshots = Loop("snapshot", self.snapshot)

    def all(self) -> list[Loop]:
        return [
            Loop("sweep", self.sweep),
            Loop("reconcile", self.reconcile),
            Loop("endings", self.end_due),
            Loop("pulse", self.pulse),
            Loop("owner", self.beat),
            Loop("reread", self.reread),
            self.snapshots,
        ]

    async def sweep(self) -> float:
        """Look at workspaces that wait, page by page; a lost wake-up costs one sweep."""
        rows = await self.pool.fetch(SQL["waiting_workspaces"], self._page_after, _PAGE)
        names = [row["workspace_id"] for row in rows]
        self._page_after = names[-1] if len(names) == _PAGE else ""
        self.drain.wake(names)
        return 0.0 if self._page_after else self.settings.sweep_s

    async def reconcile(self) -> float:
        """Hold counters against rows, page by page (B-06).

        A counter that leaked would close a workspace for ever, and one that is wrongly 0 hides its items from every
        sweep. Nothing is known to break them, so one looks rarely, reads without a lock, and locks only what differs.
        Waiting rows are counted up to a bound, or a look would cost the whole backlog: a counter that is wrong while
        both it and the truth are above the bound delays nobody, and is found when it comes down.
        """
        rows = await self.pool.fetch(SQL["counted_workspaces"], self._counted_after, _PAGE)
        names = [row["workspace_id"] for row in rows]
        wrong = await transact(self.pool, lambda connection: self._correct(connection, names))
        self._counted_after = names[-1] if len(names) == _PAGE else ""
        self.drain.wake(wrong)
        return 0.0 if self._counted_after else self.settings.reconcile_s

    async def _correct(self, connection: Connection, names: Sequence[str]) -> list[str]:
        rows = await connection.fetch(SQL["count_items"], names, _COUNT_MAX)
        said = await store.read(connection, names)
        suspect = [row["workspace_id"] for row in rows if _differs(said.get(row["workspace_id"]), row)]
        if not suspect:
            return []
        before = await store.lock(connection, suspect)
        after = dict(before)
        wrong: list[str] = []
        for row in await connection.fetch(SQL["count_items"], suspect, None):
            name, workspace = row["workspace_id"], before[row["workspace_id"]]
            truth = {each: row[each] for each in _COUNTERS}
            was = {each: getattr(workspace, each) for each in _COUNTERS}
            if was == truth:
                continue  # it was read while it changed
            wrong.append(name)
            after[name] = replace(workspace, **truth, rev=workspace.rev + 1)
            RECONCILED.inc()
            log.error("counters_corrected", workspace_id=name, was=was, truth=truth)
        await store.save(connection, before, after)
        return wrong

    async def end_due(self, now: datetime | None = None) -> float:
        """End what waited past its time: expired, or given up on."""
        rows = await self.pool.fetch(SQL["ending_items"], now, *self._ended_after, _PAGE)
        due = [(row["queue_id"], row["workspace_id"]) for row in rows]
        try:
            await self._expire(due)
        except Exception as error:
            if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                raise
            await self._expire_singly(due)
        full = len(rows) == _PAGE
        self._ended_after = (rows[-1]["due_at"], rows[-1]["queue_id"]) if full else (None, None)
        return 0.0 if full else self.settings.sweep_s

    async def _expire(self, due: Sequence[tuple[UUID, str]]) -> None:
        if due:
            await transact(self.pool, lambda connection: end_waiting(connection, due, "expired", "expired"))

    async def _expire_singly(self, due: Sequence[tuple[UUID, str]]) -> None:
        """One of them cannot be written: it must not keep the others (B-08)."""
        for item in due:
            try:
                await self._expire([item])
            except Exception as error:
                if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                    raise
                log.exception("expiry_failed", queue_id=str(item[0]))

    async def pulse(self) -> float:
        """Say that this replica lives, and nothing else.

        On a connection of its own: handlers that wait for a lock may hold the whole pool for longer than an owner may
        be silent, and the deliveries of a replica that lives would be run twice (B-09).
        """
        await self.own.execute(SQL["beat_replica"], self.settings.replica_id, self.settings.owner_silent_s)
        return self.settings.owner_beat_s

    async def beat(self, now: datetime | None = None) -> float:
        """Say that this replica lives; take the deliveries of those that do not.

        Only who has itself beaten without a break may judge, so an outage of Postgres takes nobody's deliveries.
        """
        silent_s = self.settings.owner_silent_s
        may_judge = await self.pool.fetchval(SQL["beat_replica"], self.settings.replica_id, silent_s)
        if may_judge or now is not None:
            async with self.pool.acquire() as connection:
                lost = await store.find_lost(
                    connection, self.settings.replica_id, silent_s, now, after=self._lost_after, most=_PAGE
                )
            for item in lost:
                OWNERS_LOST.inc()
                log.warning("owner_lost", queue_id=str(item.queue_id), delivery_no=item.delivery_no)
                self.drain.settle(Ending(item, "owner_died", error="the replica that delivered it died"))
            self._lost_after = lost[-1].queue_id if len(lost) == _PAGE else None
            await self.pool.execute(SQL["forget_replicas"], silent_s * 10)
            await self.pool.execute(SQL["forget_proxies"], self.settings.proxy_silent_s)
        return 0.0 if self._lost_after else self.settings.owner_beat_s

    async def take_bounds(self) -> None:
        """Let our own settings bound the turns of workspaces that say nothing themselves."""
        settings = self.settings
        await transact(
            self.pool,
            lambda connection: store.set_bounds(
                connection, ceiling_s=settings.session_ceiling_s, checkpoint_grace_s=settings.checkpoint_grace_s,
                stop_grace_s=settings.stop_grace_s,
            ),
        )  # fmt: skip

    async def leave(self) -> None:
        """Say that this replica has stopped in order: nobody has to wait for its silence."""
        try:
            await self.pool.execute(SQL["leave_replica"], self.settings.replica_id)
        except Exception as error:  # noqa: BLE001 - while Postgres is away nobody can be told
            log.warning("not_left", error=f"{type(error).__name__}: {error}"[:300])

    async def reread(self, now: datetime | None = None) -> float:
        """Look at our own rows: a cancel or a stop is passed on; a row that is no longer ours is let go."""
        # Taken before the rows are read: what is claimed meanwhile is in neither.
        running = list(self.drain.running.items())
        rows = await self.pool.fetch(SQL["owned_items"], self.settings.replica_id, now)
        ours = {(str(row["queue_id"]), row["delivery_no"]): row for row in rows}
        for key, (delivery, task) in running:
            row = ours.get(key)
            if row is None:
                if key in self.drain.running:
                    log.warning("delivery_taken_away", queue_id=key[0], delivery_no=key[1])
                    task.cancel()
                continue
            delivery.moved(row["url"] or "", row["agent_authorization"])
            delivery.bound(row["ceiling_s"], row["checkpoint_grace_s"] + row["stop_grace_s"])
            if row["beat_age_s"] is not None:
                self.drain.alive(row["workspace_id"], age_s=row["beat_age_s"])
            if row["cancel_at"] is not None:
                delivery.ask_cancel()
            if row["stopped"]:
                self._stop(delivery, row)
            self._part(delivery, row)
        self._adopt({key: row for key, row in ours.items() if not self.drain.holds(key)})
        return self.settings.reread_s

    def _stop(self, delivery: Delivery, row: asyncpg.Record) -> None:
        delivery.ask_stop(heard_age_s=row["stop_heard_age_s"])
        if row["hung_up"]:
            delivery.hang_up("ceiling", "Its session was to end, and nothing else could end it: we hung up.")
        elif row["incarnation"] > delivery.item.incarnation:
            # Its connection may stand half open, and the beats of the new life keep it from being idle (C-K13).
            delivery.hang_up("ceiling", "It was told to stop, and its agent has begun another life.")
        elif decide.is_abandoned(
            stop_age_s=row["stop_age_s"],
            beat_age_s=row["beat_age_s"],
            silent_s=delivery.silent_s(),
            active=row["beat_active"],
            ever_active=row["ever_active"],
            grace_s=row["stop_grace_s"],
        ):
            log.warning("session_abandoned", queue_id=str(row["queue_id"]), workspace_id=row["workspace_id"])
            delivery.hang_up("abandoned", "After it was told to stop its agent's beats show nothing, and no byte came.")

    @staticmethod
    def _part(delivery: Delivery, row: asyncpg.Record) -> None:
        """Hang up on a life that is over: what has not come by now does not come."""
        item = delivery.item
        is_over = decide.is_outlived(
            life=item.incarnation,
            incarnation=row["incarnation"],
            dead_incarnation=row["dead_incarnation"],
            dead_age_s=row["dead_age_s"],
            led_s=row["led_s"],
            grace_s=row["stop_grace_s"],
            is_followed=delivery.task_id is not None,
        )
        reply: Reply = "ceiling" if row["stopped"] else "unknown"
        if is_over and delivery.hang_up(reply, "The agent's life that had it is over, and no answer has come."):
            OUTLIVED.inc()
            log.warning(
                "delivery_outlived", queue_id=str(item.queue_id), workspace_id=item.workspace_id,
                delivery_no=item.delivery_no, incarnation=item.incarnation,
            )  # fmt: skip

    def _adopt(self, orphans: dict[tuple[str, int], asyncpg.Record]) -> None:
        """Write back rows that are ours and that nobody here delivers: a claim whose commit was never confirmed.

        Seen at two rereads in a row, and the turn that was under way at the first has ended: it may be about to begin
        them, when Postgres was slow to confirm its commit.
        """
        seen = {key: self._orphans.get(key, self.drain.turns_begun) for key in orphans}
        for key in orphans.keys() & self._orphans.keys():
            if self.drain.turns_ended < seen[key]:
                continue
            log.warning("delivery_adopted", queue_id=key[0], delivery_no=key[1])
            item = store.item_of(orphans[key])
            self.drain.settle(Ending(item, "written_back", error="its claim was never confirmed to us"))
        self._orphans = seen

    async def snapshot(self) -> float:
        """Tell every backlog, also when there is none: whoever is left out has nothing waiting, running or shut."""
        wait_s = self._snapshot_at + min(self.settings.snapshot_pause_s, self.settings.snapshot_s) - time.monotonic()
        if wait_s > 0:
            return wait_s  # one serves all who ask meanwhile
        self._snapshot_at = time.monotonic()
        self._snapshots += 1
        for fact in await read_snapshot(self.pool, rev=self._snapshots):
            self.publisher.post(fact)
        return self.settings.snapshot_s


_COUNTERS = ("waiting", "waiting_critical", "waiting_info", "running")


def _differs(said: Workspace | None, row: asyncpg.Record) -> bool:
    if said is None:
        return True
    if said.waiting >= _COUNT_MAX:  # not all of them were counted, but CRITICAL was counted first
        critical = min(said.waiting_critical, _COUNT_MAX)
        return (_COUNT_MAX, critical, said.running) != (row["waiting"], row["waiting_critical"], row["running"])
    return any(getattr(said, each) != row[each] for each in _COUNTERS)
