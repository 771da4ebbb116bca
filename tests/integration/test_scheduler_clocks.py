"""When ticks come: on machines whose clocks are wrong, and where many schedules share a few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID, uuid4

import pytest

from shared.facts import BacklogSnapshot, ScheduleTick
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.listening import listening
from tests.integration.scheduler_kit import Calendar, calendar, many, whole
from tests.integration.test_scheduler_service import asker, in_a_moment, process

__all__ = ["calendar"]

LATE_MAX_S = 20.0
"""Less than a clock here is wrong by, and more than this machine stands still."""


@pytest.mark.parametrize("skew_s", [90, -90], ids=["ahead", "behind"])
async def test_a_replica_whose_clock_is_wrong_fires_by_the_databases(
    calendar: Calendar, stack: Stack, skew_s: int
) -> None:
    """C-C2: neither early nor late; and it does what is asked in time, by whoever's clock."""
    schedule_id = uuid4()
    async with (
        listening(stack, ScheduleTick) as ticks,
        process(stack, "tests.integration.skewed", "scheduler", str(skew_s)),
        asker(stack) as proxy,
    ):
        assert (await proxy.ask("create", schedule_id, body=whole(every_s=1)))[0] == 201

        async def several() -> bool:
            return len(ticks) >= 4

        await until(several)
        assert (await proxy.ask("pause", schedule_id))[0] == 200
        # A question whose asker has gone is not answered, also by one that lives in the past.
        late = await proxy.ask("resume", schedule_id, expires_at=in_a_moment(-30))
        assert late[0] == 408
    late_s = await calendar.pool.fetch(
        "SELECT extract(epoch FROM at - fire_at)::float8 AS s FROM fires WHERE queue_id IS NOT NULL"
    )
    assert all(0 <= row["s"] <= LATE_MAX_S for row in late_s), late_s
    moments = [each.fire_at for each in ticks]
    assert moments == sorted(set(moments)), "each once"


@pytest.mark.parametrize("skew_s", [90, -90], ids=["ahead", "behind"])
async def test_a_snapshot_is_as_old_as_the_database_says(calendar: Calendar, stack: Stack, skew_s: int) -> None:
    """Whoever reads it holds it against moments of Postgres: the wrong clock of a queue service is in none of them."""
    clock = "SELECT clock_timestamp()"
    before: datetime = await calendar.pool.fetchval(clock)
    snapshots: list[BacklogSnapshot] = []

    async def heard(facts: Sequence[BacklogSnapshot]) -> None:
        snapshots.extend(facts)

    async def came() -> bool:
        return bool(snapshots)

    async with replica(stack, "scheduler") as side:
        side.reader.hear(BacklogSnapshot, heard)
        await side.reader.start()
        async with process(stack, "tests.integration.skewed", "queue", str(skew_s), service="queue"):
            await until(came)
    assert before < snapshots[0].occurred_at < await calendar.pool.fetchval(clock)


async def test_schedules_that_are_spread_over_seconds_are_each_on_time(calendar: Calendar, stack: Stack) -> None:
    """C-S2, small; a hundred thousand over a minute are in the benchmark. From the moment to the broker's delivery."""
    seen: dict[UUID, float] = {}
    async with listening(stack, ScheduleTick) as ticks, process(stack):
        moment = in_a_moment(15)  # later than the longest sleep
        await many(calendar.pool, 600, moment)
        await calendar.pool.execute(
            """WITH spread AS (SELECT schedule_id, row_number() OVER () * interval '5 ms' AS by FROM schedules)
               UPDATE schedules s SET next_fire_at = next_fire_at + by, due_at = due_at + by
               FROM spread WHERE s.schedule_id = spread.schedule_id"""
        )
        assert in_a_moment(0) < moment
        read = 0

        async def all_of_them() -> bool:
            nonlocal read
            for tick in ticks[read:]:
                seen.setdefault(tick.schedule_id, time.time() - tick.fire_at.timestamp())
            read = len(ticks)
            return len(seen) == 600

        await until(all_of_them)
        assert read == 600, "none came twice"
    late_s = sorted(seen.values())
    print(f"late p50 {late_s[300] * 1000:.0f} ms, p99 {late_s[594] * 1000:.0f} ms")
    assert late_s[0] >= 0
    assert late_s[594] <= LATE_MAX_S
