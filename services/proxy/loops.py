"""What proxy does by the clock: tell of its forwards, read again what has changed, write whose tasks are."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

from uuid_utils.compat import uuid7

from services.proxy.copies import Copies
from services.proxy.copies.bounds import bounds_of
from services.proxy.decide import is_outlived, said_s
from services.proxy.metrics import OUTLIVED
from services.proxy.settings import Settings
from services.proxy.store import Store
from shared import topology
from shared.broker import NotPublished, Publisher, PublishUnknown
from shared.database import backoff_s, classify
from shared.facts import FLEET, QueryAnswered, QueueQuery
from shared.loops import Loop
from shared.telemetry import log

_IDLE_S = 60.0
_WRITTEN_MAX = 1000
_FORGET_S = 3600.0
_LAST_WRITE_S = 2.0
_ASK_S = 0.25
_ASKED_S = 2.0
_LOOK_S = 1.0
_RELOAD_S = 300.0
"""The whole registry is read this often besides: a fact that was lost with a replica's queue is found then."""


class Beats:
    """ProxyBeats: at once where a message waits for what they tell, else gathered for `beat_pause_s`.

    While the gate of a workspace is closed a beat goes out every `beat_s`, forwards or not: what may be killed there is
    decided by what every proxy has said. For that the queue must know of every proxy, before it forwards anything: so
    each says that it lives, first of all and every `beat_s`.
    """

    def __init__(self, settings: Settings, copies: Copies, publisher: Publisher) -> None:
        self._settings = settings
        self._copies = copies
        self._publisher = publisher
        self._armed = False
        self._gathered_at = 0.0
        self._lived_at = 0.0
        self.loop = Loop("beats", self.run_once)

    async def introduce(self) -> None:
        """Come back when the broker has it that this replica lives. No fact is read before."""
        attempt = 0
        while True:
            try:
                await self._publisher.publish(self._copies.uses.fleet_beat())
            except (NotPublished, PublishUnknown) as error:
                log.warning("waiting_for_rabbitmq", error=str(error), attempt=attempt)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                self._lived_at = time.time()
                return

    def notify(self, workspace_id: str) -> None:
        """The live forwards of this workspace have changed."""
        if self._copies.backlogs.view(workspace_id).waiting or self._copies.keeps.pending(workspace_id):
            self._tell(workspace_id, time.time())
        elif not self._armed:
            self._armed = True
            self.loop.wake()

    def closed(self, workspace_id: str) -> None:
        """The gate of this workspace was closed: from here on nothing is forwarded there, and that is said now."""
        view = self._copies.backlogs.view(workspace_id)
        log.info("gate_closing_heard", workspace_id=workspace_id, generation=view.gate_generation)
        self._tell(workspace_id, time.time())
        self.loop.wake()

    async def run_once(self, now: float | None = None) -> float:
        now = time.time() if now is None else now
        uses = self._copies.uses
        if now - self._lived_at >= self._settings.beat_s:
            self._lived_at = now
            self._publisher.post(uses.fleet_beat())
        wait_s = self._gathered_at + self._settings.beat_pause_s - now
        if uses.changed and wait_s <= 0:
            self._armed, self._gathered_at = False, now
            for workspace_id in list(uses.changed):
                self._tell(workspace_id, now)
        for workspace_id, told_at in list(uses.lively.items()):
            if now - told_at >= self._settings.beat_s:
                self._tell(workspace_id, now)
        if uses.changed:
            return max(wait_s, 0.001)
        return self._settings.beat_s / 5 if uses.lively else max(self._lived_at + self._settings.beat_s - now, 0.001)

    def _tell(self, workspace_id: str, now: float) -> None:
        uses = self._copies.uses
        uses.changed.discard(workspace_id)
        beat = uses.beat(workspace_id, self._copies.backlogs.view(workspace_id), now)
        if beat.forwards or beat.ended or beat.gate_until is not None:
            uses.lively[workspace_id] = now
        else:
            uses.lively.pop(workspace_id, None)  # the empty beat that says so is the last
        self._publisher.post(beat)


class Reading:
    """Rows of the registry that facts have spoken of; and all of them after an outage, for facts may have been lost."""

    def __init__(self, copies: Copies, store: Store, publisher: Publisher) -> None:
        self._copies = copies
        self._store = store
        self._publisher = publisher
        self._reconnects = publisher.reconnects
        self._loaded_at = float("-inf")
        self.loop = Loop("registry", self.run_once)

    async def load(self) -> None:
        """Read everything."""
        self._copies.registry.put_all(await self._store.all())
        self._loaded_at = time.monotonic()

    async def run_once(self) -> float:
        reconnects = self._publisher.reconnects
        if reconnects != self._reconnects or time.monotonic() - self._loaded_at > _RELOAD_S:
            await self.load()
            self._reconnects = reconnects
        registry = self._copies.registry
        asked, registry.unread = registry.unread, set()
        if asked:
            try:
                registry.put_all(await self._store.some(asked))
            except BaseException:
                registry.unread |= asked
                raise
        return _LOOK_S


