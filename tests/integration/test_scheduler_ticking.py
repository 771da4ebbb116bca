"""The loop that fires: on its rows, beside its siblings, and killed at each of its statements."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from services.scheduler.store import SQL
from shared.database import load_queries, open_pool
from tests.conftest import ROOT, Stack, until
from tests.integration.scheduler_kit import (
    T0,
    Calendar,
    accounts,
    calendar,
    child,
    ended,
    many,
    scheduler_settings,
)

__all__ = ["calendar"]

MIN = timedelta(minutes=1)
OUTBOX = load_queries(ROOT / "shared" / "queries.sql")
STATEMENTS = 14
"""More than a turn has: begin, claim, fires, schedules, outbox, commit, and the look for what comes next."""


async def test_after_an_outage_they_run_once_and_the_rest_is_one_row(calendar: Calendar) -> None:
    """C-D1 A-S-19: a window of five minutes in an outage of an hour."""
    schedule_id = await calendar.create(cron="* * * * *", catchup_window_s=300)
    await calendar.due_at(schedule_id, T0)
    await calendar.fire(T0 + 60 * MIN)
    missed, merged, run = await calendar.fires(schedule_id)
    assert (missed["outcome"], missed["fire_at"], missed["last_fire_at"], missed["count"]) == (
        "missed",
        T0,
        T0 + 54 * MIN,
        55,
    )
    assert (merged["outcome"], merged["count"], merged["merged_into"]) == ("coalesced", 5, T0 + 60 * MIN)
    (tick,) = await calendar.ticks()
    assert (tick.fire_at, tick.merged_count, tick.first_missed_at) == (T0 + 60 * MIN, 6, T0 + 55 * MIN)
    assert tick.queue_id == run["queue_id"]
    row = await calendar.row(schedule_id)
    assert (row["fires_total"], row["missed"], row["coalesced"], row["bounces"]) == (61, 55, 5, 0)
    assert row["next_fire_at"] == T0 + 61 * MIN


async def test_one_that_comes_once_fires_once(calendar: Calendar) -> None:
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    schedule_id = await calendar.create(at=moment.isoformat())
    for seconds in (-1, 0, 1, 3600):
        await calendar.fire(moment + timedelta(seconds=seconds))
    assert [each.fire_at for each in await calendar.ticks()] == [moment]
    assert (await calendar.row(schedule_id))["next_fire_at"] is None


async def test_it_sleeps_until_the_next_moment_and_at_most_so_long(calendar: Calendar) -> None:
    assert await calendar.ticking.run_once(T0) == 5.0
    schedule_id = await calendar.create(cron="* * * * *")
    assert calendar.woken == 1, "an edit wakes it"
    await calendar.due_at(schedule_id, T0 + timedelta(seconds=2))
    assert await calendar.ticking.run_once(T0) == pytest.approx(2.0)
    assert await calendar.ticking.run_once(T0 - MIN) == 5.0
    assert await calendar.ticking.run_once(T0 + timedelta(seconds=2)) == 0.0


async def test_what_a_sibling_holds_is_left_to_it(calendar: Calendar) -> None:
    """A-S-16: neither fired twice nor waited for; and not asked for without a pause."""
    await many(calendar.pool, 3, T0)
    async with calendar.pool.acquire() as sibling, sibling.transaction():
        await sibling.fetch("SELECT FROM schedules FOR UPDATE")
        assert await asyncio.wait_for(calendar.ticking.run_once(T0), 5) == 0.05
        assert await calendar.ticks() == []
    await calendar.fire(T0)
    assert len(await calendar.ticks()) == 3


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("cron", "'61 * * * *'", "CronError"),
        ("timezone", "'Mars/Base'", "CronError"),
        ("priority", "'TASK'", "fires_never"),
    ],
)
async def test_one_that_cannot_be_fired_is_paused_alone_with_its_reason(
    calendar: Calendar, column: str, value: str, reason: str
) -> None:
    """C-R5 A-S-04 A-S-07: a rule that is none, a zone that is gone, a row that the tables refuse."""
    await many(calendar.pool, 20, T0)
    poison = await calendar.create(cron="* * * * *")
    await calendar.due_at(poison, T0)
    await calendar.pool.execute(f"UPDATE schedules SET {column} = {value} WHERE schedule_id = '{poison}'")
    if reason == "fires_never":
        await calendar.pool.execute(
            f"ALTER TABLE fires ADD CONSTRAINT fires_never CHECK (schedule_id <> '{poison}') NOT VALID"
        )
    try:
        await calendar.fire(T0)
    finally:
        await calendar.pool.execute("ALTER TABLE fires DROP CONSTRAINT IF EXISTS fires_never")
    assert len(await calendar.ticks()) == 20
    _, shown = await calendar.do("show", poison)
    assert shown["paused"]
    assert reason in shown["paused_by_error"]
    assert shown["next_fire_at"] is None
    last = (await calendar.changes())[-1]
    assert (last.schedule_id, last.paused, last.rev) == (poison, True, 2)
    await calendar.ticking.measure()
    if reason == "fires_never":
        assert (await calendar.do("resume", poison))[1]["paused_by_error"] is None
    else:
        assert (await calendar.do("resume", poison))[0] == 422
        fixed = {"cron": "* * * * *", "timezone": "UTC", "paused": False}
        assert (await calendar.do("patch", poison, body=fixed))[1]["paused_by_error"] is None


async def test_a_fire_that_is_there_is_never_told_again(calendar: Calendar) -> None:
    """C-C1: a clock that steps back may bring a moment once more; the key of the fire decides."""
    schedule_id = await calendar.create(cron="* * * * *")
    await calendar.due_at(schedule_id, T0)
    await calendar.fire(T0)
    await calendar.due_at(schedule_id, T0)
    await calendar.fire(T0)
    assert len(await calendar.ticks()) == 1
    row = await calendar.row(schedule_id)
    assert (row["fires_total"], row["next_fire_at"]) == (1, T0 + MIN)


async def test_edits_race_the_loop_and_no_moment_is_fired_twice_or_dropped(calendar: Calendar) -> None:
    """C-E2 C-E3: each moment that was due ends as a tick or, visibly, as withdrawn; never as both."""
    ids = [await calendar.create(cron="* * * * *") for _ in range(20)]
    for turn in range(5):
        for schedule_id in ids:
            await calendar.due_at(schedule_id, datetime.now(UTC).replace(second=0, microsecond=0))
        before = {schedule_id: (await calendar.row(schedule_id))["next_fire_at"] for schedule_id in ids}
        await calendar.pool.execute("TRUNCATE fires, outbox")
        zone = ("Asia/Tokyo", "UTC")[turn % 2]
        await asyncio.gather(
            *(calendar.do("patch", each, body={"timezone": zone, "prompt": f"p{turn}"}) for each in ids),
            calendar.fire(),
            calendar.fire(),
        )
        await calendar.fire()
        ran = set()
        for schedule_id in ids:
            (fire,) = [fire for fire in await calendar.fires(schedule_id) if fire["fire_at"] == before[schedule_id]]
            assert fire["outcome"] in {None, "canceled"}
            if fire["outcome"] is None:
                ran.add((schedule_id, fire["fire_at"]))
        told = [(each.schedule_id, each.fire_at) for each in await calendar.ticks() if each.fire_at in before.values()]
        assert sorted(told) == sorted(ran)


@pytest.mark.parametrize("dies_after", range(1, STATEMENTS))
async def test_killed_after_any_statement_it_has_fired_each_once(
    calendar: Calendar, stack: Stack, dies_after: int
) -> None:
    """C-R1: SIGKILL after the n-th statement; whoever comes next finds all of it done or nothing."""
    await many(calendar.pool, 50, T0)
    settings = scheduler_settings(stack, claim_rows=20)
    first = child(settings, T0, dies_after=dies_after)
    assert await ended(first) == -9
    assert await ended(child(settings, T0)) == 0
    found = await accounts(calendar.pool)
    assert found == {"fires": 50, "ticks": 50, "distinct_ticks": 50, "paired": 50, "counted": 50}


async def test_three_replicas_share_a_minute_and_one_is_killed_midway(calendar: Calendar, stack: Stack) -> None:
    """C-R3 A-S-16: 10,000 schedules, none lost, none twice."""
    await many(calendar.pool, 10_000, T0)
    replicas = [child(scheduler_settings(stack), T0) for _ in range(3)]

    async def midway() -> bool:
        return int(await calendar.pool.fetchval("SELECT count(*) FROM fires")) >= 2000

    await until(midway)
    replicas[0].kill()
    assert [await ended(each) for each in replicas] == [-9, 0, 0]
    await calendar.fire(T0)  # what the killed one held when the others came to their end
    found = await accounts(calendar.pool)
    assert set(found.values()) == {10_000}, found


async def test_a_replica_that_stood_still_in_its_turn_writes_nothing_when_it_wakes(
    calendar: Calendar, stack: Stack
) -> None:
    """C-R2: the server cut its transaction after 5 s, and a sibling has fired them since."""
    await many(calendar.pool, 10, T0)
    async with open_pool(scheduler_settings(stack)) as pool, pool.acquire() as zombie:
        await zombie.execute("SET idle_in_transaction_session_timeout = '300ms'")
        transaction = zombie.transaction()
        await transaction.start()
        await zombie.fetch("SELECT FROM schedules FOR UPDATE")

        async def fired() -> bool:
            await calendar.fire(T0)
            return len(await calendar.ticks()) == 10

        await until(fired)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await zombie.execute("UPDATE schedules SET next_fire_at = now(), due_at = now()")
    assert (await accounts(calendar.pool))["paired"] == 10


async def test_old_fires_are_forgotten_and_open_ones_are_not(calendar: Calendar) -> None:
    schedule_id = await calendar.create(cron="* * * * *", catchup_window_s=1)
    await calendar.due_at(schedule_id, T0)
    await calendar.fire(T0 + MIN)
    later = datetime.now(UTC) + timedelta(days=91)
    assert [fire["outcome"] for fire in await calendar.fires(schedule_id)] == ["missed", None]
    await calendar.ticking.forget(later - timedelta(days=2))
    assert len(await calendar.fires(schedule_id)) == 2
    await calendar.ticking.forget(later)
    assert [fire["outcome"] for fire in await calendar.fires(schedule_id)] == [None]
    await calendar.do("delete", schedule_id)
    await calendar.ticking.forget(datetime.now(UTC) + timedelta(days=89))
    assert len(await calendar.fires(schedule_id)) == 2, "the open one, and what the deletion withdrew"
    await calendar.ticking.forget(later)
    assert await calendar.fires(schedule_id) == []
    assert await calendar.pool.fetchval("SELECT count(*) FROM schedules") == 0


async def test_who_changed_what_is_forgotten_after_a_year(calendar: Calendar) -> None:
    await calendar.create()
    for days, left in ((364, 1), (366, 0)):
        await calendar.ticking.forget(datetime.now(UTC) + timedelta(days=days))
        assert await calendar.pool.fetchval("SELECT count(*) FROM audit") == left


async def test_the_claim_goes_along_its_index(calendar: Calendar) -> None:
    """C-S3: what is not due costs nothing, also where most schedules are paused."""
    await many(calendar.pool, 20_000, T0 + timedelta(days=1))
    await calendar.pool.execute("UPDATE schedules SET next_fire_at = NULL, due_at = NULL WHERE workspace_id <> 'w1'")
    await calendar.pool.execute("ANALYZE schedules")
    for name, arguments in (("claim_due", (500, T0)), ("next_due_in", (T0,))):
        async with calendar.pool.acquire() as connection:
            plan = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {_filled(SQL[name], arguments)}")
        lines = "\n".join(row[0] for row in plan)
        assert "schedules_due" in lines, lines
        assert "Seq Scan" not in lines, lines


async def test_plans_that_were_made_while_nothing_was_there_go_along_indexes_too(
    calendar: Calendar, admin: asyncpg.Connection[asyncpg.Record]
) -> None:
    """C-S1: a service keeps its plans. One for an empty outbox compared each of its rows with each of the claimed."""
    await admin.execute("VACUUM (ANALYZE) scheduler.outbox, scheduler.schedules, scheduler.fires")
    statements: dict[str, tuple[str, tuple[object, ...]]] = {
        "claim_outbox": (OUTBOX["claim_outbox"], (500, 30, T0)),
        "delete_outbox": (OUTBOX["delete_outbox"], ([1, 2, 3],)),
        "release_outbox": (OUTBOX["release_outbox"], ([1, 2, 3], T0)),
        "claim_due": (SQL["claim_due"], (500, T0)),
        "lock_schedules": (SQL["lock_schedules"], ([],)),
        "bounce_fires": (SQL["bounce_fires"], ([], [])),
        "settle_fires": (SQL["settle_fires"], ([],) * 6),
        "settle_schedules": (SQL["settle_schedules"], ([],) * 13),
        "advance_schedules": (SQL["advance_schedules"], ([],) * 8),
    }
    async with calendar.pool.acquire() as connection:
        for name, (statement, arguments) in statements.items():
            plan = await connection.fetch(f"EXPLAIN {_filled(statement, arguments)}")
            lines = "\n".join(row[0] for row in plan)
            assert not re.search(r"Seq Scan|Hash Join|Merge Join|Join Filter: .*id = ", lines), f"{name}\n{lines}"


def _filled(statement: str, arguments: tuple[object, ...]) -> str:
    for number, value in reversed(list(enumerate(arguments, 1))):
        said = f"'{value}'::timestamptz" if isinstance(value, datetime) else str(value)
        if isinstance(value, list):
            said = f"'{{{','.join(map(str, value))}}}'"
        statement = statement.replace(f"${number}", said)
    return statement
