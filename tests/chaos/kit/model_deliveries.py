"""What replicas do with what waits: turns, answers of agents, sweeps, rereads, expiry."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import asyncpg
from hypothesis import strategies as st
from hypothesis.stateful import rule

from services.queue.metrics import RECONCILED
from shared.facts import Priority
from tests.chaos.kit.model import Reply
from tests.chaos.kit.model_base import ROWS, SEATS, some
from tests.chaos.kit.model_clock import moment
from tests.chaos.kit.model_messages import MESSAGE, Messages
from tests.chaos.kit.model_rig import ANSWERS, WORDS, Replica

ANSWER = st.tuples(some, st.sampled_from([*sorted(ANSWERS), "preempted", "preempted", "failed_attempt", "delivered"]))


class Deliveries(Messages):
    """Turns, and what comes back."""

    @rule(by=some, answers=st.lists(ANSWER, max_size=3), confirmed=st.sampled_from([True] * 5 + [False]))
    def turn(self, by: int, answers: list[tuple[int, str]], confirmed: bool) -> None:
        self.run(self.turned(self.pick(by), answers, confirmed=confirmed))

    @rule(by=some, batch=st.lists(MESSAGE, max_size=3), answers=st.lists(ANSWER, min_size=1, max_size=4))
    def work(self, by: int, batch: list[dict[str, Any]], answers: list[tuple[int, str]]) -> None:
        """Messages come, what may be claimed is, and some of it is answered; twice."""
        self.run(self._worked(self.pick(by), batch, answers))

    @rule(
        by=some, index=some, batch=st.lists(MESSAGE, min_size=3, max_size=6), urgent=st.integers(0, 2),
        seconds=st.sampled_from([0.0, 30.0, 130.0]), answers=st.lists(ANSWER, min_size=2, max_size=5),
    )  # fmt: skip
    def rush(
        self, by: int, index: int, batch: list[dict[str, Any]], urgent: int, seconds: float, **more: Any
    ) -> None:  # fmt: skip
        """Many messages for one workspace, the first of them CRITICAL, and time passes before they get their turn."""
        specs = [
            {**spec, "seat": index % 2, "waits_s": None, "again": None}
            | ({"priority": Priority.CRITICAL} if number < urgent else {})
            for number, spec in enumerate(batch)
        ]

        async def rushes() -> None:
            replica = self.pick(by)
            await self.kept(replica, self.messages(specs))
            self.clock.ahead_s += seconds
            await self.beaten(replica, self.seat(index), active=0)
            await self._worked(replica, [], **more)

        self.run(rushes())

    async def _worked(self, replica: Replica, batch: list[dict[str, Any]], answers: list[tuple[int, str]]) -> None:
        if batch:
            await self.kept(replica, self.messages(batch))
        await self.swept(replica)
        await self.turned(replica, [])
        await self.turned(replica, answers)
        await self.turned(replica, answers[:1])

    async def turned(self, replica: Replica, answers: list[tuple[int, str]], *, confirmed: bool = True) -> None:
        for index, said in answers:
            await self._answered(replica, index, said)
        endings, ready = replica.endings(), replica.ready()
        if not endings and not ready:
            await replica.drain.run_once()
            return
        now = await self.rig.turn(replica, confirmed=confirmed)
        replies = [
            Reply(
                each.item.queue_id,
                each.item.delivery_no,
                each.reply,
                each.item.at_most_once,
                each.retry_after_s,
                each.task_canceled,
            )
            for each in endings
        ]
        self.model.settle(replies, now)
        rows = await self.observe(now)
        looked_at = {ending.item.workspace_id for ending in endings} | set(ready)
        numbers = {queue_id: item.delivery_no for queue_id, item in self.model.items.items()}
        claimed = {row["queue_id"] for row in rows if row["delivery_no"] > numbers[row["queue_id"]]}
        self.model.claim(looked_at, now, replica.name, claimed)
        self.seen["claimed"] += len(claimed)

    async def _answered(self, replica: Replica, index: int, said: str) -> None:
        keys = sorted(replica.drain.running)
        if not keys:
            return
        key = keys[index % len(keys)]
        item = self.model.items[UUID(key[0])]
        about_task = self.rig.agents.parked[key].about_task
        await self.rig.answer(replica, key, said)
        if said == "accepted" and not about_task and (item.status, item.delivery_no) == ("dispatched", key[1]):
            item.task = "t"
        ending = replica.drain._endings.get(key)
        if ending is not None and ending.reply != "owner_died":
            assert ending.reply == ("unknown" if said == "no_such_task" and about_task else WORDS.get(said, said)) or (
                said == "no_such_task" and ending.reply == "refused"
            ), (said, ending)
            self.seen[ending.reply] += 1

    async def observe(self, now: float) -> list[asyncpg.Record]:
        """Read the waits that were drawn by lot, and hold them against their bounds; the rows in which they are."""
        rows = await self.rig.pool.fetch(ROWS, self.names)
        for row in rows:
            item = self.model.items[row["queue_id"]]
            if item.waits is not None:
                item.not_before, item.waits = _within(row["not_before"], item.waits, now), None
        for row in await self.rig.pool.fetch(SEATS, self.names):
            seat = self.model.seat(row["workspace_id"])
            if seat.shuts is not None:
                seat.shut_until, seat.shuts = _within(row["not_before"], seat.shuts, now), None
        return rows

    async def reread(self, replica: Replica) -> None:
        held = dict(replica.drain.running)
        in_hand = held.keys() | replica.drain._endings.keys()
        now = await self.rig.tick()
        await replica.loops.reread()
        owned = {
            (str(item.queue_id), item.delivery_no): item
            for item in self.model.items.values()
            if item.status == "dispatched" and item.owner == replica.name
        }
        let_go = {
            key: self.model.let_go(owned[key], now, is_followed=held[key][0].task_id is not None)
            for key in held.keys() & owned.keys()
        }
        gone = [task for key, (_, task) in held.items() if key not in owned or let_go[key] is not None]
        await asyncio.gather(*gone, return_exceptions=True)
        for key, reply in let_go.items():
            assert reply is None or replica.drain._endings[key].reply == reply, "it has come to what §2 says"
        orphans = owned.keys() - in_hand
        adopted = orphans & self.orphans.get(replica.name, set())
        self.orphans[replica.name] = orphans
        assert adopted <= replica.drain._endings.keys(), "a claim that was never confirmed goes back"
        self.seen["adopted"] += len(adopted)
        stay = {key for key, reply in let_go.items() if reply is None}
        assert replica.drain.running.keys() == stay, "a row is let go that is no longer ours, or that nothing else ends"
        for key, (delivery, _) in replica.drain.running.items():
            assert delivery.item.cancel_requested or not owned[key].cancel, "a cancel reaches who delivers"
            assert delivery._stop_asked or owned[key].stop is None, "so does a stop"

    async def swept(self, replica: Replica) -> None:
        before = RECONCILED._value.get()
        await replica.loops.sweep()
        assert RECONCILED._value.get() == before, "the counters never needed a correction"

    async def expired(self, replica: Replica) -> None:
        now = await self.rig.tick()
        await replica.loops.end_due(moment(now))
        self.model.expire(now)


def _within(until: float | None, bounds: tuple[float, float], now: float) -> float:
    least, most = bounds
    assert until is not None, f"it was told to wait {least} s at least"
    assert now + least - 1e-3 <= until <= now + most + 1e-3, f"{until - now} s, where {least} to {most} are due"
    return until