class Catching:
    """Asks the queue for every backlog: until there was one since the start, and whenever the bus was cut.

    While the queue is away nobody answers, and nothing waits for it here: the table of §1 keeps what it must.
    """

    def __init__(self, settings: Settings, copies: Copies, publisher: Publisher) -> None:
        self._backlogs = copies.backlogs
        self._publisher = publisher
        self._reply_to = topology.route(QueryAnswered, "proxy").queue(settings.replica_id)
        self._reconnects = publisher.reconnects
        self.loop = Loop("catching", self.run_once)

    async def run_once(self) -> float:
        reconnects, first = self._publisher.reconnects, self._backlogs.snapshot_at is None
        if first or reconnects != self._reconnects:
            self._reconnects = reconnects
            expires_at = datetime.now(UTC) + timedelta(seconds=_ASKED_S)
            self._publisher.post(
                QueueQuery(
                    workspace_id=FLEET, rev=0, query_id=uuid7(), verb="snapshot", expires_at=expires_at,
                    reply_to=self._reply_to,
                )
            )  # fmt: skip
        return _ASK_S if first else _LOOK_S


class Parting:
    """Ends live forwards to lives that are over: what has not come by then does not come. Bounds those that run."""

    def __init__(self, settings: Settings, copies: Copies) -> None:
        self._settings = settings
        self._copies = copies
        self.loop = Loop("parting", self.run_once)

    async def run_once(self, now: float | None = None) -> float:
        now = time.monotonic() if now is None else now
        self._bound()
        for workspace_id, death in self._copies.registry.deaths.items():
            workspace = self._copies.registry.find(workspace_id)
            if workspace is None:
                continue
            grace_s = said_s(workspace, "stop_grace_s", self._settings.stop_grace_s)
            for forward in self._copies.uses.of(workspace_id).own.values():
                is_over = is_outlived(
                    life=forward.incarnation, incarnation=workspace.incarnation, dead_incarnation=death.incarnation,
                    dead_age_s=now - death.at, grace_s=grace_s,
                )  # fmt: skip
                if is_over and self._copies.uses.hang_up(forward):
                    OUTLIVED.inc()
                    log.warning(
                        "live_session_outlived", workspace_id=workspace_id, session_id=forward.session_id,
                        incarnation=forward.incarnation,
                    )  # fmt: skip
        return _LOOK_S

    def _bound(self) -> None:
        """A forward begins with the bounds of its workspace, and takes over what is said of them later."""
        for workspace_id, forwards in self._copies.uses.live():
            workspace = self._copies.registry.find(workspace_id)
            if workspace is None:
                continue
            bounds = bounds_of(workspace, self._settings)
            for forward in forwards:
                forward.bound(bounds)


class Writing:
    """Writes behind the forwards who was given which Task, many at once; forgets what is old."""

    def __init__(self, settings: Settings, copies: Copies, store: Store) -> None:
        self._settings = settings
        self._owners = copies.owners
        self._store = store
        self._written_at = float("-inf")
        self._forgotten_at = float("-inf")
        self.loop = Loop("task_owners", self.run_once)
        self._owners.wake = self.loop.wake

    async def run_once(self) -> float:
        now = time.monotonic()
        wait_s = self._written_at + self._settings.task_owner_pause_s - now
        if wait_s > 0 and self._owners.unwritten:
            return wait_s
        self._written_at = now
        await self._write()
        if now - self._forgotten_at > _FORGET_S:
            await self._store.forget_task_owners(self._settings.task_owner_keep_s)
            self._forgotten_at = now
        return self._settings.task_owner_pause_s if self._owners.unwritten else _IDLE_S

    async def close(self) -> None:
        """Write what is left; a registry that is away does not hold up the end."""
        try:
            async with asyncio.timeout(_LAST_WRITE_S):
                while self._owners.unwritten:
                    await self._write()
        except Exception as error:
            if classify(error) is None:
                raise
            log.warning("task_owners_not_written", count=self._owners.unwritten)

    async def _write(self) -> None:
        taken = self._owners.take_unwritten(_WRITTEN_MAX)
        if not taken:
            return
        try:
            await self._store.insert_task_owners(taken)
        except BaseException:
            self._owners.put_back(taken)
            raise
        if self._owners.dropped:
            log.error("task_owners_forgotten", count=self._owners.dropped)
            self._owners.dropped = 0
