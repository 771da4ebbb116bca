"""A loop: one piece of work that is done again and again, at the moment it itself names or when it is woken.

`run_once` returns the seconds until its next turn. What it raises is logged and tried again with backoff; a loop ends
only with its service (A-S-01), and its last turn is a metric.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from prometheus_client import Counter, Gauge

from shared.database import Trouble, backoff_s, classify, in_words
from shared.telemetry import log

LAST_TURN = Gauge("bide_loop_last_turn_timestamp_seconds", "When the loop last came through a turn", ["loop"])
FAILED_TURNS = Counter("bide_loop_failed_turns_total", "Turns that raised", ["loop"])


_LAST_TURN_S = 5.0
_CANCEL_S = 1.0


class LoopSilent(Exception):  # noqa: N818 - a state, for /readyz
    """The loop has not come through a turn for longer than it may sleep."""


class Loop:
    """`run_once` until cancelled."""

    def __init__(self, name: str, run_once: Callable[[], Awaitable[float]]) -> None:
        self.name = name
        self._run_once = run_once
        self._woken = asyncio.Event()
        self._failures = 0
        self._stopped = False
        self._turned_at = self._ended_at = time.monotonic()
        FAILED_TURNS.labels(name)

    def wake(self) -> None:
        """Take the next turn now; a wake during a turn is not lost."""
        self._woken.set()

    def stop(self) -> None:
        """Begin no further turn; one that is under way comes to its end."""
        self._stopped = True
        self._woken.set()

    def age_s(self) -> float:
        """For /livez: how long ago its last turn ended, well or not. What only waits for its servers still turns."""
        return time.monotonic() - self._ended_at

    async def probe(self, within_s: float) -> None:
        """For /readyz: raise LoopSilent when no turn has come through within so long, whatever it waits for."""
        silent_s = time.monotonic() - self._turned_at
        if silent_s > within_s:
            raise LoopSilent(f"no turn has come through for {silent_s:.1f} s")

    async def run(self) -> None:
        self._turned_at = self._ended_at = time.monotonic()
        while not self._stopped:
            self._woken.clear()
            delay_s = await self._turn()
            self._ended_at = time.monotonic()
            if self._stopped:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._woken.wait()

    async def _turn(self) -> float:
        try:
            delay_s = await self._run_once()
        except Exception as error:  # noqa: BLE001 - it is logged, counted and tried again
            FAILED_TURNS.labels(self.name).inc()
            delay_s = backoff_s(self._failures)
            self._failures += 1
            if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                log.warning("loop_waits", loop=self.name, error=in_words(error))
            else:
                log.exception("loop_failed", loop=self.name)
            return delay_s
        self._failures = 0
        self._turned_at = time.monotonic()
        LAST_TURN.labels(self.name).set_to_current_time()
        return delay_s


@asynccontextmanager
async def turning(loops: Sequence[Loop]) -> AsyncIterator[None]:
    """Run `loops` for the length of the block."""
    tasks = [asyncio.create_task(loop.run(), name=loop.name) for loop in loops]
    try:
        yield
    finally:
        # A turn that is cut short leaves what it claimed to time out: let it end, if it can.
        for loop in loops:
            loop.stop()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_TURN_S)
        for task in tasks:
            task.cancel()
        if tasks:
            # A driver that waits for a frozen server takes its time over a cancel; closing its pool ends it.
            await asyncio.wait(tasks, timeout=_CANCEL_S)
