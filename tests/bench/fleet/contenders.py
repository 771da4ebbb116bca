"""Those to compare with, each as simple as it is told: none knows budgets, caps, boots or outages."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.liveness.decide.seen import Seen
from tests.bench.fleet.clock import VirtualLoop
from tests.bench.fleet.script import CADENCE_S
from tests.bench.fleet.world import Agent, EngineError, World

SWEEP_S = 10.0
"""They look as often as ours does by default."""
RECENT_S = 15.0
N = 2
THRESHOLD = 8.0


class Contender:
    """A `Listener` that restarts on its own word."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._restarting: set[str] = set()

    def beat(self, agent: Agent) -> None: ...

    def registered(self, agent: Agent) -> None: ...

    def proxy_beat(self, proxy_id: str) -> None: ...

    def exited(self, agent: Agent, container_id: str) -> None: ...

    @asynccontextmanager
    async def deciding(self, world: World) -> AsyncIterator[None]:
        self._world = world
        self._loop.call_later(SWEEP_S, self._sweep)
        yield

    def status_of(self, name: str) -> str:
        """It gives nobody up."""
        return "restarting" if name in self._restarting else "online"

    def _sweep(self) -> None:
        self._world.tally.lists += 1
        for name in self._world.agents:
            seen = self._world.look(name).seen
            if name not in self._restarting and self._is_dead(name, seen):
                self._restart(name)
        self._loop.call_later(SWEEP_S, self._sweep)

    def _is_dead(self, name: str, seen: Seen) -> bool:
        raise NotImplementedError

    def _restart(self, name: str) -> None:
        self._restarting.add(name)
        self._world.tally.declared.append((self._loop.time(), name))
        self._loop.create_task(self._carry_out(name)).add_done_callback(lambda task: task.result())

    async def _carry_out(self, name: str) -> None:
        try:
            await self._world.restart(name)
        except EngineError:
            await asyncio.sleep(SWEEP_S)
        else:
            self._forget(name)
        finally:
            self._restarting.discard(name)

    def _forget(self, name: str) -> None:
        pass


class Naive(Contender):
    """The first look that does not say that it runs, errors too."""

    def _is_dead(self, name: str, seen: Seen) -> bool:  # noqa: ARG002 - it looks at nothing else
        return seen not in {Seen.RUNNING, Seen.TRANSITION}


class Original(Contender):
    """An error is alive, running resets, and a beat within 15 s asks for a second bad look in a row."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop)
        self._heard: dict[str, float] = {}
        self._bad: dict[str, int] = defaultdict(int)

    def beat(self, agent: Agent) -> None:
        self._heard[agent.name] = self._loop.time()

    def _is_dead(self, name: str, seen: Seen) -> bool:
        if seen is Seen.RUNNING:
            self._bad[name] = 0
        if seen not in {Seen.STOPPED, Seen.NOT_FOUND}:
            return False
        self._bad[name] += 1
        is_recent = self._loop.time() - self._heard.get(name, -math.inf) <= RECENT_S
        return not is_recent or self._bad[name] >= N

    def _forget(self, name: str) -> None:
        self._bad[name] = 0


class PhiAccrual(Contender):
    """Hayashibara's detector as Akka and Pekko have it: their formula for the tail, their defaults, over beats alone.

    1,000 samples, least deviation 0.1 s, an acceptable pause of 3 s, and a first estimate of the declared cadence with
    a quarter of it as deviation. phi only grows between beats, so the moment at which it comes to 8 is computed at
    each. A start counts as a beat.
    """

    SAMPLES = 1000
    LEAST_S = 0.1
    PAUSE_S = 3.0

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop)
        self._gaps: dict[str, deque[float]] = {}
        self._sums: dict[str, tuple[float, float]] = {}
        self._last: dict[str, float] = {}
        self._due: dict[str, asyncio.TimerHandle] = {}

    @asynccontextmanager
    async def deciding(self, world: World) -> AsyncIterator[None]:
        self._world = world
        for name in world.agents:
            self._forget(name)
        yield

    def beat(self, agent: Agent) -> None:
        name, at_s = agent.name, self._loop.time()
        self._take(name, at_s - self._last[name])
        self._last[name] = at_s
        self._watch(name)

    def _forget(self, name: str) -> None:
        self._gaps[name], self._sums[name] = deque(), (0.0, 0.0)
        for gap_s in (CADENCE_S * 0.75, CADENCE_S * 1.25):
            self._take(name, gap_s)
        self._last[name] = self._loop.time()
        self._watch(name)

    def _take(self, name: str, gap_s: float) -> None:
        gaps, (total, squares) = self._gaps[name], self._sums[name]
        gaps.append(gap_s)
        total, squares = total + gap_s, squares + gap_s**2
        if len(gaps) > self.SAMPLES:
            old = gaps.popleft()
            total, squares = total - old, squares - old**2
        self._sums[name] = total, squares

    def _watch(self, name: str) -> None:
        if name in self._due:
            self._due[name].cancel()
        count, (total, squares) = len(self._gaps[name]), self._sums[name]
        mean_s = total / count
        deviation_s = max(self.LEAST_S, math.sqrt(max(0.0, squares / count - mean_s**2)))
        silent_s = mean_s + self.PAUSE_S + PHI_8 * deviation_s
        self._due[name] = self._loop.call_at(self._last[name] + silent_s, self._suspect, name)

    def _suspect(self, name: str) -> None:
        if name not in self._restarting:
            self._restart(name)

    async def _carry_out(self, name: str) -> None:
        await super()._carry_out(name)
        if self._due[name].when() <= self._loop.time():
            self._suspect(name)  # the engine did not do it


def phi(deviations: float) -> float:
    """The suspicion after a silence of so many deviations beyond what was expected; a logistic stands for the tail."""
    tail = math.exp(-deviations * (1.5976 + 0.070566 * deviations**2))
    return -math.log10(tail / (1.0 + tail)) if deviations > 0 else -math.log10(1.0 - 1.0 / (1.0 + tail))


def _solve() -> float:
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) < THRESHOLD else (low, middle)
    return high


PHI_8 = _solve()
"""In deviations: 5.1."""
