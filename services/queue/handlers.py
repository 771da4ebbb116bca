"""What queue does with each fact: one function per fact, fetch → decide → write → tell.

Every handler locks the workspaces that its facts speak of, in key order, and saves what changed of them; so its effects
and the turns of the drain never interleave within a workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from services.queue import decide, store
from services.queue.backlogs import read_backlogs
from services.queue.decide import Forwards, Workspace
from services.queue.drain import Drain
from services.queue.gates import closed_gates
from services.queue.keeping import keep, parts_of, told_of
from services.queue.settings import Settings
from services.queue.store import Locked
from shared import outbox
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import (
    FLEET,
    Fact,
    ItemChanged,
    ItemKept,
    MessageBusy,
    ProxyBeat,
    WorkspaceBacklog,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
    WorkspaceStatus,
)
from shared.intake import Tell
from shared.telemetry import log

FactT = TypeVar("FactT", bound=Fact)
BOUNDS = dict(zip(decide.UNSAID, ("session_ceiling_s", "checkpoint_grace_s", "stop_grace_s"), strict=True))
"""Column → setting, of the workspace and of the service alike."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers, bound to what they tell."""

    settings: Settings
    publisher: Publisher
    drain: Drain

    async def message_busy(self, connection: Connection, facts: Sequence[MessageBusy]) -> Tell:
        """Keep messages: each becomes an item, or is found to be one that is kept already."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        after = _hear_beats(before, [fact.beat for fact in facts if fact.beat is not None])
        replies: list[tuple[str, ItemKept]] = []
        ended: list[ItemChanged] = []
        for part in parts_of(facts):
            kept = await keep(connection, part, after, self.settings.idempotency_keep_s)
            ended += kept.ended
            for fact in part:
                workspace = after[fact.workspace_id]
                if fact.queue_id in kept.new:
                    workspace = decide.keep(workspace, store.place_of(fact), fact.priority)
                    after[fact.workspace_id] = workspace
                if fact.reply_to is not None:
                    replies.append((fact.reply_to, told_of(fact, kept, workspace)))
        await store.save(connection, before, after)
        if ended:
            await outbox.add(connection, ended)
        backlogs = await self._backlogs(connection, before, after)

        def tell() -> None:
            for reply_to, reply in replies:
                self.publisher.post(reply, to=reply_to)
            self._tell(backlogs, after)

        return tell

    async def heartbeats(self, connection: Connection, facts: Sequence[WorkspaceHeartbeat]) -> Tell:
        """Apply the newest beat of each workspace."""
        newest = _newest(facts, lambda fact: fact.workspace_id, lambda fact: (fact.incarnation, fact.rev))
        before = await store.lock(connection, newest)
        after = dict(before)
        begun = await store.running(connection, before.values())
        for name, fact in newest.items():
            after[name] = decide.hear_beat(
                before[name],
                rev=fact.rev,
                at=fact.occurred_at.timestamp(),
                active=fact.active_tasks,
                cadence_s=fact.cadence_s,
                incarnation=fact.incarnation,
                maximum=fact.max_concurrent_tasks,
                now=before.now,
                begun_after=sum(
                    row["workspace_id"] == name and row["dispatched_at"] > fact.occurred_at for row in begun
                ),
            )
        await store.save(connection, before, after)

        def tell() -> None:
            for name in newest:
                self.drain.alive(name)
            self.drain.wake(name for name, workspace in after.items() if workspace.waiting)

        return tell

    async def proxy_beats(self, connection: Connection, facts: Sequence[ProxyBeat]) -> Tell:
        """Apply the newest beat of each proxy for each workspace: what it forwards live, and what gate it has seen."""
        silent_s = self.settings.proxy_silent_s
        alive = sorted({fact.proxy_id for fact in facts if fact.workspace_id == FLEET})
        about = [fact for fact in facts if fact.workspace_id != FLEET]
        newest = _newest(about, lambda fact: (fact.workspace_id, fact.proxy_id), lambda fact: fact.rev)
        before = await store.lock(connection, {name for name, _ in newest})
        await store.beat_proxies(connection, alive, silent_s)
        after = _hear_beats(before, list(newest.values()))
        await store.save(connection, before, after)
        backlogs = await self._backlogs(connection, before, after)
        shut = await closed_gates(connection, after, before.now, silent_s=silent_s, unless=before)

        def tell() -> None:
            for fact in shut:
                self.publisher.post(fact)
            self._tell(backlogs, after)

        return tell

    async def registered(self, connection: Connection, facts: Sequence[WorkspaceRegistered]) -> Tell:
        """Take over what the registry says (WorkspaceRegistered and WorkspaceChanged)."""
        newest = _newest(facts, lambda fact: fact.workspace_id, lambda fact: fact.rev)
        before = await store.lock(connection, newest)
        after: dict[str, Workspace] = {}
        resumed: dict[str, float] = {}
        for name, workspace in before.items():
            after[name], since = _registered(workspace, newest[name], before.now, self.settings)
            if since is not None:
                resumed[name] = since
        await store.shift_clocks(connection, resumed, before.now)
        await store.save(connection, before, after)
        return lambda: self._tell([], after)

    async def statuses(self, connection: Connection, facts: Sequence[WorkspaceStatus]) -> Tell:
        """Hear who is dead: nothing begins there, and owners end what they have there; and who is not."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        after: dict[str, Workspace] = dict(before)
        for fact in sorted(facts, key=lambda fact: fact.rev):
            after[fact.workspace_id] = decide.hear_status(
                after[fact.workspace_id], rev=fact.rev, incarnation=fact.incarnation, status=fact.status, now=before.now
            )
        await store.save(connection, before, after)

        def tell() -> None:
            _log_deaths(before, after)
            self._tell([], after)

        return tell

    async def removed(self, connection: Connection, facts: Sequence[WorkspaceRemoved]) -> Tell:
        """Deliver nothing more; what waits ends by its own clocks, visibly: a pause that nobody can end is over."""
        newest = _newest(facts, lambda fact: fact.workspace_id, lambda fact: fact.rev)
        before = await store.lock(connection, newest)
        after: dict[str, Workspace] = dict(before)
        resumed: dict[str, float] = {}
        for name, workspace in before.items():
            if newest[name].rev > workspace.registry_rev:
                going_on, since = decide.paused(workspace, before.now, is_paused=False)
                after[name] = replace(going_on, removed=True, registry_rev=newest[name].rev, rev=workspace.rev + 1)
                if since is not None:
                    resumed[name] = since
        await store.shift_clocks(connection, resumed, before.now)
        await store.save(connection, before, after)
        return lambda: self._tell([], after)

    async def _backlogs(
        self, connection: Connection, before: Locked, after: Mapping[str, Workspace]
    ) -> list[WorkspaceBacklog]:
        moved = {name: workspace for name, workspace in after.items() if workspace != before[name]}
        return await read_backlogs(connection, moved, before.now)

    def _tell(self, backlogs: Sequence[WorkspaceBacklog], after: Mapping[str, Workspace]) -> None:
        for backlog in backlogs:
            self.publisher.post(backlog)
        self.drain.wake(name for name, workspace in after.items() if workspace.waiting)


