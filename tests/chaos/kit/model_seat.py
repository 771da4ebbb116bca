"""A workspace as the model sees it: how much its agent has in hand, whether it is open, and its clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

FRESH_S = 15.0
EARLIER_S = 2.0


@dataclass(slots=True)
class Delivery:
    """One of our deliveries, as the agent's capacity sees it. `how`: answered, neither, unknown; None while it runs."""

    begun: float
    how: str | None = None
    ended: float = 0.0


@dataclass(slots=True)
class Beat:
    incarnation: int
    rev: int
    at: float
    active: int
    cadence_s: float
    heard_at: float


@dataclass(slots=True)
class Proxy:
    """The newest beat of one proxy: `running` are starts, `ended` are (start, end, outcome)."""

    rev: int
    at: float
    running: Sequence[float]
    ended: Sequence[tuple[float, float, str]]


@dataclass(slots=True)
class Gate:
    """The newest word about one session in the gate."""

    rev: int
    until: float
    left: bool


@dataclass(slots=True)
class Seat:
    """A workspace."""

    name: str
    registry_rev: int = 0
    reachable: bool = False
    maximum: int = 1
    least_maximum: int = 10_000
    give_up_after_s: float = 86_400.0
    at_most_once: bool = False
    paused_at: float | None = None
    removed: bool = False
    incarnation: int = 0
    beat: Beat | None = None
    heard: tuple[int, int] = (0, 0)
    """The newest beat's (incarnation, rev), also when its word is void."""
    deliveries: dict[tuple[UUID, int], Delivery] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    shut_until: float | None = None
    shuts: tuple[float, float] | None = None
    """For how long it has just been shut, at least and at most; until that was observed."""
    streak: int = 0
    """How often in a row it was shut."""
    served_critical: bool = False
    """What went last was CRITICAL."""
    gates: dict[str, Gate] = field(default_factory=dict)
    closings: int = 0
    """How often the gate was closed while it was open."""
    life_at: float | None = None
    """When its newest life was first heard of."""
    word: int = 0
    """The rev of liveness' newest word about a life that is not over."""
    is_down: bool = False
    dead: int | None = None
    """The last life that was declared dead, and did not come back."""
    dead_at: float = 0.0

    def begin_life(self, incarnation: int, at: float) -> bool:
        """Whether it is a new one."""
        if incarnation <= self.incarnation:
            return False
        self.incarnation, self.life_at, self.is_down = incarnation, at, False
        return True

    def hear_life(self, rev: int, incarnation: int, *, down: bool, now: float) -> None:
        if rev <= self.word or incarnation < self.incarnation:
            return
        if self.begin_life(incarnation, now):
            self.beat = None
            self.open()
        self.word = rev
        if down and self.dead != incarnation:
            self.dead_at = now
        if down:
            self.dead = incarnation
        elif self.dead == incarnation:
            self.dead = None
        self.is_down = down

    def hear_gate(self, session: str, rev: int, until: float, *, closed: bool, now: float) -> None:
        known = self.gates.get(session)
        if known is not None and (rev < known.rev or (rev == known.rev and known.left)):
            return
        was = self.gate_until(now)
        self.closings += closed and until > now and was is None
        shared = max(until, was or until)  # while it is closed its moment only grows, for all that are in it
        for gate in self.gates.values():
            if closed and until > now and gate.until > now and not gate.left:
                gate.until = shared
        self.gates[session] = Gate(rev, shared if closed else until, not closed)

    def gate_until(self, now: float) -> float | None:
        return max((gate.until for gate in self.gates.values() if gate.until > now and not gate.left), default=None)

    def hear(self, beat: Beat, maximum: int | None = None) -> None:
        if beat.incarnation < self.incarnation or (beat.incarnation, beat.rev) <= self.heard:
            return
        self.begin_life(beat.incarnation, beat.at)
        self.beat, self.heard = beat, (beat.incarnation, beat.rev)
        self.maximum = maximum or self.maximum
        if beat.active < self.maximum:
            self.open()

    def hear_proxy(self, name: str, proxy: Proxy) -> None:
        known = self.proxies.get(name)
        if known is None or proxy.rev > known.rev:
            self.proxies[name] = proxy

    def open(self) -> None:
        self.shut_until, self.shuts, self.streak = None, None, 0

    def in_use(self, now: float) -> int:
        """1-overview, `in_use`: the larger of what is ours, and what the agent said plus begun minus answered."""
        fresh = [proxy for proxy in self.proxies.values() if now - proxy.at < FRESH_S]
        ours = [each for each in self.deliveries.values() if each.how is None]
        running = len(ours) + sum(len(proxy.running) for proxy in fresh)
        beat = self.beat
        if beat is None or now - beat.at > 2 * beat.cadence_s + 5:
            return running
        begun = [each.begun for each in self.deliveries.values() if each.how != "neither"]
        ended = [each.ended for each in self.deliveries.values() if each.how == "answered"]
        for proxy in fresh:
            begun += proxy.running
            begun += [start for start, _, outcome in proxy.ended if outcome not in {"busy", "not_delivered"}]
            ended += [end for _, end, outcome in proxy.ended if outcome == "answered"]
        started = sum(moment > beat.at for moment in begun)
        return max(running, beat.active + started - sum(moment >= beat.at - EARLIER_S for moment in ended))

    def is_blurred(self) -> bool:
        """More ended around the beat than the agent can have had in its count: how many of them, is not prescribed."""
        if self.beat is None:
            return False
        since, until = self.beat.at - EARLIER_S, self.beat.heard_at
        over = [each for each in self.deliveries.values() if each.how is not None and since <= each.ended <= until]
        return len(over) > self.least_maximum

    def is_open(self, now: float) -> bool:
        shut = self.shut_until is not None and self.shut_until > now
        kept = self.removed or shut or self.is_down or self.gate_until(now)
        return self.reachable and self.paused_at is None and not kept

    def capacity(self, now: float) -> int:
        return max(0, self.maximum - self.in_use(now)) if self.is_open(now) else 0
