"""The queue's machine: what may happen to it, in any order, and what must hold after every step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from uuid_utils.compat import uuid7

from services.queue.metrics import RECONCILED
from shared.facts import (
    Ended,
    MessageBusy,
    Priority,
    ProxyBeat,
    QueueQuery,
    Running,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from tests.chaos.kit.model import Beat, Item, Model, Proxy, Reply, Seat
from tests.chaos.kit.model_rig import ANSWERS, WORDS, Clock, Replica, Rig, moment
from tests.integration.queue_kit import digest

ROWS = """
SELECT queue_id, workspace_id, status, delivery_no, attempts, deaths, owner, agent_task_id, lane, rank_ms,
  cancel_at IS NOT NULL AS cancel, extract(epoch FROM not_before)::float8 AS not_before,
  extract(epoch FROM give_up_at)::float8 AS give_up_at
FROM a2a_queue WHERE workspace_id = ANY($1::text[])"""
FINISHED = """
SELECT queue_id, workspace_id, status, reason, delivery_no, attempts, md5(f::text) AS digest
FROM a2a_finished f WHERE workspace_id = ANY($1::text[])"""
SEATS = """
SELECT workspace_id, waiting, running, extract(epoch FROM not_before)::float8 AS not_before
FROM workspaces WHERE workspace_id = ANY($1::text[])"""
TOLD = """
SELECT id, convert_from(fact, 'UTF8')::jsonb ->> 'queue_id' AS queue_id,
  convert_from(fact, 'UTF8')::jsonb ->> 'status' AS status, convert_from(fact, 'UTF8')::jsonb ->> 'reason' AS reason
