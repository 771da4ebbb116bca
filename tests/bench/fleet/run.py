"""One contender through one script, on a clock that jumps."""

from __future__ import annotations

import asyncio
import gc
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import seed as seed_random

from tests.bench.fleet.clock import VirtualLoop
from tests.bench.fleet.contenders import Contender, Naive, Original, PhiAccrual
from tests.bench.fleet.ours import Ours
from tests.bench.fleet.script import Script
from tests.bench.fleet.world import Tally, World

CONTENDERS: dict[str, tuple[Callable[[VirtualLoop], Contender | Ours], bool]] = {
    "naive": (Naive, False),
    "original": (Original, False),
    "phi": (PhiAccrual, False),
    "ours": (Ours, False),
    "ours+events": (Ours, True),
}
"""Each with whether its engine tells of exits."""


@dataclass(frozen=True, slots=True)
class Lived:
    """What one contender did in one script."""

    contender: str
    seed: int
    agent_days: float
    hours: float
    deaths: int
    """Of the whole engine."""
    tally: Tally
    looper_status: str
    cpu_s: float
    statements: dict[str, int] = field(default_factory=dict)

    @property
    def detected_s(self) -> list[float]:
        return delays(self.tally.crashes, self.tally.declared)

    @property
    def wedges_s(self) -> list[float]:
        return delays(self.tally.wedges, self.tally.declared)


def live(contender: str, script: Script) -> Lived:
    """Run it; nothing of it depends on the wall clock."""
    seed_random(script.seed)  # backoff of loops that failed
    make, tells = CONTENDERS[contender]
    began = time.process_time()
    gc.freeze()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        tally, status, statements = runner.run(_live(loop, make(loop), script, tells=tells))
    return Lived(
        contender,
        script.seed,
        script.agent_days,
        script.length_s / 3600,
        len(script.deaths),
        tally,
        status,
        time.process_time() - began,
        statements,
    )


async def _live(
    loop: VirtualLoop, contender: Contender | Ours, script: Script, *, tells: bool
) -> tuple[Tally, str, dict[str, int]]:
    errors: list[str] = []
    loop.set_exception_handler(lambda _, context: errors.append(str(context.get("exception") or context["message"])))
    world = World(script, loop, contender, tells_of_exits=tells)
    async with contender.deciding(world):
        world.begin()
        await asyncio.sleep(script.length_s)
        status = contender.status_of(f"w{script.looper:02}")
    assert not errors, errors[:3]
    return world.tally, status, dict(contender.memory.statements) if isinstance(contender, Ours) else {}


def delays(happened: Sequence[tuple[float, str]], declared: Sequence[tuple[float, str]]) -> list[float]:
    """How long after each moment its agent was first declared dead; those that never were are left out."""
    by_name: dict[str, list[float]] = {}
    for at_s, name in sorted(declared):
        by_name.setdefault(name, []).append(at_s)
    found = []
    for at_s, name in happened:
        moments = by_name.get(name, [])
        index = bisect_left(moments, at_s)
        if index < len(moments):
            found.append(moments[index] - at_s)
    return sorted(found)
