"""The turn: what has ended is settled and what comes next is claimed, for many workspaces in one transaction.

Finish and the next claim of a workspace are one commit, so no slot is free and unseen. While a turn is under way,
endings and wake-ups gather and make the next one (group commit). Endings that cannot be written wait in memory until
Postgres is back; nothing new is claimed meanwhile, because claiming needs Postgres too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from uuid import UUID

from services.queue import decide, fires, store
from services.queue.backlogs import read_backlogs
from services.queue.decide import Item
from services.queue.deliver import Delivery, Ending
from services.queue.evidence import Evidence
from services.queue.metrics import DELIVERIES, REQUEUES, RUNNING, STARVATION_TURNS, WAIT, WAITED
from services.queue.settings import Settings
from services.queue.settling import account, begin, ends, settle
from services.queue.store import SQL
from shared import outbox
from shared.agents import Agents
from shared.broker import Publisher
from shared.database import Connection, Pool, Trouble, backoff_s, classify, transact
from shared.facts import Fact, ItemChanged, ItemStatus
from shared.loops import Loop
from shared.telemetry import log

TURN_ENDINGS_MAX = 256
TURN_WORKSPACES_MAX = 64
_WRITE_BACK_S = 10.0
"""How long a stopping replica tries to write what it still holds."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn did."""

    items: Sequence[Item]
    facts: Sequence[Fact]
    claimed_at: float
    """`time.monotonic()` before the claim: from then on the items were ours, if they were."""
    starved: int = 0
    requeued: Sequence[str] = ()
    """Why, for each item that went back."""