FROM outbox WHERE id > $1 ORDER BY id"""

some = st.integers(0, 7)
MESSAGE = st.fixed_dictionaries(
    {
        "seat": st.integers(0, 1),
        "caller": st.sampled_from("ab"),
        "key": st.sampled_from(["k", "l", None, None]),
        "explicit": st.booleans(),
        "body": st.sampled_from("xxxy"),
        "priority": st.sampled_from([Priority.TASK, Priority.TASK, Priority.INFO, Priority.CRITICAL]),
        "read_ago_ms": st.sampled_from([0, 0, 5, 500, 9_000, 30_000]),
        "again": st.sampled_from([None, None, None, None, 0, 1, 5]),
        "expires_in_s": st.sampled_from([None, None, 20, 100]),
        "waits_s": st.sampled_from([None, None, None, 5]),
    }
)
Said = tuple[list[float], list[tuple[float, str]]]
FORWARDS: st.SearchStrategy[Said] = st.just(([], [])) | st.tuples(
    st.lists(st.sampled_from([0.5, 4.0, 20.0]), max_size=2),
    st.lists(
        st.tuples(st.sampled_from([0.2, 3.0, 30.0]), st.sampled_from(["answered", "busy", "unknown"])), max_size=2
    ),
)


class QueueMachine(RuleBasedStateMachine):
    """Facts, turns, answers and deaths in any order; `check` after each."""

    rig: ClassVar[Rig]
    loop: ClassVar[asyncio.AbstractEventLoop]
    steps: ClassVar[int] = 0
    seen: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.model = Clock(), Model()
        self.names = [f"w{number}-{uuid7().hex}" for number in range(2)]
        self.replicas: list[Replica] = []
        self.silent: set[str] = set()
        self.facts: list[MessageBusy] = []
        self.beats: dict[tuple[str, str], list[ProxyBeat]] = {}
        self.revs = dict.fromkeys(self.names, 0)
        self.final: dict[UUID, str] = {}
        self.told: dict[UUID, tuple[str, str | None]] = {}
        self.orphans: dict[str, set[tuple[str, int]]] = {}
        self.told_to = 0
        self.is_whole = False
        """No step has failed: then the end must hold too."""

    def run(self, step: Coroutine[Any, Any, None]) -> None:
        type(self).steps += 1
        self.is_whole = False
        self.loop.run_until_complete(step)
        self.is_whole = True

    def pick(self, index: int) -> Replica:
        return self.replicas[index % len(self.replicas)]

    def seat(self, index: int) -> Seat:
        return self.model.seat(self.names[index % 2])

    @initialize(
        maxima=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        replicas=st.integers(1, 3),
        batch=st.lists(MESSAGE, min_size=1, max_size=6),
    )
    def begin(self, maxima: tuple[int, int], replicas: int, batch: list[dict[str, Any]]) -> None:
        async def begins() -> None:
            await self.rig.empty()
            for _ in range(replicas):
                self.replicas.append(await self.rig.replica())
            for number, maximum in enumerate(maxima):
                await self._register(self.pick(0), self.seat(number), maximum=maximum)
            await self._keep(self.pick(1), self._messages(batch))

        self.run(begins())

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(batch=st.lists(MESSAGE, min_size=1, max_size=4), by=some, beat=st.none() | FORWARDS)
    def keep(self, batch: list[dict[str, Any]], by: int, beat: Said | None) -> None:
        self.run(self._keep(self.pick(by), self._messages(batch, beat)))

    def _messages(self, batch: list[dict[str, Any]], beat: Said | None = None) -> list[MessageBusy]:
        now = self.clock.now()
        facts: list[MessageBusy] = []
        for spec in batch:
            told = None
            if beat is not None and not facts:
                told = self._proxy_beat(self.names[spec["seat"]], "p", beat, now)
            facts.append(self._message(spec, now, [*self.facts, *facts], told))
        self.facts += facts
        return facts

    def _message(
        self, spec: dict[str, Any], now: float, known: list[MessageBusy], told: ProxyBeat | None
    ) -> MessageBusy:
        queue_id = uuid7()
        ago = spec["read_ago_ms"]
        queue_id = UUID(int=queue_id.int - (ago << 80))
        if spec["again"] is not None and known:
            queue_id = known[-1 - spec["again"] % len(known)].queue_id
        key = spec["key"] or str(queue_id)
        return MessageBusy(
            workspace_id=self.names[spec["seat"]],
            rev=1,
            queue_id=queue_id,
            caller_id=spec["caller"],
            caller_hash=digest(spec["caller"]),
            key_hash=digest(f"key:{key}" if spec["explicit"] else key),
            body_hash=digest(spec["body"]),
            explicit_key=spec["explicit"],
            reason="backlog",
            priority=spec["priority"],
            method="message/send",
            body=f'{{"jsonrpc":"2.0","id":1,"method":"message/send","params":"{spec["body"]}"}}'.encode(),
            not_before=moment(now + spec["waits_s"]) if spec["waits_s"] else None,
            expires_at=moment(now + spec["expires_in_s"]) if spec["expires_in_s"] else None,
            beat=told,
            reply_to="door",
        )

    @precondition(lambda self: self.facts)
    @rule(by=some, index=some, count=st.integers(1, 3))
    def redeliver(self, by: int, index: int, count: int) -> None:
        """The broker gives a batch again."""
        at = index % len(self.facts)
        self.run(self._keep(self.pick(by), self.facts[at : at + count], again=True))

    async def _keep(self, replica: Replica, facts: list[MessageBusy], *, again: bool = False) -> None:
        said = self.rig.broker.kept
        said.clear()
        await self.rig.read(MessageBusy, replica.handlers.message_busy, facts)
        expected = []
        for fact in [] if again else sorted(facts, key=lambda fact: (fact.queue_id, fact.fact_id)):
            if fact.beat is not None:
                self._hear_proxy(fact.beat)
            known, refused = self.model.keep(_item(fact), explicit=fact.explicit_key)
            expected.append((fact.queue_id, known, refused))
        answered = sorted((each.queue_id, str(each.duplicate_of), each.conflict) for each in said)
        wanted = sorted((queue_id, str(known), refused) for queue_id, known, refused in expected)
        assert answered == wanted, f"I2: told {answered}, the model {wanted}"

    @precondition(lambda self: self.facts)
    @rule(index=some, by=some, right=st.sampled_from([True, True, True, False]))
    def cancel(self, index: int, by: int, right: bool) -> None:
        self.run(self._cancel(self.pick(by), self.facts[-1 - index % len(self.facts)], right=right))

    async def _cancel(self, replica: Replica, fact: MessageBusy, *, right: bool) -> None:
        query = QueueQuery(
            workspace_id="-", rev=1, query_id=uuid7(), verb="cancel", queue_id=fact.queue_id, reply_to="door",
            caller_hash=fact.caller_hash if right else digest("nobody"), expires_at=moment(time.time() + 60),
        )  # fmt: skip
        await self.rig.read(QueueQuery, replica.answers.query, [query])
        status = self.rig.broker.answered.pop(query.query_id).status
        item = self.model.items[fact.queue_id]
        if not right or item.caller != fact.caller_id:
            assert status == 404
        elif item.status == "queued":
            self.model.end(item, "canceled", "canceled")
            assert status == 200
        elif item.status == "dispatched":
            item.cancel = True
            assert status == 202
        else:
            assert status == (200 if item.status == "canceled" else 409)

    # ── deliveries ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        by=some,
        answers=st.lists(st.tuples(some, st.sampled_from(sorted(ANSWERS))), max_size=3),
        confirmed=st.sampled_from([True] * 5 + [False]),
    )
    def turn(self, by: int, answers: list[tuple[int, str]], confirmed: bool) -> None:
        self.run(self._turn(self.pick(by), answers, confirmed=confirmed))

    @rule(
        by=some,
        batch=st.lists(MESSAGE, max_size=3),
        answers=st.lists(st.tuples(some, st.sampled_from(sorted(ANSWERS))), min_size=1, max_size=4),
    )
    def work(self, by: int, batch: list[dict[str, Any]], answers: list[tuple[int, str]]) -> None:
        """Messages come, what may be claimed is, and some of it is answered; twice."""

        async def works() -> None:
            replica = self.pick(by)
            if batch:
                await self._keep(replica, self._messages(batch))
            await self._sweep(replica)
            await self._turn(replica, [])
            await self._turn(replica, answers)
            await self._turn(replica, answers[:1])

        self.run(works())

    async def _turn(self, replica: Replica, answers: list[tuple[int, str]], *, confirmed: bool = True) -> None:
        for index, said in answers:
            await self._answer(replica, index, said)
        now, began = self.clock.now(), time.time()
        endings, ready = replica.endings(), replica.ready()
        await self.rig.turn(replica, now, confirmed=confirmed)
        replies = [
            Reply(each.item.queue_id, each.item.delivery_no, each.reply, each.item.at_most_once, each.retry_after_s)
            for each in endings
        ]
        self.model.settle(replies, now)
        await self._observe(began, now)
        looked_at = {ending.item.workspace_id for ending in endings} | set(ready)
        rows = await self.rig.pool.fetch(ROWS, self.names)
        numbers = {queue_id: item.delivery_no for queue_id, item in self.model.items.items()}
        claimed = {row["queue_id"] for row in rows if row["delivery_no"] > numbers[row["queue_id"]]}
        self.model.claim(looked_at, now, replica.name, claimed)
        self._count("claimed", len(claimed))

    async def _answer(self, replica: Replica, index: int, said: str) -> None:
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
            self._count(ending.reply)

    async def _observe(self, began: float, now: float) -> None:
        """Read the waits that were drawn by lot, and hold them against their bounds."""
        for row in await self.rig.pool.fetch(ROWS, self.names):
            item = self.model.items[row["queue_id"]]
            if item.waits is not None:
                least, most = item.waits
                assert row["not_before"] is not None, (dict(row), item)
                assert began + least - 0.01 <= row["not_before"] <= time.time() + most + 0.01
                item.not_before, item.waits = row["not_before"], None
        for row in await self.rig.pool.fetch(SEATS, self.names):
            seat = self.model.seat(row["workspace_id"])
            if seat.shuts:
                assert now + 0.04 <= row["not_before"] <= now + 60.01
                seat.shut_until, seat.shuts = row["not_before"], False

    async def _reread(self, replica: Replica) -> None:
        held = dict(replica.drain.running)
        in_hand = held.keys() | replica.drain._endings.keys()
        await replica.loops.reread()
        owned = {
            (str(item.queue_id), item.delivery_no): item
            for item in self.model.items.values()
            if item.status == "dispatched" and item.owner == replica.name
        }
        gone = [task for key, (_, task) in held.items() if key not in owned]
        await asyncio.gather(*gone, return_exceptions=True)
        orphans = owned.keys() - in_hand
        adopted = orphans & self.orphans.get(replica.name, set())
        self.orphans[replica.name] = orphans
        assert adopted <= replica.drain._endings.keys(), "a claim that was never confirmed goes back"
        self._count("adopted", len(adopted))
        assert replica.drain.running.keys() == held.keys() & owned.keys(), "a row that is no longer ours is let go"
        for key, (delivery, _) in replica.drain.running.items():
            assert delivery._cancel_asked or not owned[key].cancel, "a cancel reaches who delivers"

    # ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        by=some,
        what=st.sampled_from(
            [
                "join",
                "crash",
                "freeze",
                "stall",
                "unconfirmed",
                "pause",
                "stall",
                "judge",
                "judge",
                "young",
                "deploy",
                "reread",
                "reread",
                "expire",
            ]
        ),
        words=st.lists(st.sampled_from(sorted(ANSWERS)), min_size=2, max_size=4),
    )
    def live(self, by: int, what: str, words: list[str]) -> None:
        """A replica comes, goes, stalls, judges, or does something by the clock."""
        replica = self.pick(by)
        steps: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "join": self._join,
            "crash": lambda: self._crash(replica),
            "freeze": lambda: self._freeze(replica),
            "unconfirmed": lambda: self._unconfirmed(replica),
            "pause": lambda: self._pause(replica, self.seat(by)),
            "stall": lambda: self._stall(replica, self.pick(by + 1), [(0, word) for word in words]),
            "judge": lambda: self._judge(replica, ripe=True),
            "young": lambda: self._judge(replica, ripe=False),
            "deploy": lambda: self._deploy(replica),
            "reread": lambda: self._reread(replica),
            "expire": lambda: self._expire(replica),
        }
        few, many = len(self.replicas) == 1, len(self.replicas) == 4
        what = {"crash": "deploy"}.get(what, what) if few else {"join": "crash"}.get(what, what) if many else what
        self._count(what)
        self.run(steps[what]())

    async def _pause(self, replica: Replica, seat: Seat) -> None:
        """While a workspace is paused, nothing in it ends by the clock."""
        await self._register(replica, seat, maximum=2, paused=True)
        self.clock.ahead_s += 200
        await self._expire(replica)

    async def _unconfirmed(self, replica: Replica) -> None:
        """A claim commits, and its replica does not hear of it."""
        await self._sweep(replica)
        await self._turn(replica, [], confirmed=False)
        await self._reread(replica)
        await self._reread(replica)

    async def _join(self) -> None:
        self.replicas.append(await self.rig.replica())

    async def _freeze(self, replica: Replica) -> None:
        """It is silent for a while; what it holds goes on."""
        self.silent.add(replica.name)
        await self.rig.silence([replica.name])

    async def _stall(self, replica: Replica, judge: Replica, answers: list[tuple[int, str]]) -> None:
        """What it held is taken from it and claimed again, perhaps by itself, while it still has it in hand."""
        await self._sweep(replica)
        await self._turn(replica, [])
        await self._freeze(replica)
        self.clock.ahead_s += 100  # longer than anybody's word about the agent is believed
        await self._judge(judge, ripe=True)
        await self._turn(judge, [])
        await self._sweep(replica)
        await self._turn(replica, [])
        await self._turn(replica, answers)

    async def _crash(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.silent.add(replica.name)
        await self.rig.crash(replica)
        await self.rig.silence([replica.name])

    async def _judge(self, replica: Replica, *, ripe: bool) -> None:
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
        self._count("lost", len(lost) if ripe else 0)

    async def _deploy(self, replica: Replica) -> None:
        while replica.endings():
            await self._turn(replica, [])
        held = [(UUID(queue_id), number) for queue_id, number in replica.drain.running]
        began, now = time.time(), self.clock.now()
        await replica.drain.stop(0.0)
        self.model.settle([Reply(*key, "written_back", at_most_once=False) for key in held], now)
        await self._observe(began, now)
        await replica.loops.leave()
        self.silent.add(replica.name)
        self.replicas[self.replicas.index(replica)] = await self.rig.replica()

    async def _sweep(self, replica: Replica) -> None:
        before = RECONCILED._value.get()
        await replica.loops.sweep()
        assert RECONCILED._value.get() == before, "the counters never needed a correction"

    async def _expire(self, replica: Replica) -> None:
        now = self.clock.now()
        await replica.loops.end_due(moment(now))
        self.model.expire(now)

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0, 16.0, 70.0, 200.0]))
    def pass_time(self, seconds: float) -> None:
        type(self).steps += 1
        self.clock.ahead_s += seconds

    # ── workspaces ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        by=some,
        index=some,
        maximum=st.integers(1, 3),
        paused=st.sampled_from([False, False, False, True]),
        once=st.sampled_from([False, False, True]),
        give_up_s=st.sampled_from([86_400.0, 120.0]),
        life=st.integers(0, 1),
        gone=st.sampled_from([False, False, False, True]),
        old=st.sampled_from([False, False, True]),
    )
    def register(self, by: int, index: int, *, gone: bool, **said: Any) -> None:
        """The registry says something new, or something old comes late; or that the workspace is gone."""
        replica, seat = self.pick(by), self.seat(index)
        self.run(self._remove(replica, seat) if gone else self._register(replica, seat, **said))

    async def _register(
        self, replica: Replica, seat: Seat, *, maximum: int, paused: bool = False, once: bool = False,
        give_up_s: float = 86_400.0, life: int = 0, old: bool = False,
    ) -> None:  # fmt: skip
        self.revs[seat.name] += 1
        rev = max(0, seat.registry_rev - 1) if old else self.revs[seat.name]
        kind = WorkspaceChanged if rev % 2 else WorkspaceRegistered
        settings = {"delivery": "at_most_once" if once else "at_least_once", "give_up_after_s": give_up_s}
        fact = kind(
            workspace_id=seat.name, rev=rev, incarnation=max(1, seat.incarnation + life), url="http://agent.example",
            max_concurrent_tasks=maximum, settings=settings, paused=paused,
        )  # fmt: skip
        await self.rig.read(kind, replica.handlers.registered, [fact])
        if rev <= seat.registry_rev:
            return
        if fact.incarnation > seat.incarnation:
            seat.beat, seat.shut_until = None, None
        seat.registry_rev, seat.reachable, seat.removed, seat.paused = rev, True, False, paused
        seat.maximum, seat.at_most_once, seat.give_up_after_s = maximum, once, give_up_s
        seat.least_maximum = min(seat.least_maximum, maximum)
        seat.incarnation = max(seat.incarnation, fact.incarnation)

    async def _remove(self, replica: Replica, seat: Seat) -> None:
        self.revs[seat.name] += 1
        seat.registry_rev, seat.removed = self.revs[seat.name], True
        fact = WorkspaceRemoved(workspace_id=seat.name, rev=seat.registry_rev)
        await self.rig.read(WorkspaceRemoved, replica.handlers.removed, [fact])

    @rule(
        by=some, index=some, active=st.sampled_from([0, 0, 0, 1, 1, 3]), life=st.sampled_from([-1, 0, 0, 0, 0, 1]),
        late_s=st.sampled_from([0.0, 0.0, 1.0, 4.0]), cadence_s=st.sampled_from([2.0, 30.0]),
    )  # fmt: skip
    def heartbeat(self, by: int, index: int, **said: Any) -> None:
        self.run(self._heartbeat(self.pick(by), self.seat(index), **said))

    async def _heartbeat(
        self, replica: Replica, seat: Seat, *, active: int, life: int = 0, late_s: float = 0.0, cadence_s: float = 30.0
    ) -> None:
        at = self.clock.now() - late_s
        beat = Beat(max(0, seat.incarnation + life), round(at * 1e6), at, active, cadence_s, at + late_s)
        fact = WorkspaceHeartbeat(
            workspace_id=seat.name, rev=beat.rev, occurred_at=moment(at), incarnation=beat.incarnation,
            active_tasks=active, cadence_s=cadence_s,
        )  # fmt: skip
        await self.rig.read(WorkspaceHeartbeat, replica.handlers.heartbeats, [fact])
        seat.hear(beat)

    @rule(by=some, index=some, proxy=st.sampled_from("pq"), said=FORWARDS, old=st.sampled_from([None, None, 1, 2]))
    def forward(self, by: int, index: int, proxy: str, said: Said, old: int | None) -> None:
        """A proxy tells of its live forwards, or something that it told before comes late."""
        name = self.names[index % 2]
        known = self.beats.get((name, proxy), [])
        if old is not None and known:
            beat = known[-1 - old % len(known)]
        else:
            beat = self._proxy_beat(name, proxy, said, self.clock.now())
        self.run(self.rig.read(ProxyBeat, self.pick(by).handlers.proxy_beats, [beat]))
        self._hear_proxy(beat)

    def _proxy_beat(self, name: str, proxy: str, said: Said, now: float) -> ProxyBeat:
        known = self.beats.setdefault((name, proxy), [])
        running = [Running(session_id=f"s{age}", started_at=moment(now - age)) for age in said[0]]
        ended = [
            Ended(session_id=f"e{age}", outcome=outcome, started_at=moment(now - age - 1), ended_at=moment(now - age))
            for age, outcome in said[1]
        ]
        beat = ProxyBeat(
            workspace_id=name,
            rev=len(known) + 1,
            proxy_id=proxy,
            occurred_at=moment(now),
            forwards=running,
            ended=ended,
        )
        known.append(beat)
        return beat

    def _hear_proxy(self, beat: ProxyBeat) -> None:
        running = [each.started_at.timestamp() for each in beat.forwards]
        ended = [(each.started_at.timestamp(), each.ended_at.timestamp(), each.outcome) for each in beat.ended]
        proxy = Proxy(beat.rev, beat.occurred_at.timestamp(), running, ended)
        self.model.seat(beat.workspace_id).hear_proxy(beat.proxy_id, proxy)

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def holds(self) -> None:
        if self.replicas:
            self.is_whole = False
            try:
                self.loop.run_until_complete(self._check())
            except AssertionError as error:
                error.add_note(self.loop.run_until_complete(self._account()))
                raise
            self.is_whole = True

    async def _account(self) -> str:
        """Both sides of every workspace, for whoever reads a failure."""
        now = self.clock.now()
        lines = [f"now {now}"]
        for row in await self.rig.pool.fetch(
            "SELECT * FROM workspaces WHERE workspace_id = ANY($1::text[])", self.names
        ):
            seat = self.model.seat(row["workspace_id"])
            lines += [f"row   {dict(row)}", f"model {seat}, in use {seat.in_use(now)}, capacity {seat.capacity(now)}"]
        return "\n".join(lines)

    async def _check(self) -> None:
        rows = {row["queue_id"]: row for row in await self.rig.pool.fetch(ROWS, self.names)}
        finished = {row["queue_id"]: row for row in await self.rig.pool.fetch(FINISHED, self.names)}
        assert not rows.keys() & finished.keys(), "I1: an item is in one place"
        assert rows.keys() | finished.keys() == self.model.items.keys(), "I1: nothing appears or disappears"
        for queue_id, item in self.model.items.items():
            if queue_id in rows:
                self._check_row(rows[queue_id], item)
            else:
                self._check_finished(finished[queue_id], item)
        for row in await self.rig.pool.fetch(SEATS, self.names):
            name = row["workspace_id"]
            counted = (len(self.model.of(name, "queued")), len(self.model.of(name, "dispatched")))
            assert (row["waiting"], row["running"]) == counted, "B-06: the counters are the rows"
        await self._check_told()
        assert await self.rig.pool.fetchval("SELECT count(*) FROM dead_letters") == 0

    def _check_row(self, row: asyncpg.Record, item: Item) -> None:
        if item.give_up_at is None:
            item.give_up_at = row["give_up_at"]
            wait_s = self.model.seat(item.workspace).give_up_after_s
            assert abs(row["give_up_at"] - time.time() - wait_s) < 60
        names = ("status", "delivery_no", "attempts", "deaths", "owner", "cancel", "lane", "rank_ms", "not_before")
        found = {name: row[name] for name in names} | {"task": row["agent_task_id"]}
        expected = {name: getattr(item, name) for name in found}
        if item.status == "queued":
            found["cancel"] = expected["cancel"] = None  # a cancel of one that waits ends it: there is none to keep
        _near(found, expected)

    def _check_finished(self, row: asyncpg.Record, item: Item) -> None:
        found = (row["status"], row["reason"], row["delivery_no"], row["attempts"])
        assert found == (item.status, item.reason, item.delivery_no, item.attempts)
        assert self.final.setdefault(item.queue_id, row["digest"]) == row["digest"], "I1: what has ended never changes"

    async def _check_told(self) -> None:
        for row in await self.rig.pool.fetch(TOLD, self.told_to):
            self.told_to = row["id"]
            queue_id = UUID(row["queue_id"])
            assert queue_id not in self.told, "an end is told once"
            self.told[queue_id] = (row["status"], row["reason"])
        ended = {item.queue_id: (item.status, item.reason) for item in self.model.items.values() if not item.is_active}
        assert self.told == ended, "every end is told"

    def _count(self, word: str, times: int = 1) -> None:
        self.seen[word] = self.seen.get(word, 0) + times

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
                await self._register(last, self.model.seat(name), maximum=3)
                await self._heartbeat(last, self.model.seat(name), active=0)
            await self._judge(last, ripe=True)
            await self._sweep(last)
            await self._turn(last, [])
            await self._turn(last, [(0, "delivered")] * len(last.drain.running))
            await self._check()
            if not any(item.is_active for item in self.model.items.values()):
                return
        raise AssertionError("I1: with healthy agents everything that was accepted comes to an end")


def _near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found.items():
        wanted = expected[name]
        same = abs(value - wanted) < 1e-5 if isinstance(value, float) and wanted is not None else value == wanted
        assert same, f"{name}: the row says {value!r}, the model {wanted!r}"


def _item(fact: MessageBusy) -> Item:
    return Item(
        queue_id=fact.queue_id,
        workspace=fact.workspace_id,
        caller=fact.caller_id,
        key=fact.key_hash.hex(),
        body=fact.body_hash.hex(),
        lane=0 if fact.priority is Priority.CRITICAL else 1,
        rank_ms=max(fact.queue_id.int >> 80, (fact.fact_id.int >> 80) - 10_000),
        not_before=fact.not_before.timestamp() if fact.not_before else None,
        expires_at=fact.expires_at.timestamp() if fact.expires_at else None,
    )
