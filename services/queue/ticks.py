"""What queue does with the calendar's facts: a fire becomes an item, is told with one that waits, or comes to nothing.

Both handlers lock the workspaces they speak of, as all handlers do, so a fire, a change of its schedule and a turn come
one after the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid5

from services.queue import decide, store
from services.queue.backlogs import read_backlogs
from services.queue.decide import Keep, Merge, Place, Settle, Tick, Workspace
from services.queue.drain import Drain
from services.queue.metrics import TICKS
from services.queue.store import Locked
from services.queue.waiting import end_waiting
from shared import outbox
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import Fact, Priority, ScheduleApplied, ScheduleChanged, ScheduleTick, TickSettled
from shared.intake import Tell
from shared.telemetry import log


@dataclass(frozen=True, slots=True)
class Ticks:
    """The handlers, bound to what they tell."""

    publisher: Publisher
    drain: Drain

    async def changed(self, connection: Connection, facts: Sequence[ScheduleChanged]) -> Tell:
        """Take over what schedules say now; let go of, or withdraw, what waited for it.

        It is told in any case: whoever asks again asks because he was not told.
        """
        newest: dict[UUID, ScheduleChanged] = {}
        for fact in sorted(facts, key=lambda fact: fact.rev):
            newest[fact.schedule_id] = fact
        await store.lock(connection, {fact.workspace_id for fact in newest.values()})
        await store.save_schedules(connection, newest.values())
        schedules = await store.find_schedules(connection, newest)
        where = {(fact.workspace_id, schedule_id) for schedule_id, fact in newest.items()}
        waiting = [tick for tick in await store.find_ticks(connection, sorted(where)) if tick.waits]
        going: dict[str, list[Tick]] = defaultdict(list)
        for tick in waiting:
            reason = decide.withdrawn(schedules[tick.schedule_id], tick.rev)
            if reason is not None:
                going[reason].append(tick)
        withdrawn = Counter[UUID]()
        for reason, ticks in sorted(going.items()):
            ended = await end_waiting(
                connection, [(tick.queue_id, tick.workspace_id) for tick in ticks], "canceled", reason
            )
            withdrawn.update(tick.schedule_id for tick in ticks if tick.queue_id in ended)
        await store.release_ticks(connection, [tick.queue_id for tick in waiting])
        applied = [
            ScheduleApplied(
                workspace_id=fact.workspace_id,
                rev=schedules[schedule_id].rev,
                schedule_id=schedule_id,
                withdrawn=withdrawn[schedule_id],
            )
            for schedule_id, fact in newest.items()
        ]

        def tell() -> None:
            for fact in applied:
                self.publisher.post(fact)
            self.drain.wake({tick.workspace_id for tick in waiting})

        return tell

    async def fired(self, connection: Connection, facts: Sequence[ScheduleTick]) -> Tell:
        """Say what becomes of each fire."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        known = await store.find_ids(connection, [fact.queue_id for fact in facts])
        fresh = {fact.queue_id: fact for fact in facts if fact.queue_id not in known}
        where = {(fact.workspace_id, fact.schedule_id) for fact in fresh.values()}
        schedules = await store.find_schedules(connection, {schedule_id for _, schedule_id in where})
        lines = _Lines(before, await store.find_ticks(connection, sorted(where)))
        for fact in sorted(fresh.values(), key=lambda fact: (fact.fire_at, fact.queue_id)):
            lines.admit(fact, schedules.get(fact.schedule_id))
        await store.insert_ticks(connection, lines.kept(), before)
        await store.merge_ticks(connection, lines.grown(), before)
        await store.save(connection, before, lines.workspaces)
        if lines.told:
            await outbox.add(connection, lines.told)
        moved = {name: each for name, each in lines.workspaces.items() if each != before[name]}
        backlogs = await read_backlogs(connection, moved, before.now)

        def tell() -> None:
            lines.count()
            for backlog in backlogs:
                self.publisher.post(backlog)
            self.drain.wake(moved)

        return tell


@dataclass(slots=True)
class _Lines:
    """The ticks of a batch's schedules, as each fire of the batch finds them."""

    before: Locked
    there: Sequence[Tick]
    workspaces: dict[str, Workspace] = field(init=False)
    told: list[Fact] = field(default_factory=list)
    _ticks: dict[UUID, Tick] = field(init=False)
    _new: dict[UUID, tuple[Priority, Place]] = field(default_factory=dict)
    _grown: set[UUID] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.workspaces = dict(self.before)
        self._ticks = {tick.queue_id: tick for tick in self.there}

    def admit(self, fact: ScheduleTick, schedule: decide.Schedule | None) -> None:
        workspace, tick = self.workspaces[fact.workspace_id], _tick(fact)
        verdict = decide.admit(
            tick,
            fact.overlap,
            schedule=schedule,
            others=[each for each in self._ticks.values() if each.schedule_id == fact.schedule_id],
            removed=workspace.removed,
            has_room=decide.has_room(workspace, self.before.now),
        )
        match verdict:
            case Keep():
                place = (decide.lane(fact.priority), decide.rank(fact.queue_id, fact.fact_id, fact.priority))
                self._ticks[tick.queue_id] = tick
                self._new[tick.queue_id] = (fact.priority, place)
                self.workspaces[fact.workspace_id] = decide.keep(workspace, place, fact.priority)
            case Merge(into):
                self._ticks[into.queue_id] = decide.merged(into, tick)
                self._grown.add(into.queue_id)
                self.told.append(_settled(fact, "coalesced", None, into))
            case Settle(outcome, reason):
                self.told.append(_settled(fact, outcome, reason))

    def kept(self) -> list[tuple[Tick, Priority, Place]]:
        return [(self._ticks[queue_id], *self._new[queue_id]) for queue_id in sorted(self._new)]

    def grown(self) -> Iterable[Tick]:
        """Those that were there before and stand for more now."""
        return [self._ticks[queue_id] for queue_id in sorted(self._grown - self._new.keys())]

    def count(self) -> None:
        TICKS.labels("kept").inc(len(self._new))
        for fact in self.told:
            assert isinstance(fact, TickSettled)
            TICKS.labels(fact.outcome).inc()
            log.info(
                "fire_settled", workspace_id=fact.workspace_id, schedule_id=str(fact.schedule_id),
                fire_at=fact.fire_at.isoformat(), outcome=fact.outcome, reason=fact.reason,
            )  # fmt: skip


def _tick(fact: ScheduleTick) -> Tick:
    of = fact.queue_id if fact.context == "fresh" else fact.schedule_id
    return Tick(
        queue_id=fact.queue_id,
        workspace_id=fact.workspace_id,
        schedule_id=fact.schedule_id,
        fire_at=fact.fire_at,
        last_fire_at=fact.fire_at,
        first_missed_at=fact.first_missed_at,
        merged_count=fact.merged_count,
        rev=fact.rev,
        coalesces=fact.overlap != "queue_all",
        context_id=str(uuid5(of, "context")),
        ceiling_s=fact.ceiling_s,
    )


def _settled(fact: ScheduleTick, outcome: decide.Outcome, reason: str | None, into: Tick | None = None) -> TickSettled:
    return TickSettled(
        workspace_id=fact.workspace_id,
        rev=fact.rev,
        schedule_id=fact.schedule_id,
        fire_at=fact.fire_at,
        outcome=outcome,
        reason=reason,
        queue_id=into.queue_id if into is not None else None,
        merged_into=into.fire_at if into is not None else None,
    )