class Drain:
    """Owns this replica's deliveries. `wake` names workspaces worth a look; `run_once` is one turn."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        publisher: Publisher,
        agents: Agents,
        *,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._publisher = publisher
        self._agents = agents
        self._told = told
        self._evidence = Evidence()
        self._ready: dict[str, None] = {}
        self._endings: dict[tuple[str, int], Ending] = {}
        self._beats: dict[str, float] = {}
        self._stopping = False
        self._one_turn = asyncio.Lock()
        self._singly = 0
        self.turns_begun = 0
        self.turns_ended = 0
        self.running: dict[tuple[str, int], tuple[Delivery, asyncio.Task[None]]] = {}
        self.loop = Loop("drain", self.run_once)

    def wake(self, workspace_ids: Iterable[str]) -> None:
        """Look at these workspaces in the next turn."""
        self._ready.update(dict.fromkeys(workspace_ids))
        if self._ready:
            self.loop.wake()

    def alive(self, workspace_id: str, *, age_s: float = 0.0) -> None:
        """Note a beat that came `age_s` ago: the agent's turn is not cut for silence."""
        self._beats[workspace_id] = max(self._beats.get(workspace_id, 0.0), time.monotonic() - age_s)

    def settle(self, ending: Ending) -> None:
        """Write this ending in the next turn; the first word about a delivery counts."""
        self._endings.setdefault(key_of(ending.item), ending)
        self.loop.wake()

    def holds(self, key: tuple[str, int]) -> bool:
        """Whether this replica delivers it now, or has its ending in memory."""
        return key in self.running or key in self._endings

    async def run_once(self, now: datetime | None = None) -> float:
        """Settle and claim once; return 0 while there is more."""
        async with self._one_turn:
            self.turns_begun += 1
            try:
                return await self._run_once(now)
            finally:
                self.turns_ended += 1

    async def _run_once(self, now: datetime | None) -> float:
        alone = self._singly > 0
        self._singly = max(0, self._singly - 1)
        endings = _one_each(islice(self._endings.values(), 1 if alone else TURN_ENDINGS_MAX))
        ready = [] if alone and endings else list(self._ready)[: 1 if alone else TURN_WORKSPACES_MAX]
        if not endings and not ready:
            return self._settings.sweep_s
        room = 0 if self._stopping else self._settings.deliveries_max - len(self.running)
        try:
            turn = await transact(self._pool, lambda connection: self._turn(connection, endings, ready, room, now))
        except Exception as error:
            if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                raise
            self._part(endings, ready, alone=alone, error=f"{type(error).__name__}: {error}"[:300])
            if alone and classify(error) is not Trouble.DATA:
                raise  # a bug of ours, which may meet every turn: each that it costs shall cost time
            return 0
        for ending in endings:
            self._endings.pop(key_of(ending.item), None)
        for name in ready:
            self._ready.pop(name, None)
        self._told()
        self._count(turn)
        for fact in turn.facts:
            self._publisher.post(fact)
        for item in turn.items:
            if self._may_be_lost(turn):
                self.settle(Ending(item, "written_back", error="we stood still between its claim and its delivery"))
            else:
                self._start(item)
        return 0 if self._endings or self._ready else self._settings.sweep_s

    @staticmethod
    def _count(turn: Turn) -> None:
        STARVATION_TURNS.inc(turn.starved)
        for reason in turn.requeued:
            REQUEUES.labels(reason).inc()
        for item in turn.items:
            if item.delivery_no == 1:
                WAITED.labels(item.priority.value).observe(max(0.0, item.dispatched_at - item.enqueued_at))

    def _part(self, endings: Sequence[Ending], ready: Sequence[str], *, alone: bool, error: str) -> None:
        """One of these cannot be written: repeat them one by one, and let go of what fails alone (B-08).

        Nothing is lost with it: the row of an ending is still ours, so `reread` writes it back; a sweep names the
        workspace again. There is no pause for data: five hundred of them would keep everybody else's for an hour.
        """
        if not alone:
            log.warning("turn_repeated_singly", error=error)
            self._singly = len(endings) + len(ready)
            return
        for ending in endings:
            log.error("ending_dropped", queue_id=str(ending.item.queue_id), error=error)
            self._endings.pop(key_of(ending.item), None)
        for name in ready:
            log.error("claim_failed", workspace_id=name, error=error)
            self._ready.pop(name, None)

    def _may_be_lost(self, turn: Turn) -> bool:
        """Whether another replica may have judged us silent since the claim, and have delivered what we would now."""
        settings = self._settings
        return time.monotonic() - turn.claimed_at >= settings.owner_silent_s - settings.owner_beat_s

    async def _turn(
        self, connection: Connection, endings: Sequence[Ending], ready: Sequence[str], room: int, now: datetime | None
    ) -> Turn:
        names = {ending.item.workspace_id for ending in endings} | set(ready)
        before = await store.lock(connection, names, now)
        moment, after = before.now, dict(before)
        settled = await settle(connection, endings, before, self._settings)
        ended = await store.finish(connection, settled)
        returned = await store.requeue(connection, settled)
        for each in settled:
            row = ended.get(each.item.queue_id) or returned.get(each.item.queue_id)
            if row is not None:  # else it was taken from us: whoever has it settles it
                name = each.item.workspace_id
                after[name] = account(after[name], each, row, moment)
        absorbed = await fires.absorb(connection, returned.values(), after)
        after = absorbed.workspaces
        spare: dict[str, int] = {}
        for name in sorted(after):
            free = min(room, decide.spare(after[name], moment))
            if free > 0:
                spare[name] = free
                room -= free
        claimed_at = time.monotonic()
        limit_s = self._settings.starvation_limit_s
        claimed = await store.claim(
            connection, spare, after, self._settings.replica_id, now, starvation_limit_s=limit_s
        )
        items = await fires.with_prompts(connection, [item for mine in claimed.values() for item in mine.items])
        for name, mine in claimed.items():
            after[name] = begin(after[name], mine)
        await store.save_counters(connection, before, after)
        told = [*ends(settled, ended), *absorbed.facts]
        if told:
            await outbox.add(connection, told)
        moved = {name: workspace for name, workspace in after.items() if workspace != before[name]}
        backlogs = await read_backlogs(connection, moved, moment)
        begun = [
            ItemChanged(
                workspace_id=item.workspace_id,
                rev=item.rev,
                queue_id=item.queue_id,
                status=ItemStatus.DISPATCHED,
                delivery_no=item.delivery_no,
            )
            for item in items
        ]
        starved = sum(each.starved for each in claimed.values())
        requeued = [each.fate.reason or "" for each in settled if each.item.queue_id in returned]
        return Turn(items, [*begun, *backlogs], claimed_at, starved=starved, requeued=requeued)

    def _start(self, item: Item) -> None:
        name = item.workspace_id
        delivery = Delivery(self._agents, self._settings, item, last_life=lambda: self._beats.get(name, 0.0))
        task = asyncio.create_task(self._deliver(delivery), name=f"delivery-{item.queue_id}")
        self.running[key_of(item)] = (delivery, task)
        RUNNING.set(len(self.running))

    async def _deliver(self, delivery: Delivery) -> None:
        item = delivery.item
        began = time.perf_counter()
        try:
            ending = await delivery.run(self._task_known)
        except asyncio.CancelledError:
            ending = Ending(item, "written_back")
            if not self._stopping:  # fenced off: somebody else has it
                return
        except Exception as error:  # noqa: BLE001 - a bug of ours must not strand the item: the agent may have it
            log.exception("delivery_failed", queue_id=str(item.queue_id))
            ending = Ending(item, "unknown", error=f"{type(error).__name__}")
        finally:
            self.running.pop(key_of(item), None)
            RUNNING.set(len(self.running))
        DELIVERIES.labels(ending.reply).inc()
        WAIT.observe(time.perf_counter() - began)
        log.info(
            "delivery_ended",
            queue_id=str(item.queue_id),
            workspace_id=item.workspace_id,
            delivery_no=item.delivery_no,
            outcome=ending.reply,
            error=ending.error,
        )
        if (fact := self._evidence.of(ending)) is not None:
            self._publisher.post(fact)
        self.settle(ending)

    async def _task_known(self, item: Item, task_id: str, *, goes_on: bool) -> None:
        await self._pool.fetchval(SQL["set_agent_task"], item.queue_id, item.delivery_no, task_id, goes_on)

    def close(self) -> None:
        """Claim nothing more from now on."""
        self._stopping = True

    async def stop(self, within_s: float) -> None:
        """Claim nothing more, wait for what runs, write the rest back with the tasks that their agents accepted."""
        self.close()
        async with self._one_turn:  # what a turn under way has claimed begins before we look
            tasks = [task for _, task in self.running.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._ready.clear()
        deadline = time.monotonic() + _WRITE_BACK_S
        attempt = 0
        while self._endings and time.monotonic() < deadline:
            try:
                await self.run_once()
            except Exception as error:  # noqa: BLE001 - an answer in memory is worth another try
                log.warning("write_back_repeated", error=f"{type(error).__name__}: {error}"[:300])
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1


def key_of(item: Item) -> tuple[str, int]:
    return (str(item.queue_id), item.delivery_no)


def _one_each(endings: Iterable[Ending]) -> list[Ending]:
    """The first ending of each item: what an earlier delivery of it came to is not mixed up with a later one's."""
    first: dict[UUID, Ending] = {}
    for ending in endings:
        first.setdefault(ending.item.queue_id, ending)
    return list(first.values())
