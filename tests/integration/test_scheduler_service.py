"""The scheduler as it runs: real processes, the bus, and servers that are away at the fire."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from deploy.local.servers import Servers
from shared.database import open_pool
from shared.facts import QueryAnswered, ScheduleChanged, ScheduleTick
from shared.topology import route
from tests.conftest import ROOT, TEMPLATE, Stack, until
from tests.integration.conftest import Replica, replica
from tests.integration.listening import listening
from tests.integration.scheduler_kit import (
    Calendar,
    calendar,
    many,
    query,
    scheduler_service,
    scheduler_settings,
    settled,
    whole,
)

__all__ = ["calendar"]


class Asker:
    """The proxy's side of a ScheduleQuery."""

    def __init__(self, side: Replica) -> None:
        self.side = side
        self.answers: dict[UUID, asyncio.Future[QueryAnswered]] = {}

    async def hear(self, facts: list[QueryAnswered]) -> None:
        for fact in facts:
            self.answers[fact.query_id].set_result(fact)

    async def ask(self, verb: str, schedule_id: UUID | None, **about: object) -> tuple[int, dict[str, object]]:
        reply_to = route(QueryAnswered, "proxy").queue(self.side.settings.replica_id)
        asked = query(verb, schedule_id, reply_to=reply_to, **about)
        self.answers[asked.query_id] = asyncio.get_running_loop().create_future()
        await self.side.publisher.publish(asked)
        said = await asyncio.wait_for(self.answers[asked.query_id], 20)
        return said.status, json.loads(said.body)


@asynccontextmanager
async def asker(stack: Stack) -> AsyncIterator[Asker]:
    async with replica(stack, "proxy") as side:
        asking = Asker(side)
        side.reader.hear(QueryAnswered, asking.hear)  # type: ignore[arg-type]
        await side.reader.start()
        yield asking


