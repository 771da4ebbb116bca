"""The end of sessions on real tables, against what is really so: snapshots, words, kills and crashes in any order.

Postgres has the test's time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from shared.facts import BacklogSnapshot, Fact, GateClosed, SessionGate, SessionKill
from tests.chaos.kit.machine import STEPS_EACH, run_machine, steps_of
from tests.chaos.kit.session_world import CEILING_S, Agent, Judge, Turn
from tests.conftest import Stack
from tests.integration.ender_kit import EMPTY, Replica, Supervisors, supervised

STEPS = steps_of(500)
some = st.integers(0, 7)
moments = st.sampled_from([0.5, 3.0, 9.0, 11.0, 20.0, 31.0, 75.0, 130.0])


HAPPENS = (
    [("a session begins", None)] * 5 + [("a session begins", own_s) for own_s in (0.0, 30.0, 400.0)]
    + [("a session ends", None)] * 3 + [("an owner is cut off, or is back", None)] * 2 + [("another life", None)]
    + [("foreign work", tasks) for tasks in (0.0, 0.0, 0.0, 1.0, 2.0)] + [("a beat", None)] * 3
    + [("another ceiling", ceiling_s) for ceiling_s in (CEILING_S, CEILING_S, CEILING_S, 50.0, 300.0, 0.0)]
)  # fmt: skip


class SessionMachine(RuleBasedStateMachine):
    """Two workspaces, one of them where nobody can end a container; two replicas of scheduler."""

    supervisors: ClassVar[Supervisors]
    loop: ClassVar[asyncio.AbstractEventLoop]
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.agents = {"w": Agent("w", is_external=False), "x": Agent("x", is_external=True)}
        self.judge = Judge()
        self.numbers = iter(range(1_000_000))
        self.snapshots: list[BacklogSnapshot] = []
        self.gate_words: list[GateClosed] = []
        self.orders: dict[Any, SessionKill] = {}
        self.answers: list[tuple[str, str]] = []

    @property
    def sup(self) -> Supervisors:
        return self.supervisors

    def run(self, step: Coroutine[Any, Any, None]) -> None:
        type(self).steps += 1
        self.loop.run_until_complete(step)

    def agent(self, which: int) -> Agent:
        return list(self.agents.values())[which % 4 == 3]

    # ── what really happens ──────────────────────────────────────────────────────────────────────────────────────────

    @initialize(own=st.sampled_from([None, None, 30.0]))
    def empty(self, own: float | None) -> None:
        """Not all rules are in each run: here is somebody to begin with."""
        self.run(self._empty())
        for agent in self.agents.values():
            self.something_happens(3 * (agent.name == "x"), 0, ("a session begins", own))

    async def _empty(self) -> None:
        await self.sup.pool.execute(EMPTY)
        for by in range(2):
            await self._replace(by)
        await self.sup.until(0)
        for agent in self.agents.values():
            await self._allow(agent)

    @rule(which=some, one=some, what=st.sampled_from(HAPPENS))
    def something_happens(self, which: int, one: int, what: tuple[str, float | None]) -> None:
        agent, (kind, value) = self.agent(which), what
        turns = [agent.turns[name] for name in sorted(agent.turns)]
        match kind:
            case "a session begins" if not agent.gate.is_closed(self.sup.now_s) and len(turns) < 3:
                session_id = f"q{next(self.numbers)}:1"
                agent.turns[session_id] = Turn(session_id, self.sup.now_s, value)
            case "a session ends" if turns:
                del agent.turns[turns[one % len(turns)].session_id]
            case "an owner is cut off, or is back" if turns:
                turns[one % len(turns)].is_hidden ^= True
            case "foreign work":
                agent.foreign = int(value or 0)
            case "another life":
                agent.life += 1
                for turn in turns:
                    turn.is_over = True  # their owners do not know it yet
                self.run(self._allow(agent))
            case "another ceiling":
                agent.ceiling_s = value or 0.0
                self.run(self._allow(agent))
            case _:
                agent.beat_s = self.sup.now_s

    async def _allow(self, agent: Agent) -> None:
        await self.sup.allow(agent.name, agent.life, session_ceiling_s=agent.ceiling_s)

    @rule(which=some, verb=st.sampled_from(["stop", "checkpoint"]))
    def an_operator_commands(self, which: int, verb: str) -> None:
        if which < 5:  # rarely
            self.run(self._command(self.agent(which), verb))

    async def _command(self, agent: Agent, verb: str) -> None:
        await self.sup.ask(verb, name=agent.name)
        if verb == "stop":
            rows = self.judge.rows.values()
            self.judge.by_hand |= {
                row["session_id"] for row in rows if row["workspace_id"] == agent.name and row["ended_at"] is None
            }
        await self._looked(self.sup.said(), lost=False)

    # ── what the scheduler hears and does ────────────────────────────────────────────────────────────────────────────

    @rule(by=some, passed=moments)
    def time_passes_and_a_replica_turns(self, by: int, passed: float) -> None:
        self.run(self._turn(by % 2, passed))

    @rule(by=some, passed=moments)
    def a_replica_dies_between_its_commit_and_what_it_tells(self, by: int, passed: float) -> None:
        self.run(self._turn(by % 2, passed, lost=True))

    @rule(passed=moments)
    def both_replicas_turn_at_once(self, passed: float) -> None:
        self.run(self._turn(None, passed))

    @rule(by=some, old=st.sampled_from([False, False, False, True]))
    def a_snapshot_comes(self, by: int, old: bool) -> None:
        self.run(self._snapshot(by % 2, old=old))

    @rule(by=some, beats=st.booleans(), ends=st.integers(0, 20), steps=st.integers(3, 8))
    def all_goes_its_way_for_a_while(self, by: int, beats: bool, ends: int, steps: int) -> None:
        """Snapshots come, replicas turn, and the gate answers: most sessions come to their end like this."""
        self.run(self._way(by % 2, steps, beats=beats, ends=ends, kills=True))

    async def _way(self, by: int, steps: int, *, beats: bool, ends: int, kills: bool) -> None:
        for step in range(steps):
            await self.sup.until(self.sup.now_s + 20.0)
            for agent in self.agents.values():
                agent.beat_s = self.sup.now_s if beats else agent.beat_s
                if step == ends and agent.turns:
                    agent.turns.popitem()
            await self._snapshot(by, old=False)
            if kills and self.orders and (step + by) % 3 == 0:
                await self._kill(next(iter(self.orders.values())))
            await self._shut(old=None)
            await self._turn(by, 0.001)

    @rule(by=some, passed=st.sampled_from([0.5, 3.0, 130.0]))
    def a_session_ends_while_its_order_is_on_its_way(self, by: int, passed: float) -> None:
        """Then another begins, as soon as the gate lets it, and liveness comes to it."""
        if not self.orders:
            self.run(self._way(by % 2, 8, beats=True, ends=-1, kills=False))
        for kill in list(self.orders.values())[:1]:
            self.seen["ended under an order"] += 1
            agent = self.agents[kill.workspace_id]
            agent.turns.pop(kill.session_id, None)
            self.run(self._later(by % 2, passed))
            self.something_happens(3 * (agent.name == "x"), 0, ("a session begins", None))
            if kill.order_id in self.orders:
                self.run(self._kill(kill))

    @rule(by=some, which=some, begun=st.booleans())
    def an_owner_is_cut_off_for_a_moment(self, by: int, which: int, begun: bool) -> None:
        """Its session leaves the gate, another may begin, and it is there again with the old word of the gate."""
        agent = self.agent(which)
        turns = list(agent.turns.values())[:1]
        self.run(self._later(by % 2, 1.0))
        agent.beat_s = self.sup.now_s
        self.gate_words += self._words()  # on their way
        for turn in turns:
            turn.is_hidden = True
        self.run(self._later(by % 2, 1.0))
        if begun:
            self.something_happens(which, 0, ("a session begins", None))
        for turn in turns:
            turn.is_hidden = False
        self.run(self._later(by % 2, 1.0))
        for old in (0, 1, 2):
            self.run(self._shut(old=old))
        self.run(self._turn(by % 2, 0.5))

    async def _later(self, by: int, passed: float) -> None:
        await self._turn(by, passed)
        await self._snapshot(by, old=False)

    @rule(old=st.sampled_from([None, None, 0, 1, 3]))
    def the_gate_says_that_it_is_closed(self, old: int | None) -> None:
        """Now, or as it was a while ago: late, said twice, of an older closing."""
        self.run(self._shut(old=old))

    @rule(which=some)
    def liveness_carries_out_an_order(self, which: int) -> None:
        if self.orders:
            self.run(self._kill(list(self.orders.values())[which % len(self.orders)]))

    @rule(which=some)
    def liveness_says_it_again(self, which: int) -> None:
        if self.answers:
            session_id, result = self.answers[which % len(self.answers)]
            self.run(self._answered(session_id, result))

    # ── how ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _turn(self, by: int | None, passed: float, *, lost: bool = False) -> None:
        await self.sup.until(self.sup.now_s + passed)
        said = await self.sup.turn_all() if by is None else await self.sup.turn(by)
        if by is None:
            said += await self.sup.turn()
        if lost and by is not None:
            self.seen["lost"] += bool(said)
            await self._replace(by)
        await self._looked(said, lost=lost)
        self.judge.turned(self.agents, self.sup.now_s)

    async def _replace(self, by: int) -> None:
        self.sup.replicas[by] = Replica(self.sup.settings, self.sup.pool)

    async def _looked(self, said: list[Fact], *, lost: bool) -> None:
        """Hold what was said and written against what is so."""
        before = self.judge.rows
        for kill in await self.sup.kills():
            self.seen["ordered"] += 1
            assert kill.order_id not in self.judge.doomed, "each order has an id of its own"
            agent = self.agents[kill.workspace_id]
            self.judge.ordered(kill, before[kill.session_id], agent, self.sup.now_s)
            self.orders[kill.order_id] = kill
        if self.orders:
            await self.sup.pool.execute("DELETE FROM outbox")
        rows = await self.sup.pool.fetch("SELECT * FROM sessions")
        self.judge.moved([dict(row) for row in rows], self.agents, self.sup.now_s)
        self.judge.said(said, {name for name, row in before.items() if row["ended_at"] is not None})
        for row in rows:
            was = before.get(row["session_id"])
            if was is None or (was["state"], was["end_reason"]) != (row["state"], row["end_reason"]):
                self.seen[row["end_reason"] or row["state"]] += 1
        if not lost:
            for fact in said:
                if isinstance(fact, SessionGate):
                    self.agents[fact.workspace_id].gate.hear(fact, self.sup.now_s)

    async def _snapshot(self, by: int, *, old: bool) -> None:
        if old and self.snapshots:
            fact = self.snapshots[-2:][0]
        else:
            fact = self.sup.made(*(agent.shown() for agent in self.agents.values()))
            self.snapshots.append(fact)
        await self.sup.replicas[by].sessions.snapshots([fact])
        await self._turn(by, 0.0)

    async def _shut(self, *, old: int | None) -> None:
        if old is None:
            facts = self._words()
            self.gate_words += facts
        else:
            facts = self.gate_words[-1 - old :][:1]
        if facts:
            await self.sup.hear_shut(*facts)
        for fact in facts:
            self.judge.heard(fact)

    def _words(self) -> list[GateClosed]:
        """Of each session for which a gate is closed."""
        return [
            self.sup.shutting(session_id, **word)
            for agent in self.agents.values()
            for session_id in sorted(agent.gate.until_s)
            if (word := agent.word(session_id, self.sup.now_s)) is not None
        ]

    async def _kill(self, kill: SessionKill) -> None:
        del self.orders[kill.order_id]
        agent = self.agents[kill.workspace_id]
        if kill.expires_at <= self.sup.now:
            self.seen["expired"] += 1
            return
        if kill.incarnation < agent.life:
            await self._answered(kill.session_id, "stale")
        elif agent.is_external:
            agent.foreign += agent.turns.pop(kill.session_id, None) is not None  # its owner hangs up, and it goes on
            await self._answered(kill.session_id, "not_killable")
        else:
            self.judge.carried_out(kill, agent)
            self.seen["carried out"] += 1
            agent.life += 1
            agent.turns, agent.foreign = {}, 0
            await self._answered(kill.session_id, "applied")

    async def _answered(self, session_id: str, result: str) -> None:
        self.answers.append((session_id, result))
        said = await self.sup.killed(result, session_id)
        await self._looked(said, lost=False)


@pytest.mark.timeout(600)
def test_whatever_comes_in_whatever_order_sessions_end_as_they_must(stack: Stack) -> None:
    """I6; C-K2 C-K4 C-K5 C-K9: and never does a kill hit what was not in flight when it was ordered."""
    run_machine(SessionMachine, "supervisors", supervised(stack), steps=STEPS, each=STEPS_EACH)
    assert SessionMachine.seen["stop_sent"] > 0