KeyT = TypeVar("KeyT")


def _newest(
    facts: Sequence[FactT], key: Callable[[FactT], KeyT], order: Callable[[FactT], object]
) -> dict[KeyT, FactT]:
    """The newest fact of each key: merged before any row is locked."""
    found: dict[KeyT, FactT] = {}
    for fact in facts:
        name = key(fact)
        if name not in found or order(fact) > order(found[name]):  # type: ignore[operator]
            found[name] = fact
    return found


def _hear_beats(before: Mapping[str, Workspace], beats: Sequence[ProxyBeat]) -> dict[str, Workspace]:
    after = dict(before)
    for beat in beats:
        forwards = Forwards(
            rev=beat.rev,
            at=beat.occurred_at.timestamp(),
            running=tuple(
                (each.session_id, (each.key_hash or b"").hex(), each.started_at.timestamp()) for each in beat.forwards
            ),
            ended=tuple(
                (each.started_at.timestamp(), each.ended_at.timestamp(), each.outcome == "answered")
                for each in beat.ended
                if each.outcome not in {"busy", "not_delivered"}
            ),
            generation=beat.gate_generation,
            gate_until=beat.gate_until.timestamp() if beat.gate_until is not None else None,
        )
        after[beat.workspace_id] = decide.hear_forwards(after[beat.workspace_id], beat.proxy_id, forwards)
    return after


def _log_deaths(before: Mapping[str, Workspace], after: Mapping[str, Workspace]) -> None:
    for name, workspace in after.items():
        if workspace.status != before[name].status:
            log.info("life_heard", workspace_id=name, status=workspace.status, incarnation=workspace.incarnation,
                     waiting=workspace.waiting, running=workspace.running)  # fmt: skip


def _registered(
    workspace: Workspace, fact: WorkspaceRegistered, now: float, settings: Settings
) -> tuple[Workspace, float | None]:
    """The workspace as the registry has it; with the moment since which it was paused, if it no longer is."""
    if fact.rev <= workspace.registry_rev:
        return workspace, None
    workspace, since = decide.paused(workspace, now, is_paused=fact.paused or fact.desired == "stopped")
    give_up = fact.settings.get("give_up_after_s")
    new_life = fact.incarnation > workspace.incarnation
    taken_over = replace(
        decide.begin_life(workspace, fact.incarnation, now),
        registry_rev=fact.rev,
        url=fact.url or None,
        agent_authorization=fact.agent_authorization,
        max_concurrent=fact.max_concurrent_tasks,
        at_most_once=fact.settings.get("delivery") == "at_most_once",
        give_up_after_s=float(give_up) if give_up is not None else 86400.0,
        removed=False,
        # What the agent's own beat said of its cadence outlasts what was registered, in whichever order they come.
        beat_cadence_s=fact.heartbeat_interval_s if new_life or workspace.beat_at is None else workspace.beat_cadence_s,
        rev=workspace.rev + 1,
    )
    return _bounded(taken_over, fact, settings), since


def _bounded(workspace: Workspace, fact: WorkspaceRegistered, settings: Settings) -> Workspace:
    """With what bounds a turn there: the workspace's own word, else the service's."""
    said: dict[str, Any] = {name: fact.settings.get(setting) for name, setting in BOUNDS.items()}
    bounds: dict[str, Any] = {
        name: float(getattr(settings, BOUNDS[name]) if own is None else own) for name, own in said.items()
    }
    return replace(workspace, **bounds, unsaid=tuple(name for name, own in said.items() if own is None))
