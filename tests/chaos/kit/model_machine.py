"""The queue's machine: what may happen to it, in any order; `Base` says what must hold after every step."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from shared.facts import MessageBusy
from tests.chaos.kit.model import Reply
from tests.chaos.kit.model_base import some
from tests.chaos.kit.model_messages import MESSAGE
from tests.chaos.kit.model_rig import ANSWERS, Replica
from tests.chaos.kit.model_seat import Seat
from tests.chaos.kit.model_sessions import Endings

WHAT = [
    "join", "crash", "freeze", "stall", "stall", "unconfirmed", "pause", "pause", "judge", "judge", "young", "deploy",
    "reread", "reread", "expire",
]  # fmt: skip


class QueueMachine(Endings):
    """Facts, turns, answers, commands, stops and deaths in any order; `holds` after each."""

    @initialize(
        maxima=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        replicas=st.integers(1, 3),
        batch=st.lists(MESSAGE, min_size=1, max_size=6),
    )
    def begin(self, maxima: tuple[int, int], replicas: int, batch: list[dict[str, Any]]) -> None:
        async def begins() -> None:
            await self.rig.empty()
            for _ in range(replicas):
                await self._join()
            for number, maximum in enumerate(maxima):
                await self.registered(self.pick(0), self.seat(number), maximum=maximum)
            await self.kept(self.pick(1), self.messages(batch))

        self.run(begins())

    @rule(
        by=some,
        what=st.sampled_from(WHAT),
        words=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=2, max_size=4),
        batch=st.lists(MESSAGE, min_size=1, max_size=2),
    )
    def live(self, by: int, what: str, words: list[str], batch: list[dict[str, Any]]) -> None:
        """A replica comes, goes, stalls, judges, or does something by the clock."""
        replica = self.pick(by)
        steps: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "join": self._join,
            "crash": lambda: self._crash(replica),
            "freeze": lambda: self._freeze(replica),
            "unconfirmed": lambda: self._unconfirmed(replica),
            "pause": lambda: self._pause(replica, self.seat(by), self.messages(batch), stays=len(words) == 2),
            "stall": lambda: self._stall(replica, self.pick(by + 1), [(0, word) for word in words]),
            "judge": lambda: self._judge(replica, ripe=True),
            "young": lambda: self._judge(replica, ripe=False),
            "deploy": lambda: self._deploy(replica),
            "reread": lambda: self.reread(replica),
            "expire": lambda: self.expired(replica),
        }
        few, many = len(self.replicas) == 1, len(self.replicas) == 4
        what = {"crash": "deploy"}.get(what, what) if few else {"join": "crash"}.get(what, what) if many else what
        self.seen[what] += 1
        self.run(steps[what]())

    @rule(by=some, seconds=st.sampled_from([0.5, 3.0, 10.0, 16.0, 70.0, 200.0]), expire=st.booleans())
    def pass_time(self, by: int, seconds: float, expire: bool) -> None:
        self.clock.ahead_s += seconds
        if expire:
            self.run(self.expired(self.pick(by)))
        else:
            type(self).steps += 1

    async def _pause(self, replica: Replica, seat: Seat, meanwhile: list[MessageBusy], *, stays: bool) -> None:
        """While a workspace is paused, nothing in it ends by the clock; nor at once when it goes on."""
        await self.registered(replica, seat, maximum=2, paused=True)
        self.clock.ahead_s += 200
        await self.expired(replica)
        await self.kept(replica, meanwhile)
        self.clock.ahead_s += 70
        if not stays:
            await self.registered(replica, seat, maximum=2)
            await self.expired(replica)

    # ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _unconfirmed(self, replica: Replica) -> None:
        """A claim commits, and its replica does not hear of it."""
        await self.swept(replica)
        await self.turned(replica, [], confirmed=False)
        await self.reread(replica)
        await self.reread(replica)

    async def _join(self) -> None:
        self.replicas.append(await self.rig.replica())

    async def _freeze(self, replica: Replica) -> None:
        """It is silent for a while; what it holds goes on."""
        self.silent.add(replica.name)
        await self.rig.silence([replica.name])

    async def _stall(self, replica: Replica, judge: Replica, answers: list[tuple[int, str]]) -> None:
        """What it held is taken from it and claimed again, perhaps by itself, while it still has it in hand."""
        await self.swept(replica)
        await self.turned(replica, [])
        await self._freeze(replica)
        self.clock.ahead_s += 100  # longer than anybody's word about the agent is believed
        await self._judge(judge, ripe=True)
        await self.turned(judge, [])
        await self.swept(replica)
        await self.turned(replica, [])
        await self.turned(replica, answers)

    async def _crash(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.silent.add(replica.name)
        await self.rig.crash(replica)
        await self.rig.silence([replica.name])

    async def _judge(self, replica: Replica, *, ripe: bool) -> None:
        await self.rig.tick()
        await self.rig.alive([each.name for each in self.replicas if each.name not in self.silent])
        await self.rig.ripen(replica.name) if ripe else await self.rig.silence([replica.name])
        before = set(replica.drain._endings)
        async with self.rig.long_ago(self.silent - {replica.name}):
            await replica.loops.beat()
        self.silent.discard(replica.name)
        lost = {
            (str(item.queue_id), item.delivery_no)
            for item in self.model.items.values()
            if item.status == "dispatched" and item.owner in self.silent and item.owner != replica.name
        }
        assert set(replica.drain._endings) == before | (lost if ripe else set()), (
            "who is silent has lost its deliveries"
        )
        self.seen["lost"] += len(lost) if ripe else 0

    async def _deploy(self, replica: Replica) -> None:
        while replica.endings():
            await self.turned(replica, [])
        held = [(UUID(queue_id), number) for queue_id, number in replica.drain.running]
        now = await self.rig.tick()
        await replica.drain.stop(0.0)
        self.model.settle([Reply(*key, "written_back", at_most_once=False) for key in held], now)
        await self.observe(now)
        await replica.loops.leave()
        self.silent.add(replica.name)
        self.replicas[self.replicas.index(replica)] = await self.rig.replica()

    # ── and in the end everything that was accepted ends ─────────────────────────────────────────────────────────────

    def teardown(self) -> None:
        if self.is_whole:
            self.loop.run_until_complete(self._heal())

    async def _heal(self) -> None:
        for replica in list(self.replicas):
            await self._crash(replica)
        self.replicas = [await self.rig.replica()]
        (last,) = self.replicas
        for _ in range(40):
            self.clock.ahead_s += 100
            for name in self.names:
                await self.declared(last, self.model.seat(name), "online")
                await self.registered(last, self.model.seat(name), maximum=30)
                await self.beaten(last, self.model.seat(name), active=0)
            await self._judge(last, ripe=True)
            await self.swept(last)
            await self.expired(last)
            await self.turned(last, [])
            await self.turned(last, [(0, "delivered")] * len(last.drain.running))
            await self.check()
            if not any(item.is_active for item in self.model.items.values()):
                return
        raise AssertionError("I1: with healthy agents everything that was accepted comes to an end")
