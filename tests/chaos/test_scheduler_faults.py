"""The calendar with a database that is slow, cut off after a commit, or locked: on time, each fire once, or seen."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from shared.database import open_pool
from shared.facts import ScheduleTick
from tests.chaos.conftest import LONG, away_s
from tests.chaos.kit.database import admin
from tests.chaos.kit.processes import Process, ring
from tests.conftest import Stack, until
from tests.integration.listening import listening
from tests.integration.scheduler_kit import Calendar, scheduler_settings

pytestmark = pytest.mark.timeout(600)
_CUTS_MAX = 60


@asynccontextmanager
async def rows(stack: Stack) -> AsyncIterator[Calendar]:
    """The scheduler's rows, past every fault."""
    settings = scheduler_settings(stack)
    async with open_pool(settings) as pool:
        yield Calendar(settings, pool)


async def test_at_200_ms_a_query_the_batches_keep_up(faulty: Stack) -> None:
    """C-D4: two hundred schedules of every five seconds are forty fires a second; one by one they would be two."""
    async with ring(faulty, "scheduler-1") as services, rows(faulty) as calendar:
        services["scheduler-1"].postgres.delay_s = 0.1  # each way
        for _ in range(200):
            await calendar.create(every_s=5)
        begun = datetime.now(UTC)

        async def enough() -> bool:
            return datetime.now(UTC) - begun > timedelta(seconds=away_s(15.0))

        await until(enough, away_s(15.0) + 10)
        services["scheduler-1"].postgres.delay_s = 0.0
        fires = await calendar.pool.fetch(
            "SELECT outcome, extract(epoch FROM at - fire_at)::float8 AS late_s FROM fires WHERE fire_at > $1", begun
        )
        late_s = sorted(fire["late_s"] for fire in fires)
        print(f"{len(fires)} fires, late p50 {late_s[len(fires) // 2]:.2f} s, the last {late_s[-1]:.2f} s")
        # One that is a whole period late, on a machine that stood still, is one with the next.
        assert {fire["outcome"] for fire in fires} <= {None, "coalesced"}, "none was missed"
        assert len(fires) >= 200 * (away_s(15.0) // 5 - 1)


async def test_a_tick_whose_commit_was_never_confirmed_is_fired_once(faulty: Stack) -> None:
    """C-D5: cut after Postgres had the COMMIT and before it could say so: the key of the fire says that it was."""
    async with (
        ring(faulty, "scheduler-1") as services,
        rows(faulty) as calendar,
        listening(faulty, ScheduleTick) as ticks,
    ):
        scheduler = services["scheduler-1"]
        ids = [await calendar.create(every_s=1) for _ in range(20)]
        cuts = 30 if LONG else 6
        cut = 0
        while cut < cuts or not scheduler.logged("loop_waits"):
            assert cut < _CUTS_MAX, "none of them was a tick's"
            await asyncio.wait_for(scheduler.postgres.cut_after(b"COMMIT").wait(), 30)
            cut += 1
        for schedule_id in ids:
            await calendar.do("pause", schedule_id)
        fires = await calendar.pool.fetch("SELECT schedule_id, fire_at, queue_id FROM fires WHERE queue_id IS NOT NULL")

        async def all_told() -> bool:
            return {each.queue_id for each in ticks} >= {fire["queue_id"] for fire in fires}

        await until(all_told, 60)
        assert len({each.queue_id for each in ticks}) == len(fires)
        assert len({(each.schedule_id, each.fire_at) for each in ticks}) == len(fires)
        for schedule_id in ids:
            row = await calendar.row(schedule_id)
            told = await calendar.fires(schedule_id)
            seconds = [each["last_fire_at"] for each in told]
            assert sum(each["count"] for each in told) == row["fires_total"]
            assert row["fires_total"] == (max(seconds) - row["anchor_at"]) // timedelta(seconds=1), (
                "no moment is left out"
            )
            assert not [each for each in told if each["outcome"] == "missed"]
        print(f"{cut} cuts, {len(fires)} ticks, {len(ticks) - len(fires)} of them published again")


async def test_a_loop_that_stands_still_is_seen_within_two_ticks(faulty: Stack) -> None:
    """C-R6: Postgres answers, the process lives, and nothing fires: readiness and the loop's last turn say so."""
    async with ring(faulty, "scheduler-1", BIDE_SCHEDULER_LOOK_S="1") as services, rows(faulty) as calendar:
        scheduler = services["scheduler-1"]
        schedule_id = await calendar.create(every_s=1)

        async def fired() -> bool:
            return int((await calendar.row(schedule_id))["fires_total"]) >= 2

        await until(fired)
        async with admin(faulty) as outsider, outsider.transaction():
            await outsider.execute("LOCK TABLE scheduler.schedules IN ACCESS EXCLUSIVE MODE")
            begun = time.monotonic()

            async def seen() -> bool:
                status, report = await asyncio.to_thread(get, scheduler, "/readyz")
                others = {report[name] for name in ("postgres", "rabbitmq", "reader", "sessions")}
                return status == 503 and report["ticking"].startswith("LoopSilent") and others == {"ok"}

            await until(seen)  # the end of sessions goes on
            seen_s = time.monotonic() - begun
            assert (await asyncio.to_thread(get, scheduler, "/livez"))[0] == 200
            stood_at = await asyncio.to_thread(last_turn, scheduler)
            assert time.time() - stood_at >= 2.0
        print(f"seen after {seen_s:.1f} s")

        async def well() -> bool:
            return (await asyncio.to_thread(get, scheduler, "/readyz"))[0] == 200

        await until(well)
        assert await asyncio.to_thread(last_turn, scheduler) > stood_at
        fires = await calendar.fires(schedule_id)
        assert not [fire for fire in fires if fire["outcome"] == "missed"]


def get(process: Process, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{process.url}{path}", timeout=5) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def last_turn(process: Process) -> float:
    with urllib.request.urlopen(f"{process.url}/metrics", timeout=5) as reply:
        found = re.search(
            r'^bide_loop_last_turn_timestamp_seconds\{loop="ticking"\} (\S+)$', reply.read().decode(), re.MULTILINE
        )
    assert found is not None
    return float(found[1])
