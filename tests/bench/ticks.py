"""How late ticks are when many schedules are due at once, and what the calendar costs when none is: F6.

The scheduler as a process, with its outbox and relay, durable servers, and no queue service: a consumer here takes the
ticks from the queue service's own queue. Lateness runs from the nominal moment to the tick in the consumer's hands, so
the claim, the commit, the outbox and the broker's disk are in it. Both ends read the clock of this machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import aio_pika
import asyncpg
from aio_pika.abc import AbstractIncomingMessage

from services.scheduler.store import SQL
from shared import topology
from shared.batches import decode_batch
from shared.database import Connection
from shared.facts import ScheduleTick
from tests.bench.claim import sample
from tests.bench.table import Row
from tests.bench.tools import cpu_s
from tests.chaos.kit.processes import Process, ring_without_links
from tests.conftest import Stack, until

_TABLES = "schedules, fires, audit, workspaces, outbox"
_BATCH = 500
"""Schedules of one claim, as the settings say."""

# Once on each working day, so that nothing fires again while it is measured; sixty rules in a zone with clock changes.
_LOAD = """
INSERT INTO scheduler.schedules (schedule_id, workspace_id, name, cron, timezone, anchor_at, prompt, context, overlap,
                                 priority, jitter_s, next_fire_at, due_at)
SELECT gen_random_uuid(), 'w' || n % 1000, n::text, n % 60 || ' 9 * * 1-5', 'Europe/Berlin', now(), 'look at it',
       'fresh', 'queue_one', 'TASK', 0, at, at
FROM generate_series($1::int + 1, $1 + $2) AS n,
     LATERAL (SELECT $3::timestamptz + make_interval(secs => $4::float8 * n)) AS moment (at)
"""
_CHUNK = 100_000


@dataclass(frozen=True)
class Loads:
    """How many schedules are due at once, are spread over so long, and lie there idle."""

    at_once: Sequence[int]
    spread: int
    spread_s: float
    idle: int
    watched_s: float
    """How long an idle scheduler is looked at."""


LOADS = Loads((10_000, 100_000), 100_000, 60.0, 1_000_000, 20.0)
SMOKE = Loads((500,), 500, 1.0, 10_000, 1.0)


@dataclass(frozen=True)
class Fired:
    """What became of schedules that were due. Seconds, sorted."""

    late_s: Sequence[float]
    repeated: int
    cpu_us: float
    """The scheduler's, a tick."""

    def late_at(self, part: float) -> float:
        return self.late_s[int(len(self.late_s) * part)]


@dataclass(frozen=True)
class Idle:
    """A calendar of which nothing, or one batch, is due."""

    cpu: float
    buffers: float
    buffers_due: float
    ms: float
    ms_due: float
    turn_ms: float


@dataclass(frozen=True)
class Found:
    at_once: dict[int, Fired]
    spread: Fired
    loads: Loads
    idle: Idle


async def run(stack: Stack, loads: Loads) -> Found:
    admin = await asyncpg.connect(stack.database_url)
    async with ring_without_links(stack, "scheduler-1") as services:
        scheduler = services["scheduler-1"]
        at_once = {size: await _fired(stack, admin, scheduler, size, over_s=0.0) for size in loads.at_once}
        spread = await _fired(stack, admin, scheduler, loads.spread, over_s=loads.spread_s)
        found = Found(at_once, spread, loads, await _idle(admin, scheduler, loads))
    await admin.close()
    return found


async def _fired(stack: Stack, admin: Connection, scheduler: Process, size: int, *, over_s: float) -> Fired:
    """Let `size` schedules come due, all at once or evenly over so long, and take their ticks."""
    await admin.execute(f"SET search_path = scheduler; TRUNCATE {_TABLES}")
    moment = datetime.now(UTC) + timedelta(seconds=8 + size / 8000)
    await _load(admin, size, moment, over_s / size)
    assert datetime.now(UTC) < moment, "they were due before all of them were there"
    async with _taking(stack) as taken:
        # Later than the longest sleep: it has looked, and knows when the first one comes.
        await asyncio.sleep((moment - datetime.now(UTC)).total_seconds())
        before = cpu_s(scheduler.pid)

        counted = there = 0

        async def all_there() -> bool:
            nonlocal counted, there
            there += sum(body.count(b'"schedule_id"') for _, body in taken[counted:])
            counted = len(taken)
            return there >= size

        await until(all_there, 120 + over_s)
        cpu = cpu_s(scheduler.pid) - before
        late: dict[object, float] = {}
        ticks = 0
        for at, body in taken:
            facts, unreadable = decode_batch(ScheduleTick, body)
            assert not unreadable
            ticks += len(facts)
            for fact in facts:
                late.setdefault(fact.schedule_id, at - fact.fire_at.timestamp())
    assert len(late) == size, f"{size - len(late)} schedules did not fire"
    return Fired(sorted(late.values()), ticks - size, cpu / size * 1e6)


