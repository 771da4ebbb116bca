"""A fleet on one engine, as it lives through a script: it beats, stalls, dies, boots, and is looked at and restarted.

Nothing here decides. Contenders hear (`Listener`), look and restart; what they did is held against what was true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from services.liveness.decide.seen import Observation, Seen
from tests.bench.fleet.clock import VirtualLoop
from tests.bench.fleet.script import CADENCE_S, JITTER_S, WEDGE_S, Boot, Script, Span

PROXIES = ("p1", "p2")
PROXY_CADENCE_S = 5.0
SLOT_S = 30.0
"""An agent that was started takes a place of the fleet until it is heard, but for no longer than that."""
_ENGINE_DOWN = "the engine does not answer"


class EngineError(Exception):
    """The engine did not do it."""


class Listener(Protocol):
    """Whoever decides."""

    def beat(self, agent: Agent) -> None: ...

    def registered(self, agent: Agent) -> None: ...

    def proxy_beat(self, proxy_id: str) -> None: ...

    def exited(self, agent: Agent, container_id: str) -> None: ...


@dataclass(slots=True)
class Agent:
    number: int
    name: str
    draw: Random
    flakes: Sequence[Span]
    stalls: Sequence[Span]
    container_id: str | None = None
    """What runs; None: nothing does."""
    began_s: float = 0.0
    boot: Boot | None = None
    incarnation: int = 1
    up: bool = False
    """It has spoken since its start, and not died."""
    wedged: bool = False
    starts: int = 0
    looped: int = 0
    active: int = 0
    slot: asyncio.TimerHandle | None = None
    next_flake: int = 0
    next_stall: int = 0


@dataclass(slots=True)
class Tally:
    """What happened, in seconds of the script."""

    crashes: list[tuple[float, str]] = field(default_factory=list)
    wedges: list[tuple[float, str]] = field(default_factory=list)
    declared: list[tuple[float, str]] = field(default_factory=list)
    """Whom the contender declared dead, when."""
    real: int = 0
    """Restarts of agents that were dead or wedged."""
    false: int = 0
    """Of living agents, but for those below."""
    in_boot: int = 0
    in_broker: int = 0
    """During an outage of the broker, and until all that live may have beaten again."""
    in_engine: int = 0
    looper: int = 0
    looped_last_s: float = 0.0
    looks: int = 0
    lists: int = 0
    most_at_once: int = 0
    restarted_s: list[float] = field(default_factory=list)
    """After each death of the whole engine: from its return until the last of its agents was started."""
    recovered_s: list[float] = field(default_factory=list)
    """… and until the last was heard."""


class World:
    def __init__(self, script: Script, loop: VirtualLoop, listener: Listener, *, tells_of_exits: bool = False) -> None:
        self.script = script
        self.tally = Tally()
        self.agents = {
            agent.name: agent
            for agent in (
                Agent(
                    number, f"w{number:02}", Random(f"agent {script.seed} {number}"), script.flakes[number],
                    script.stalls[number],
                )
                for number in range(script.agents)
            )
        }  # fmt: skip
        self._by_number = list(self.agents.values())
        self._loop = loop
        self._listener = listener
        self._tells = tells_of_exits
        self._draw = Random(f"world {script.seed}")
        self._at_once = 0
        self._lost: dict[float, tuple[set[str], set[str]]] = {}
        """By the moment the engine came back: who is not started yet, who not heard."""

    def begin(self) -> None:
        """Bring everybody up, and write the script's moments into the clock."""
        for agent in self._by_number:
            self._run(agent)
            agent.boot = None
            self._loop.call_later(agent.draw.uniform(0.1, CADENCE_S), self._speak, agent, agent.container_id)
        for proxy_id in PROXIES:
            self._proxy_beat(proxy_id)
        for at_s, number in self.script.crashes:
            self._loop.call_at(at_s, self._crash, self._by_number[number])
        for at_s, number in self.script.wedges:
            self._loop.call_at(at_s, self._wedge, self._by_number[number])
        for span in self.script.deaths:
            self._loop.call_at(span.begin_s, self._die_together, span)
        self._loop.call_at(self.script.loops_from_s, self._begin_to_loop, self._by_number[self.script.looper])

    # ── what a contender may do ──────────────────────────────────────────────────────────────────────────────────────

    def look(self, name: str) -> Observation:
        agent = self.agents[name]
        at_s = self._loop.time()
        self.tally.looks += 1
        if any(span.holds(at_s) for span in self.script.engine):
            return Observation(Seen.UNKNOWN, why=_ENGINE_DOWN)
        if (flake := self._flake(agent, at_s)) is not None:
            return Observation(flake.seen, why="a flake")
        if agent.container_id is None:
            return Observation(Seen.NOT_FOUND if agent.number % 2 else Seen.STOPPED, why="it is not there")
        if agent.boot is not None and at_s < agent.began_s + agent.boot.made_s:
            return Observation(Seen.TRANSITION, agent.container_id, why="created")
        return Observation(Seen.RUNNING, agent.container_id)

    async def restart(self, name: str) -> str:
        """End what runs and start it anew; returns the new container's id."""
        agent = self.agents[name]
        if self._is_away():
            raise EngineError(_ENGINE_DOWN)
        self._judge(agent)
        self._take_slot(agent)
        self._end(agent)
        await asyncio.sleep(agent.draw.uniform(0.2, 1.0))
        if self._is_away():
            self._free_slot(agent)
            raise EngineError(_ENGINE_DOWN)
        container_id = self._run(agent)
        agent.slot = self._loop.call_later(SLOT_S, self._free_slot, agent)
        return container_id

    def _judge(self, agent: Agent) -> None:
        """Say whether this restart was called for."""
        at_s = self._loop.time()
        tally = self.tally
        if self.is_looper(agent):
            tally.looper += 1
            tally.looped_last_s = at_s
        elif agent.container_id is None or agent.wedged:
            tally.real += 1
        elif not agent.up:
            tally.in_boot += 1
        elif any(span.begin_s <= at_s < span.end_s + 2 * CADENCE_S for span in self.script.broker):
            tally.in_broker += 1
        elif any(span.begin_s <= at_s < span.end_s + 2 * CADENCE_S for span in self.script.engine):
            tally.in_engine += 1
        else:
            tally.false += 1

    def is_looper(self, agent: Agent) -> bool:
        return agent.number == self.script.looper and self._loop.time() >= self.script.loops_from_s

    # ── lives ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, agent: Agent) -> str:
        agent.starts += 1
        agent.container_id = f"{agent.name}.{agent.starts}"
        agent.began_s = self._loop.time()
        agent.boot = self.script.boot_of(agent.number, agent.starts)
        for not_started, _ in self._lost.values():
            not_started.discard(agent.name)
        self._recover()
        if self.is_looper(agent):
            self._loop.call_later(agent.draw.uniform(0.5, 3.0), self._end_if, agent, agent.container_id)
        elif agent.starts > 1:
            self._loop.call_later(agent.boot.took_s, self._speak, agent, agent.container_id)
        return agent.container_id

    def _end(self, agent: Agent, *, quietly: bool = False) -> None:
        gone, agent.container_id = agent.container_id, None
        agent.up = agent.wedged = False
        if self._tells and gone is not None and not quietly and not self._is_away():
            self._loop.call_later(self._draw.uniform(0.05, 0.8), self._listener.exited, agent, gone)

    def _end_if(self, agent: Agent, container_id: str) -> None:
        if agent.container_id == container_id:
            self._end(agent)

    def _begin_to_loop(self, agent: Agent) -> None:
        for waiting in self._lost.values():
            for names in waiting:
                names.discard(agent.name)  # nobody waits for it any more
        self._end(agent)

    def _crash(self, agent: Agent) -> None:
        if agent.up and not agent.wedged and not self.is_looper(agent):
            self.tally.crashes.append((self._loop.time(), agent.name))
            self._end(agent)

    def _die_together(self, span: Span) -> None:
        self._lost[span.end_s] = (set(), set())
        for agent in self._by_number:
            if agent.container_id is not None:
                self._end(agent, quietly=True)
            if not self.is_looper(agent):
                for waiting in self._lost[span.end_s]:
                    waiting.add(agent.name)

    def _recover(self) -> None:
        at_s = self._loop.time()
        for back_s, (not_started, not_heard) in tuple(self._lost.items()):
            if not not_started and len(self.tally.restarted_s) == len(self.tally.recovered_s):
                self.tally.restarted_s.append(at_s - back_s)
            if not not_heard:
                self.tally.recovered_s.append(at_s - back_s)
                del self._lost[back_s]

    def _wedge(self, agent: Agent) -> None:
        """Its last words are that it has work."""
        if not agent.up or self.is_looper(agent):
            return
        agent.active = 1
        self._tell(agent)
        agent.wedged = True
        self.tally.wedges.append((self._loop.time(), agent.name))
        self._loop.call_later(WEDGE_S, self._unwedge, agent, agent.container_id)

    def _unwedge(self, agent: Agent, container_id: str | None) -> None:
        if agent.container_id == container_id:
            agent.wedged = False

    # ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _speak(self, agent: Agent, container_id: str | None) -> None:
        """A beat is due, the first of a life with its registration; a stalled agent says it when it comes to itself."""
        if agent.container_id != container_id:
            return
        at_s = self._loop.time()
        stall = self._stall(agent, at_s)
        if stall is not None and agent.up:
            self._loop.call_at(stall.end_s + 0.01, self._speak, agent, container_id)
            return
        if not agent.up:
            self._come_up(agent)
        if not agent.wedged:
            agent.active = int(agent.draw.random() < 0.6)
            self._tell(agent)
        self._loop.call_later(CADENCE_S + agent.draw.uniform(-JITTER_S, JITTER_S), self._speak, agent, container_id)

    def _come_up(self, agent: Agent) -> None:
        agent.up = True
        agent.incarnation += agent.starts > 1
        for _, not_heard in self._lost.values():
            not_heard.discard(agent.name)
        self._recover()
        self._free_slot(agent)
        # The registry's word lies in a queue that waits for the broker: it is late, and is never lost.
        self._loop.call_later(self._broker_away_s() + 0.02, self._listener.registered, agent)

    def _tell(self, agent: Agent) -> None:
        if self._broker_away_s() == 0:
            self._loop.call_later(agent.draw.uniform(0.03, 0.2), self._listener.beat, agent)

    def _proxy_beat(self, proxy_id: str) -> None:
        if self._broker_away_s() == 0:
            self._listener.proxy_beat(proxy_id)
        self._loop.call_later(PROXY_CADENCE_S, self._proxy_beat, proxy_id)

    # ── what is true now ─────────────────────────────────────────────────────────────────────────────────────────────

    def _broker_away_s(self) -> float:
        at_s = self._loop.time()
        return max((span.end_s - at_s for span in self.script.broker if span.holds(at_s)), default=0.0)

    def _is_away(self) -> bool:
        at_s = self._loop.time()
        return any(span.holds(at_s) for span in self.script.engine)

    def _flake(self, agent: Agent, at_s: float) -> Span | None:
        while agent.next_flake < len(agent.flakes) and agent.flakes[agent.next_flake].end_s <= at_s:
            agent.next_flake += 1
        if agent.next_flake < len(agent.flakes) and agent.flakes[agent.next_flake].holds(at_s):
            return agent.flakes[agent.next_flake]
        in_boot = agent.boot.flake if agent.boot is not None and agent.container_id is not None else None
        return in_boot if in_boot is not None and in_boot.holds(at_s - agent.began_s) else None

    def _stall(self, agent: Agent, at_s: float) -> Span | None:
        while agent.next_stall < len(agent.stalls) and agent.stalls[agent.next_stall].end_s <= at_s:
            agent.next_stall += 1
        stall = agent.stalls[agent.next_stall] if agent.next_stall < len(agent.stalls) else None
        return stall if stall is not None and stall.holds(at_s) else None

    def _take_slot(self, agent: Agent) -> None:
        self._free_slot(agent)
        agent.slot = self._loop.call_later(1e9, self._free_slot, agent)
        self._at_once += 1
        self.tally.most_at_once = max(self.tally.most_at_once, self._at_once)

    def _free_slot(self, agent: Agent) -> None:
        if agent.slot is not None:
            agent.slot.cancel()
            agent.slot = None
            self._at_once -= 1
