"""What can be seen of the calendar from outside: the gauges that tell trouble, and how many series there are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from prometheus_client import REGISTRY, generate_latest

from tests.integration.scheduler_kit import T0, Calendar, calendar, many, settled

__all__ = ["calendar"]

MIN = timedelta(minutes=1)


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    assert found is not None, name
    return found


async def test_a_fire_that_does_not_come_is_seen_within_its_period_and_no_longer_when_it_came(
    calendar: Calendar,
) -> None:
    """C-V3: a dead replica's transaction holds it beyond its window; it is due, then missed, and then neither."""
    schedule_id = await calendar.create(cron="* * * * *", catchup_window_s=60)
    moment = datetime.now(UTC).replace(second=0, microsecond=0) - 3 * MIN
    await calendar.due_at(schedule_id, moment)
    missed = value("bide_scheduler_fires_total", outcome="missed")
    async with calendar.pool.acquire() as dead, dead.transaction():
        await dead.fetch("SELECT FROM schedules FOR UPDATE")
        await calendar.fire()
        assert await calendar.ticking.measure() < MIN.total_seconds()
        assert value("bide_scheduler_due") == 1
    await calendar.fire()
    await calendar.ticking.measure()
    assert value("bide_scheduler_due") == 0
    assert value("bide_scheduler_fires_total", outcome="missed") >= missed + 1
    await calendar.due_at(schedule_id, moment + 10 * MIN)
    missed = value("bide_scheduler_fires_total", outcome="missed")
    await calendar.fire(moment + 10 * MIN)
    assert value("bide_scheduler_fires_total", outcome="missed") == missed, "an alert on its rate clears"


async def test_there_are_as_many_series_with_thousands_of_schedules_as_with_one(calendar: Calendar) -> None:
    """C-V5: labels are small enums; whatever its number, name, workspace or error, a schedule makes no series."""
    await everything(calendar, 1)
    before = series()
    await everything(calendar, 3000)
    assert series() == before


def series() -> set[str]:
    lines = generate_latest(REGISTRY).decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


async def everything(calendar: Calendar, count: int) -> None:
    """Each verb, each outcome, and a schedule that cannot be fired; with `count` schedules of as many names."""
    await many(calendar.pool, count, T0)
    poison = await calendar.create()
    await calendar.due_at(poison, T0)
    await calendar.pool.execute(
        "UPDATE schedules SET timezone = 'Mars/' || $1 WHERE schedule_id = $2", str(count), poison
    )
    await calendar.fire(T0)
    ticks = await calendar.ticks()
    assert len(ticks) >= count
    outcomes = ["delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled"]
    await calendar.settle(
        *(settled(tick, outcomes[place % 7], reason=f"r{place}") for place, tick in enumerate(ticks[:700]))
    )
    schedule_id = await calendar.create(name=f"n{count}")
    for verb in ("patch", "run", "pause", "resume", "delete"):
        assert (await calendar.do(verb, schedule_id))[0] in {200, 201}
    await calendar.ticking.measure()
