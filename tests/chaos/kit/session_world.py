"""What is really so around the scheduler: agents, what runs in them, the gate as the queue keeps it; and what may be.

It calls nothing of the scheduler. Seconds are those of the test since T0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from shared.facts import Fact, GateClosed, NamedBacklog, Running, SessionDirective, SessionGate, SessionKill
from tests.integration.ender_kit import T0, at, backlog, runs

CADENCE_S = 30.0
FRESH_S = 10.0
CEILING_S = 100.0
ORDER = ("running", "checkpoint_sent", "stop_sent", "kill_ordered")
RETURNS = {("checkpoint_sent", "running"), ("kill_ordered", "stop_sent")}
Row = Mapping[str, Any]


@dataclass(slots=True)
class Turn:
    """A session as its owner has it."""

    session_id: str
    began_s: float
    ceiling_s: float | None
    is_hidden: bool = False
    """Its owner is cut off: nobody sees it."""
    is_over: bool = False
    """The agent that it ran in has another life; its owner does not know that yet."""

    @property
    def running(self) -> Running:
        return runs(self.session_id, self.began_s, ceiling_s=self.ceiling_s)


@dataclass(slots=True)
class Gate:
    """The queue's: closed while somebody is in it whose time is not over."""

    until_s: dict[str, float] = field(default_factory=dict)
    revs: dict[str, int] = field(default_factory=dict)
    generation: int = 0

    def hear(self, fact: SessionGate, now_s: float) -> None:
        if fact.rev <= self.revs.get(fact.session_id, 0):
            return
        self.revs[fact.session_id] = fact.rev
        was_closed = self.is_closed(now_s)
        if not fact.closed:
            self.until_s.pop(fact.session_id, None)
            return
        self.until_s[fact.session_id] = seconds(fact.gate_until)
        self.generation += not was_closed

    def is_closed(self, now_s: float) -> bool:
        return any(until_s > now_s for until_s in self.until_s.values())


@dataclass(slots=True)
class Agent:
    """A workspace."""

    name: str
    is_external: bool
    """Nobody can end its container."""
    life: int = 1
    ceiling_s: float = CEILING_S
    turns: dict[str, Turn] = field(default_factory=dict)
    foreign: int = 0
    beat_s: float | None = None
    gate: Gate = field(default_factory=Gate)

    def shown(self) -> NamedBacklog:
        return backlog(
            *self.in_flight(), name=self.name, incarnation=self.life, foreign=self.foreign,
            beat_at=None if self.beat_s is None else at(self.beat_s),
        )  # fmt: skip

    def in_flight(self) -> list[Running]:
        return [turn.running for turn in self.turns.values() if not turn.is_hidden]

    def word(self, session_id: str, now_s: float) -> dict[str, Any] | None:
        """What the queue says of its gate; None: it is not closed for this session."""
        if self.gate.until_s.get(session_id, 0.0) <= now_s:
            return None
        return {
            "workspace_id": self.name, "incarnation": self.life, "generation": self.gate.generation,
            "moment": at(now_s), "until": at(max(self.gate.until_s.values())), "in_flight": tuple(self.in_flight()),
            "foreign": self.foreign, "beat_at": None if self.beat_s is None else at(self.beat_s),
            "cadence_s": CADENCE_S,
        }  # fmt: skip


def seconds(moment: datetime) -> float:
    return (moment - T0).total_seconds()


