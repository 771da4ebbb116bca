"""What queue does by the clock: sweeps, endings, owners, snapshots, and re-reading its own deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from services.queue import store
from services.queue.deliver import Ending
from services.queue.drain import Drain, backlogs
from services.queue.metrics import ENDED, OWNERS_LOST, RECONCILED
from services.queue.settings import Settings
from services.queue.store import SQL
from shared import outbox
from shared.broker import Publisher
from shared.database import Connection, Pool, transact
from shared.facts import BacklogSnapshot, ItemChanged, ItemStatus, NamedBacklog
from shared.loops import Loop
from shared.telemetry import log

_PAGE = 500
_SNAPSHOT_PART = 200


@dataclass(slots=True)
class Loops:
    """Each method is one loop's `run_once`: due rows → write → seconds until the next turn."""

    settings: Settings
    pool: Pool
    publisher: Publisher
    drain: Drain
    _page_after: str = ""
    _snapshots: int = 0
    _orphans: dict[tuple[str, int], int] = field(default_factory=dict)

    def all(self) -> list[Loop]:
        return [
            Loop("sweep", self.sweep),
            Loop("endings", self.end_due),
            Loop("owner", self.beat),
            Loop("reread", self.reread),
            Loop("snapshot", self.snapshot),
        ]

    async def sweep(self) -> float:
        """Look at workspaces that wait, page by page; a lost wake-up costs one sweep. Hold counters against rows."""
        rows = await self.pool.fetch(SQL["waiting_workspaces"], self._page_after, _PAGE)
        names = [row["workspace_id"] for row in rows]
        self._page_after = names[-1] if len(names) == _PAGE else ""
        self.drain.wake(names)
        await transact(self.pool, lambda connection: self._reconcile(connection, names))
        return 0.0 if self._page_after else self.settings.sweep_s

    async def _reconcile(self, connection: Connection, names: Sequence[str]) -> None:
        """B-06: a counter that leaked would close a workspace for ever. Read first, lock only what differs."""
        true = {row["workspace_id"]: row for row in await connection.fetch(SQL["count_items"], names)}
        said = await store.read(connection, names)
        wrong = [name for name in names if _differs(said[name].waiting, said[name].running, true.get(name))]
        if not wrong:
            return
        before = await store.lock(connection, wrong)
        true = {row["workspace_id"]: row for row in await connection.fetch(SQL["count_items"], wrong)}
        after = dict(before)
        for name, workspace in before.items():
            row = true.get(name)
            if _differs(workspace.waiting, workspace.running, row):
                waiting, running = (row["waiting"], row["running"]) if row else (0, 0)
                after[name] = replace(workspace, waiting=waiting, running=running, rev=workspace.rev + 1)
                RECONCILED.inc()
                log.error("counters_corrected", workspace_id=name, was=(workspace.waiting, workspace.running))
        await store.save(connection, before, after)

    async def end_due(self, now: datetime | None = None) -> float:
        """End what waited past its time: expired, or given up on."""
        rows = await self.pool.fetch(SQL["ending_items"], now)
        if rows:
            ended = [(row["queue_id"], row["workspace_id"]) for row in rows]
            await transact(self.pool, lambda connection: end_waiting(connection, ended, "expired", "expired"))
        return 0.0 if len(rows) == _PAGE else self.settings.sweep_s

    async def beat(self, now: datetime | None = None) -> float:
        """Say that this replica lives; take the deliveries of those that do not.

        Only who has itself beaten without a break may judge, so an outage of Postgres takes nobody's deliveries.
        """
        silent_s = self.settings.owner_silent_s
        may_judge = await self.pool.fetchval(SQL["beat_replica"], self.settings.replica_id, silent_s)
        if may_judge or now is not None:
            async with self.pool.acquire() as connection:
                lost = await store.find_lost(connection, self.settings.replica_id, silent_s, now)
            for item in lost:
                OWNERS_LOST.inc()
                log.warning("owner_lost", queue_id=str(item.queue_id), delivery_no=item.delivery_no)
                self.drain.settle(Ending(item, "owner_died", error="the replica that delivered it died"))
            await self.pool.execute(SQL["forget_replicas"], silent_s * 10)
        return self.settings.owner_beat_s

    async def leave(self) -> None:
        """Say that this replica has stopped in order: nobody has to wait for its silence."""
        await self.pool.execute(SQL["leave_replica"], self.settings.replica_id)

    async def reread(self) -> float:
        """Look at our own rows: a cancel is passed on; a row that is no longer ours is let go."""
        # Taken before the rows are read: what is claimed meanwhile is in neither.
        running = list(self.drain.running.items())
        rows = await self.pool.fetch(SQL["owned_items"], self.settings.replica_id)
        ours = {(str(row["queue_id"]), row["delivery_no"]): row for row in rows}
        for key, (delivery, task) in running:
            row = ours.get(key)
            if row is None:
                if key in self.drain.running:
                    log.warning("delivery_taken_away", queue_id=key[0], delivery_no=key[1])
                    task.cancel()
                continue
            delivery.moved(row["url"] or "", row["agent_authorization"])
            if row["beat_age_s"] is not None:
                self.drain.alive(row["workspace_id"], age_s=row["beat_age_s"])
            if row["cancel_at"] is not None:
                delivery.ask_cancel()
        self._adopt({key: row for key, row in ours.items() if not self.drain.holds(key)})
        return self.settings.reread_s

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
        """Tell every backlog, also when there is none: whoever is left out has nothing waiting or running."""
        read_at = datetime.now().astimezone()
        async with self.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            workspaces = {each.workspace_id: each for each in await store.read_active(connection)}
            found = await backlogs(connection, workspaces, await store.clock(connection, None))
        named = [
            NamedBacklog(workspace_id=name, rev=workspaces[name].rev, **dict(backlog))
            for name, backlog in found.items()
        ]
        parts = [named[at : at + _SNAPSHOT_PART] for at in range(0, len(named), _SNAPSHOT_PART)] or [[]]
        self._snapshots += 1
        snapshot_id = uuid7()
        for number, part in enumerate(parts):
            self.publisher.post(
                BacklogSnapshot(
                    rev=self._snapshots,
                    occurred_at=read_at,
                    snapshot_id=snapshot_id,
                    part=number,
                    parts=len(parts),
                    backlogs=part,
                )
            )
        return self.settings.snapshot_s


def _differs(waiting: int, running: int, row: object) -> bool:
    true = (row["waiting"], row["running"]) if row is not None else (0, 0)  # type: ignore[index]
    return (waiting, running) != true


async def end_waiting(
    connection: Connection, items: Sequence[tuple[UUID, str]], status: str, reason: str
) -> list[UUID]:
    """End items that wait, visibly; return those that did (a claim may have been first)."""
    before = await store.lock(connection, {name for _, name in items})
    rows = await connection.fetch(
        SQL["end_items"], [queue_id for queue_id, _ in items], [status] * len(items), [reason] * len(items)
    )
    after = dict(before)
    for row in rows:
        workspace = after[row["workspace_id"]]
        after[row["workspace_id"]] = replace(workspace, waiting=workspace.waiting - 1, rev=workspace.rev + 1)
        ENDED.labels(status).inc()
    await store.save(connection, before, after)
    if rows:
        await outbox.add(
            connection,
            [
                ItemChanged(
                    workspace_id=row["workspace_id"],
                    rev=row["rev"],
                    queue_id=row["queue_id"],
                    status=ItemStatus(status),
                    reason=reason,
                )
                for row in rows
            ],
        )
    return [row["queue_id"] for row in rows]
