"""A process that only fires is killed 200 times; what it leaves is whole or nothing."""

from __future__ import annotations

import asyncio
import time
from random import Random

import pytest

from tests.conftest import Stack
from tests.integration.scheduler_kit import T0, Calendar, accounts, calendar, child, ended, many, scheduler_settings

__all__ = ["calendar"]

KILLS = 200
SCHEDULES = 4000
SEED = 20270301


@pytest.mark.timeout(1200)
async def test_two_hundred_kills_lose_no_fire_and_repeat_none(calendar: Calendar, stack: Stack) -> None:
    """C-R1: half of them after a random statement of the tick's transaction, half at a random moment."""
    random = Random(SEED)
    await many(calendar.pool, SCHEDULES, T0)
    settings = scheduler_settings(stack, claim_rows=10, log_level="error")
    killed, there, begun = 0, SCHEDULES, time.monotonic()
    while killed < KILLS:
        if await _left(calendar) < SCHEDULES // 2:
            await many(calendar.pool, SCHEDULES, T0)  # every one of them dies with work before it
            there += SCHEDULES
        if killed % 2:
            process = child(settings, T0, dies_after=random.randint(1, 14))
        else:
            process = child(settings, T0)
            await asyncio.sleep(random.uniform(0.02, 0.08))
            process.kill()
        killed += await ended(process) == -9
    left = await _left(calendar)
    assert left > 0
    assert await ended(child(settings, T0)) == 0
    found = await accounts(calendar.pool)
    print(f"{killed} kills in {time.monotonic() - begun:.0f} s; {left} of {there} were left at the end: {found}")
    assert set(found.values()) == {there}


async def _left(calendar: Calendar) -> int:
    return int(await calendar.pool.fetchval("SELECT count(*) FROM schedules WHERE due_at <= $1", T0))
