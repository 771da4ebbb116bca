"""Scheduler and queue as they run, and an agent: what becomes of fires that have to wait, and what is told of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import aio_pika
from prometheus_client import REGISTRY

from bide_agent.agent import Agent
from shared.facts import ScheduleTick
from shared.topology import route
from tests.conftest import Stack, until
from tests.integration.calendar_kit import LONG, free, said
from tests.integration.queue_kit import Door, agent, door, queue_service
from tests.integration.scheduler_kit import Calendar, calendar, scheduler_service, whole
from tests.integration.test_scheduler_service import Asker, asker

__all__ = ["calendar"]


@dataclass(frozen=True)
class Day:
    """A workspace with one schedule of each second, whose prompt is "before"."""

    calendar: Calendar
    proxy: Asker
    name: str
    schedule_id: UUID

    async def make(self, **body: Any) -> None:
        made = await self._ask("create", body=whole(every_s=1, prompt="before", **body))
        assert made[0] == 201, made

    async def last_fire(self) -> None:
        """Let it fire no more for an hour."""
        changed = await self._ask("patch", body={"prompt": "after", "every_s": 3600})
        assert changed[0] == 200, changed

    async def counted(self, what: str, least: int) -> None:
        async def reached() -> bool:
            return int((await self.calendar.row(self.schedule_id))[what]) >= least

        await until(reached)

    async def shown(self) -> dict[str, Any]:
        return (await self._ask("show"))[1]

    async def fires(self) -> list[dict[str, Any]]:
        _, page = await self._ask("fires", limit=100)
        items: list[dict[str, Any]] = page["items"]
        return items

    async def _ask(self, verb: str, **about: Any) -> tuple[int, dict[str, Any]]:
        return await self.proxy.ask(verb, self.schedule_id, workspace_id=self.name, **about)


@asynccontextmanager
async def day(calendar: Calendar, stack: Stack) -> AsyncIterator[Day]:
    async with scheduler_service(stack), asker(stack) as proxy:
        yield Day(calendar, proxy, f"w-{uuid4().hex[:8]}", uuid4())


@asynccontextmanager
async def queue_and_agent(stack: Stack, name: str, **options: Any) -> AsyncIterator[tuple[Door, Agent]]:
    async with door(stack) as front, queue_service(stack, sweep_s=0.3), agent(name, **options) as worker:
        await front.register(name, worker.url)
        yield front, worker


def pulse() -> float:
    """When the calendar's loop has turned last."""
    return REGISTRY.get_sample_value("bide_loop_last_turn_timestamp_seconds", {"loop": "ticking"}) or 0.0


async def test_the_calendar_goes_on_while_a_fire_of_it_runs(calendar: Calendar, stack: Stack) -> None:
    """A-S-02 A-S-05: the loop's pulse is its own, and what comes due meanwhile is neither lost nor run beside it."""
    async with day(calendar, stack) as today, queue_and_agent(stack, today.name, work_s=LONG) as (_, worker):
        await today.make()
        await worker.until(lambda: worker.active == 1)
        turned_at = pulse()
        await today.counted("bounces", 4)

        async def has_turned() -> bool:
            return pulse() > turned_at

        await until(has_turned)
        assert len(worker.received) == 1
        await today.last_fire()
        worker.behave(work_s=0.01)
        free(worker)
        await today.counted("run_count", 2)
        shown = await today.shown()
        assert shown["fires"] == sum(said(each)["merged_count"] for each in worker.received)
        assert shown["fires"] == shown["counts"]["delivered"] + shown["counts"]["coalesced"]


async def test_fires_while_no_queue_service_runs_wait_in_the_broker_and_are_one_tick(
    calendar: Calendar, stack: Stack
) -> None:
    """C-D3."""
    async with day(calendar, stack) as today:
        await today.make()
        await today.counted("fires_total", 5)
        await today.last_fire()

        async def published() -> bool:
            return not await calendar.pool.fetchval("SELECT EXISTS (SELECT FROM outbox)")

        await until(published)
        assert await _waiting_in_the_broker(stack) >= 1
        async with queue_and_agent(stack, today.name, work_s=LONG) as (front, worker):
            # Whoever registers first is told the first of them: nobody said how fast the queue reads them all.
            await worker.until(lambda: worker.active == 1)
            shown = await today.shown()

            async def all_told() -> bool:
                waits = "SELECT coalesce(sum(merged_count), 0) FROM a2a_queue WHERE workspace_id = $1"
                return bool(await front.side.pool.fetchval(waits, today.name) == shown["fires"])

            await until(all_told)
            worker.behave(work_s=0.01)
            free(worker)
            await today.counted("delivered", 1)

            async def settled() -> bool:
                now = await today.shown()
                return bool(now["counts"]["delivered"] + now["counts"]["coalesced"] == now["fires"])

            await until(settled)
            assert len(worker.received) <= 2
            assert sum(said(each)["merged_count"] for each in worker.received) == shown["fires"]


async def _waiting_in_the_broker(stack: Stack) -> int:
    async with await aio_pika.connect(stack.amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(route(ScheduleTick, "queue").queue(""), passive=True)
        assert queue.declaration_result.message_count is not None
        return queue.declaration_result.message_count


async def test_a_window_that_passes_while_a_tick_waits_does_not_end_it(calendar: Calendar, stack: Stack) -> None:
    """C-B6: the window is for what no scheduler saw. What waits behind a session runs once, as the newest of them."""
    async with day(calendar, stack) as today, queue_and_agent(stack, today.name, work_s=LONG) as (front, worker):
        await front.keep(front.busy(today.name, "a session"))
        await worker.until(lambda: worker.active == 1)
        await today.make(catchup_window_s=1)
        await today.counted("bounces", 4)
        await today.last_fire()

        async def applied() -> bool:
            return any((each.schedule_id, each.rev) == (today.schedule_id, 2) for each in front.applied)

        await until(applied)
        worker.behave(work_s=0.01)
        free(worker)
        await today.counted("run_count", 1)
        fires = await today.fires()
        assert {fire["outcome"] for fire in fires} == {"delivered", "coalesced"}
        (ran,) = [fire for fire in fires if fire["outcome"] == "delivered"]
        assert ran["fire_at"] == fires[-1]["fire_at"], "it waited longest, far beyond its window"
        told = said(worker.received[1])
        assert (told["merged_count"], told["last_fire_at"]) == (len(fires), fires[0]["fire_at"])
        assert worker.received[1].text == "after"


async def test_what_went_wrong_with_a_fire_can_be_read_where_fires_are_listed(calendar: Calendar, stack: Stack) -> None:
    """A-S-08: the fire says why it failed, and names the item that has the error's words."""
    refusing = {"work_s": 0.01, "refusing": -1}
    async with day(calendar, stack) as today, queue_and_agent(stack, today.name, behaviour=refusing) as (front, _):
        await today.make()
        await today.counted("failed", 1)
        await today.last_fire()
        first = (await today.fires())[-1]
        assert (first["outcome"], first["reason"]) == ("failed", "refused")
        item = await front.item(UUID(first["queue_id"]))
        assert "-32602" in item["last_error"]