async def _load(admin: Connection, size: int, moment: datetime, apart_s: float) -> None:
    for begun in range(0, size, _CHUNK):
        await admin.execute(_LOAD, begun, min(_CHUNK, size - begun), moment, apart_s)
    await admin.execute("ANALYZE scheduler.schedules")


@asynccontextmanager
async def _taking(stack: Stack) -> AsyncIterator[list[tuple[float, bytes]]]:
    """What comes to the queue service's queue of ticks, and when."""
    taken: list[tuple[float, bytes]] = []
    async with await aio_pika.connect(stack.amqp_url) as connection:
        channel = await connection.channel()
        await topology.declare(channel)
        queue = await channel.get_queue(topology.route(ScheduleTick, "queue").queue(""))
        await queue.purge()

        async def take(message: AbstractIncomingMessage) -> None:
            taken.append((time.time(), message.body))
            await message.ack()

        await queue.consume(take)
        yield taken


async def _idle(admin: Connection, scheduler: Process, loads: Loads) -> Idle:
    await admin.execute(f"SET search_path = scheduler; TRUNCATE {_TABLES}")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await _load(admin, loads.idle, tomorrow, 60 / loads.idle)
    await admin.execute("VACUUM (ANALYZE, FREEZE) schedules", timeout=600)
    before = cpu_s(scheduler.pid)
    await asyncio.sleep(loads.watched_s)
    cpu = (cpu_s(scheduler.pid) - before) / loads.watched_s * 100

    async def claim(now: datetime | None) -> None:
        rows = await admin.fetch(SQL["claim_due"], _BATCH, now)
        assert len(rows) in {0, _BATCH}

    none = await sample(admin, lambda: claim(None))
    due = await sample(admin, lambda: claim(tomorrow + timedelta(minutes=1)))
    look = await sample(admin, lambda: admin.fetchval(SQL["next_due_in"], None))
    return Idle(
        cpu, none["buffers"], due["buffers"], none["us"] / 1e3, due["us"] / 1e3, (none["us"] + look["us"]) / 1e3
    )


def rows(found: Found) -> list[Row]:
    made = []
    for size, fired in found.at_once.items():
        told = f"tick published, {size:,} schedules due at once"
        goal = 2.0 if size <= 10_000 else 10.0
        again = f", {fired.repeated} published again" if fired.repeated else ""
        note = f"the last {fired.late_s[-1]:.2f} s; {size / fired.late_s[-1]:,.0f}/s{again}"
        made += [
            Row(figure="F6", what=f"{told}: lateness p50", value=fired.late_at(0.5), unit="s"),
            Row(figure="F6", what=f"{told}: lateness p99", value=fired.late_at(0.99), unit="s", goal=goal,
                at_most=True, cpu_us=fired.cpu_us, note=note),
        ]  # fmt: skip
    spread, idle, loads = found.spread, found.idle, found.loads
    told = f"tick published, {loads.spread:,} over {loads.spread_s:.0f} s"
    among = f"among {loads.idle:,} idle schedules"
    return [
        *made,
        Row(figure="F6", what=f"{told}: lateness p99", value=spread.late_at(0.99) * 1000, unit="ms",
            cpu_us=spread.cpu_us, note=f"p50 {spread.late_at(0.5) * 1000:.0f} ms, the last {spread.late_s[-1]:.2f} s"),
        Row(figure="F6", what=f"claim of none, {among}", value=idle.buffers, unit="buffers",
            note=f"{idle.ms:.2f} ms; with the look at what comes next {idle.turn_ms:.2f} ms"),
        Row(figure="F6", what=f"claim of {_BATCH}, {among}", value=idle.buffers_due, unit="buffers",
            note=f"{idle.ms_due:.1f} ms"),
        Row(figure="F6", what=f"idle scheduler, {among}: CPU", value=idle.cpu, unit="%", goal=1, at_most=True),
    ]  # fmt: skip
