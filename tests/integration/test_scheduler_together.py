"""Fires, edits, words of the queue and a removal at once: no deadlock, and the sums are right."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

from shared.database import transact
from shared.facts import ScheduleTick, TickSettled, WorkspaceRemoved
from tests.conftest import until
from tests.integration.scheduler_kit import Calendar, calendar, query, settled

__all__ = ["calendar"]

OUTCOMES = ["delivered", "coalesced", "skipped", "failed", "canceled", "ceiling"]


async def test_all_of_it_at_once_loses_no_fire_and_settles_none_twice(calendar: Calendar) -> None:
    """C-V1 C-E2 B-21: eight writers for a while; each fire has one outcome, and the counters are the rows."""
    random = Random(8)
    ids = [await calendar.create(every_s=1) for _ in range(40)]
    before = await _deadlocks(calendar)
    stop = asyncio.Event()

    async def firing() -> None:
        while not stop.is_set():
            moment = datetime.now(UTC)
            await calendar.pool.execute(
                """WITH mine AS (
                     SELECT schedule_id FROM schedules WHERE next_fire_at IS NOT NULL
                     ORDER BY schedule_id FOR NO KEY UPDATE)
                   UPDATE schedules s SET next_fire_at = $1, due_at = $1 FROM mine
                   WHERE s.schedule_id = mine.schedule_id AND s.next_fire_at IS NOT NULL""",
                moment,
            )
            await calendar.fire(moment + timedelta(milliseconds=1))

    async def editing() -> None:
        for turn in range(60):
            some = random.sample(ids, 5)
            verbs = [query(random.choice(["patch", "pause", "resume", "run"]), each, body=_body(turn)) for each in some]
            await calendar.ask(*verbs)

    async def ticked() -> bool:
        return bool(await calendar.ticks())

    async def settling() -> None:
        for _ in range(60):
            await until(ticked)
            ticks = await calendar.ticks()
            some = random.sample(ticks, min(len(ticks), 30))
            await calendar.settle(*(_word(random, each, ticks) for each in some))

    fires = asyncio.gather(firing(), firing())
    await asyncio.gather(editing(), editing(), editing(), settling(), settling(), settling())
    stop.set()
    await fires
    removed = WorkspaceRemoved(workspace_id="w", rev=1)
    await asyncio.gather(
        transact(calendar.pool, lambda connection: calendar.handlers.removed(connection, [removed])), settling()
    )
    assert await _deadlocks(calendar) == before
    for schedule_id in ids:
        row = await calendar.row(schedule_id)
        counted = await calendar.pool.fetch(
            "SELECT outcome, sum(count)::bigint AS fires FROM fires WHERE schedule_id = $1 GROUP BY 1", schedule_id
        )
        assert row["fires_total"] == sum(each["fires"] for each in counted)
        assert {each["outcome"]: each["fires"] for each in counted if each["outcome"]} == {
            outcome: row[outcome] for outcome in (*OUTCOMES, "missed") if row[outcome]
        }
        assert row["deleted_at"] is not None
    newest: dict[UUID, int] = {}
    for change in await calendar.changes():
        assert change.rev == newest.get(change.schedule_id, 0) + 1, "each rev is told, once and in order"
        newest[change.schedule_id] = change.rev


def _body(turn: int) -> dict[str, str]:
    return {"prompt": f"p{turn}"} if turn % 2 else {"note": f"n{turn}"}


def _word(random: Random, tick: ScheduleTick, ticks: list[ScheduleTick]) -> TickSettled:
    outcome = random.choice(OUTCOMES)
    into = next((each.fire_at for each in ticks if each.schedule_id == tick.schedule_id), None)
    began = tick.fire_at if outcome in {"delivered", "failed"} else None
    return settled(tick, outcome, merged_into=into if outcome == "coalesced" else None, began_at=began)


async def _deadlocks(calendar: Calendar) -> int:
    await calendar.pool.execute("SELECT pg_stat_force_next_flush()")
    return int(
        await calendar.pool.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    )