@asynccontextmanager
async def process(stack: Stack, *module: str, service: str = "scheduler") -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m services.scheduler`, or what stands for it; ready when it comes."""
    settings = stack.settings(service)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BIDE_")}
    own = {
        "BIDE_DATABASE_URL": settings.database_url.get_secret_value(),
        "BIDE_AMQP_URL": settings.amqp_url.get_secret_value(),
        "BIDE_DRAIN_S": "1",
    }
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *(module or ("services.scheduler",)), cwd=ROOT, env={**environ, **own},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert running.stderr is not None
    try:
        async with asyncio.timeout(60):
            while b'"ready"' not in await running.stderr.readline():
                assert running.returncode is None
        drained = asyncio.create_task(running.stderr.read())
        yield running
        if running.returncode is None:
            running.kill()
        await drained
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


def in_a_moment(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.usefixtures("calendar")
async def test_a_schedule_from_the_question_to_the_tick_to_what_became_of_it(stack: Stack) -> None:
    async with (
        listening(stack, ScheduleTick) as ticks,
        listening(stack, ScheduleChanged) as changes,
        scheduler_service(stack),
        asker(stack) as proxy,
    ):
        schedule_id = uuid7()
        status, shown = await proxy.ask("create", schedule_id, body=whole(every_s=1, prompt="go"))
        assert (status, shown["rev"]) == (201, 1)
        await until(lambda: _has(ticks, 2))
        assert (await proxy.ask("pause", schedule_id))[1]["next_fire_at"] is None
        await proxy.side.publisher.publish(settled(ticks[0], "delivered", began_at=ticks[0].fire_at))

        async def counted() -> bool:
            return (await proxy.ask("show", schedule_id))[1]["run_count"] == 1

        await until(counted)
        first, second = sorted(each.fire_at for each in ticks[:2])
        seconds, rest = divmod(second - first, timedelta(seconds=1))
        assert (seconds >= 1, rest) == (True, timedelta(0)), "from the nominal moment, however late the first was"
        await until(lambda: _has(changes, 2))
        assert [(each.prompt, each.paused) for each in changes] == [("go", False), ("go", True)]


async def _has(facts: list[ScheduleTick] | list[ScheduleChanged], count: int) -> bool:
    return len(facts) >= count


async def test_three_processes_fire_ten_thousand_schedules_of_one_moment(calendar: Calendar, stack: Stack) -> None:
    """C-R3 C-S1: one is killed midway; by the bus and by the rows, none is lost and none is fired twice."""
    async with listening(stack, ScheduleTick) as ticks, AsyncExitStack() as exits:
        replicas = [await exits.enter_async_context(process(stack)) for _ in range(3)]
        moment = in_a_moment(8)  # later than the longest sleep: they know of it when it comes
        await many(calendar.pool, 10_000, moment)
        await until(lambda: _has(ticks, 1000), 60)
        replicas[0].kill()
        await replicas[0].wait()

        async def all_of_them() -> bool:
            return len({each.schedule_id for each in ticks}) == 10_000

        # What the killed one had claimed of its outbox is published by another when the claim has run out.
        await until(all_of_them, 90)
    assert len({each.queue_id for each in ticks}) == 10_000, "a tick that is published twice is the same item"
    assert {each.fire_at for each in ticks} == {moment}
    assert await calendar.pool.fetchval("SELECT count(*) FROM fires") == 10_000
    late = await calendar.pool.fetch("SELECT extract(epoch FROM at - fire_at)::float8 AS s FROM fires ORDER BY at")
    first, median, worst = (late[place]["s"] for place in (0, 5000, 9900))
    print(f"late first {first:.2f} s, p50 {median:.2f} s, p99 {worst:.2f} s; again {len(ticks) - 10_000}")


async def test_replicas_that_come_and_go_miss_no_second(calendar: Calendar, stack: Stack) -> None:
    """C-R4: a rolling restart, told to stop just before a fire."""
    schedule_id = await calendar.create(every_s=1)
    begun = (await calendar.row(schedule_id))["next_fire_at"]
    for _ in range(3):
        async with process(stack) as running:
            last = await calendar.pool.fetchval("SELECT max(fire_at) FROM fires")

            async def moved(last: datetime | None = last) -> bool:
                newest = await calendar.pool.fetchval("SELECT max(fire_at) FROM fires")
                return newest is not None and newest != last

            await until(moved)
            running.send_signal(signal.SIGTERM)
            await asyncio.wait_for(running.wait(), 30)
    fires = await calendar.fires(schedule_id)
    ends = (await calendar.row(schedule_id))["next_fire_at"]
    assert fires[0]["fire_at"] == begun
    assert sum(fire["count"] for fire in fires) == (ends - begun) // timedelta(seconds=1)
    assert not [fire for fire in fires if fire["outcome"] == "missed"]


@pytest.fixture
async def own(own_servers: Servers) -> AsyncIterator[Stack]:
    url = await asyncio.to_thread(own_servers.postgres.create_database, "calendar", TEMPLATE)
    yield Stack(url, own_servers.rabbitmq.url)
    await asyncio.to_thread(own_servers.postgres.drop_database, "calendar")


@pytest.mark.parametrize("server", ["postgres", "rabbitmq"])
async def test_a_server_that_is_away_at_the_fire_loses_none(own: Stack, own_servers: Servers, server: str) -> None:
    """C-D1 C-D2: killed before the moment, back after it; caught up within the window, counted right."""
    away = getattr(own_servers, server)
    settings = scheduler_settings(own)
    async with process(own) as running:
        async with open_pool(settings) as pool:
            ids = [await Calendar(settings, pool).create(every_s=1, name=str(n)) for n in range(3)]
            moment = await pool.fetchval("SELECT max(next_fire_at) FROM schedules")
        await asyncio.to_thread(away.kill)

        async def passed_by() -> bool:
            return bool(datetime.now(UTC) > moment + timedelta(seconds=3))

        await until(passed_by)
        await asyncio.to_thread(away.start)
        async with listening(own, ScheduleTick) as ticks, open_pool(settings) as pool:
            fired_at = datetime.now(UTC)

            async def caught_up() -> bool:
                return len({each.schedule_id for each in ticks if each.fire_at > fired_at}) == len(ids)

            await until(caught_up, 60)
            assert running.returncode is None
            running.send_signal(signal.SIGTERM)
            await asyncio.wait_for(running.wait(), 30)
            for schedule_id in ids:
                row = await Calendar(settings, pool).row(schedule_id)
                fires = await Calendar(settings, pool).fires(schedule_id)
                passed = (row["next_fire_at"] - row["anchor_at"]) // timedelta(seconds=1) - 1
                assert sum(fire["count"] for fire in fires) == row["fires_total"] == passed
                assert not [fire for fire in fires if fire["outcome"] == "missed"]
                stands_for = sum(each.merged_count for each in ticks if each.schedule_id == schedule_id)
                assert stands_for <= passed
                if server == "postgres":
                    assert any(fire["reason"] == "catch_up" for fire in fires)