@dataclass(slots=True)
class Judge:
    """What has been said and written so far, and what must be true of it."""

    rows: dict[str, Row] = field(default_factory=dict)
    directives: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    words: dict[str, GateClosed] = field(default_factory=dict)
    """The newest of the gate that each open session has heard."""
    by_hand: set[str] = field(default_factory=set)
    """Those that an operator stopped."""
    doomed: dict[Any, set[str]] = field(default_factory=dict)
    """Order → what ran, and could be seen, when it was given."""

    def heard(self, fact: GateClosed) -> None:
        row, known = self.rows.get(fact.session_id), self.words.get(fact.session_id)
        if row is not None and row["ended_at"] is None and (known is None or known.occurred_at < fact.occurred_at):
            self.words[fact.session_id] = fact

    def said(self, facts: Iterable[Fact], ended_before: set[str]) -> None:
        """The same directive has the same content; of who has ended nothing is said but that its gate opens."""
        ended = {name for name in ended_before & self.rows.keys() if self.rows[name]["ended_at"] is not None}
        for fact in facts:
            if isinstance(fact, SessionDirective):
                content = (fact.session_id, fact.incarnation, fact.kind, fact.reason, fact.deadline)
                assert self.directives.setdefault(fact.directive_id, content) == content
            if getattr(fact, "session_id", None) in ended:
                assert isinstance(fact, SessionGate), fact
                assert not fact.closed, fact

    def moved(self, rows: Sequence[Row], agents: Mapping[str, Agent], now_s: float) -> None:
        """From the rows as they were to the rows as they are."""
        for row in rows:
            before = self.rows.get(row["session_id"])
            if before is not None:
                self._moved(before, row, agents[row["workspace_id"]], now_s)
        self.rows = {row["session_id"]: row for row in rows}
        self.words = {name: word for name, word in self.words.items() if name in self.rows}

    def _moved(self, before: Row, row: Row, agent: Agent, now_s: float) -> None:
        if before["ended_at"] is not None and before["end_reason"] != "gone":
            assert row["ended_at"] == before["ended_at"], "what was ended stays so"
        assert row["started_at"] == before["started_at"]
        assert row["incarnation"] == before["incarnation"], "a session is of one life"
        assert row["rev"] >= before["rev"]
        was, now = before["state"], row["state"]
        if was == now:
            if row["deadline_at"] != before["deadline_at"]:
                assert row["unenforceable"], "a deadline that is written stays"
            return
        if ORDER.index(now) > ORDER.index(was):
            return
        assert (was, now) in RETURNS, (was, now)
        if now == "running":
            assert not self._is_over(row, agent, now_s), "its ceiling was raised"
        else:
            assert now_s >= seconds(before["deadline_at"]), "its order had run out"

    def turned(self, agents: Mapping[str, Agent], now_s: float) -> None:
        """After a turn nobody is where its time is over: the stop comes within the ceiling, the grace and one turn."""
        for row in self.rows.values():
            if row["ended_at"] is not None:
                continue
            if row["state"] == "running":
                assert not self._is_over(row, agents[row["workspace_id"]], now_s), row
            elif row["state"] == "checkpoint_sent":
                assert now_s < seconds(row["deadline_at"]), row

    def ordered(self, kill: SessionKill, before: Row, agent: Agent, now_s: float) -> None:
        """An order to kill has just been given: each of its conditions, said once more."""
        word, graced_s = self.words[kill.session_id], seconds(before["deadline_at"])
        assert before["ended_at"] is None
        assert (before["state"], now_s >= graced_s) == ("stop_sent", True), "the grace of its stop was over"
        assert now_s - seconds(word.occurred_at) <= FRESH_S, "the gate's word was fresh"
        assert word.occurred_at >= before["noted_at"], "and from after it was last thought gone"
        assert word.until == kill.expires_at
        assert seconds(word.until) > now_s
        beaten = word.beat_at is not None and seconds(word.beat_at) > graced_s
        assert beaten or now_s >= graced_s + CADENCE_S, "a beat from after the grace, or none for a cadence"
        listed = {each.session_id for each in word.in_flight}
        assert word.foreign if before["kind"] == "foreign" else kill.session_id in listed
        known = [row for row in self.rows.values() if row["workspace_id"] == agent.name and row["ended_at"] is None]
        assert all(self._is_over(row, agent, now_s) for row in known), "what dies with it is over its own ceiling"
        assert not word.foreign or any(row["kind"] == "foreign" for row in known)
        for each in word.in_flight:
            own_s = agent.ceiling_s if each.ceiling_s is None else each.ceiling_s
            over = own_s > 0 and now_s >= seconds(each.started_at) + own_s
            assert over or each.session_id in self.by_hand, each
        self.doomed[kill.order_id] = listed

    def carried_out(self, kill: SessionKill, agent: Agent) -> None:
        """I6: whatever dies of it was in flight when it was given. Foreign work and cut-off owners no gate can hold."""
        alive = {name for name, turn in agent.turns.items() if not (turn.is_hidden or turn.is_over)}
        assert alive <= self.doomed[kill.order_id], (alive, kill)

    def _is_over(self, row: Row, agent: Agent, now_s: float) -> bool:
        ceiling_s = agent.ceiling_s if row["ceiling_s"] is None else row["ceiling_s"]
        over = ceiling_s > 0 and now_s >= seconds(row["started_at"]) + ceiling_s
        return bool(over) or row["session_id"] in self.by_hand
