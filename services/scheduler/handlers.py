"""What scheduler does with each fact: the registry's word about workspaces, the queue's about fires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from services.scheduler import decide, store
from services.scheduler.cron import CronError
from services.scheduler.decide import OUTCOMES
from services.scheduler.metrics import FIRES, STALE
from services.scheduler.rules import rule_of
from services.scheduler.store import SQL, Told
from shared.database import Connection
from shared.facts import TickSettled, WorkspaceRegistered, WorkspaceRemoved
from shared.intake import Tell
from shared.telemetry import log


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers, bound to what they tell."""

    wake: Callable[[], None]
    """Wakes the loop that fires."""
    step: Callable[[], None]
    """Wakes the loop of sessions."""

    async def registered(self, connection: Connection, facts: Sequence[WorkspaceRegistered]) -> Tell:
        """Remember what the workspace allows (WorkspaceRegistered and WorkspaceChanged), also of what runs."""
        newest: dict[str, WorkspaceRegistered] = {}
        for fact in sorted(facts, key=lambda fact: fact.rev):
            newest[fact.workspace_id] = fact
        told = {
            name: Told(fact.rev, incarnation=fact.incarnation, settings=fact.settings) for name, fact in newest.items()
        }
        names, _ = await store.hear_workspaces(connection, told)
        await connection.execute(SQL["look_at_sessions_of"], names)
        return self.step

    async def removed(self, connection: Connection, facts: Sequence[WorkspaceRemoved]) -> Tell:
        """Delete the schedules of workspaces that are gone (A-S-11); what waits of them is withdrawn by the queue."""
        told = {fact.workspace_id: Told(fact.rev, removed=True) for fact in sorted(facts, key=lambda fact: fact.rev)}
        _, gone = await store.hear_workspaces(connection, told)
        rows = await store.delete_of(connection, gone)
        await store.tell_changed(connection, rows)
        return lambda: log.info("schedules_deleted", workspaces=len(gone), schedules=len(rows))

    async def settled(self, connection: Connection, facts: Sequence[TickSettled]) -> Tell:
        """Let fires end, each once, and count what became of them."""
        first: dict[tuple[UUID, datetime], TickSettled] = {}
        for fact in facts:
            first.setdefault((fact.schedule_id, fact.fire_at), fact)
        rows = await store.lock(connection, [schedule_id for schedule_id, _ in first])
        ended = await store.settle_fires(connection, list(first.values()))
        tallies: dict[UUID, _Tally] = defaultdict(_Tally)
        for fire in ended:
            tallies[fire["schedule_id"]].add(fire)
        for name, fire_at in await store.bounce_fires(connection, ended):
            last_ran_at = rows[name]["last_ran_at"]
            tallies[name].bounced += last_ran_at is None or fire_at > last_ran_at
        await store.settle_schedules(
            connection, [each.columns(name, rows[name]) for name, each in sorted(tallies.items())]
        )
        revived = [name for name, each in tallies.items() if each.given_back and rows[name]["remaining_runs"] == 0]
        for name in revived:
            await _revive(connection, name)
        return lambda: self._tell(facts, ended, woken=bool(revived))

    def _tell(self, facts: Sequence[TickSettled], ended: Sequence[asyncpg.Record], *, woken: bool) -> None:
        for fire in ended:
            FIRES.labels(fire["outcome"]).inc()
        if len(ended) < len(facts):
            STALE.inc(len(facts) - len(ended))
            log.info("settled_twice", facts=len(facts) - len(ended))
        if woken:
            self.wake()


@dataclass(slots=True)
class _Tally:
    """What the fires of one schedule that ended now come to."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    runs: int = 0
    given_back: int = 0
    bounced: int = 0
    ran_at: datetime | None = None

    def add(self, fire: asyncpg.Record) -> None:
        outcome = fire["outcome"]
        ran = decide.ran_at(outcome, fire["fire_at"], fire["began_at"])
        self.counts[outcome] += 1
        self.runs += ran is not None
        self.given_back += decide.gives_back(outcome, ran) and not fire["by_hand"]
        if ran is not None:
            self.ran_at = max(ran, self.ran_at or ran)

    def columns(self, schedule_id: UUID, row: asyncpg.Record) -> tuple[Any, ...]:
        anew = self.ran_at is not None and (row["last_ran_at"] is None or self.ran_at > row["last_ran_at"])
        counts = (self.counts[outcome] for outcome in OUTCOMES)
        return (schedule_id, *counts, self.runs, self.given_back, self.bounced, self.ran_at, anew)


async def _revive(connection: Connection, schedule_id: UUID) -> None:
    """Give a schedule that had no run left a next moment again: one of them came back."""
    row = await connection.fetchrow(SQL["find_schedule"], schedule_id)
    assert row is not None, "its row is held"
    if row["deleted_at"] is not None:
        return
    schedule = store.schedule_of(row)
    try:
        moment = decide.first_fire(schedule, rule_of(schedule), await store.clock(connection))
    except CronError:
        return  # it was fired once, so its zone is gone: an edit will say so
    if moment is not None:
        await connection.execute(SQL["revive_schedule"], schedule_id, moment, store.due_at(schedule, moment))
