"""What a claim costs from a short line to a very long one: F7 of the performance goals.

Buffers are exact, times are rough. `--large` adds ten million rows (about 8 GB of disk).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg

from services.queue.store import SQL
from shared.database import Connection
from tests.bench.table import Row
from tests.conftest import Stack
from tests.integration import claim_kit
from tests.integration.claim_kit import Bench, explain, held_snapshot

CYCLES = 5_000
SAMPLES = 20
LARGE = 10_000_000
OTHERS = 20
Figures = dict[str, float]


async def sample(connection: Connection, work: Callable[[], Awaitable[Any]]) -> Figures:
    """Median buffers and microseconds of `work`, each time rolled back."""
    buffers, times = [], []
    for _ in range(SAMPLES):
        transaction = connection.transaction()
        await transaction.start()
        before = await connection.fetchval(claim_kit.FETCHED)
        begun = time.perf_counter()
        await work()
        times.append((time.perf_counter() - begun) * 1e6)
        buffers.append(await connection.fetchval(claim_kit.FETCHED) - before)
        await transaction.rollback()
    return {"buffers": statistics.median(buffers), "us": statistics.median(times)}


async def measure(stack: Stack, bench: Bench, admin: Connection, rows: int) -> dict[str, Any]:
    await claim_kit.empty(bench.pool)
    found: dict[str, Any] = {"cycles": min(CYCLES, rows - SAMPLES)}
    async with bench.pool.acquire() as connection:

        async def claim() -> None:
            await bench.claim_alone(connection, "w")

        async with claim_kit.never_analysed(admin):
            # Its plans are those of an empty table, as a service's are that started before the flood.
            await claim_kit.load(connection, "small", 30)
            await bench.cycles(connection, "small", 12)
            begun = time.perf_counter()
            await claim_kit.load(connection, "w", rows)
            found["load_s"] = time.perf_counter() - begun
            found["never analysed"] = await sample(connection, claim)
            nodes = await explain(connection, "claim_items", "'{w}', '{1}', '{0}', 'me', NULL")
            found["sorts"] = sum("Sort" in node["Node Type"] for node in nodes)
        await admin.execute("VACUUM ANALYZE queue.a2a_queue, queue.workspaces", timeout=600)
        found["plain"] = await sample(connection, claim)
        found["turn"] = await sample(connection, lambda: bench.turn(connection, "w"))
        found["list 50"] = await sample(
            connection, lambda: connection.fetch(SQL["list_waiting"], "w", None, -1, -1, UUID(int=0), 51, None)
        )
        found["position"] = await sample(
            connection, lambda: connection.fetchval(SQL["count_ahead"], "w", 1, 1 << 60, UUID(int=0))
        )
        found["depth"] = await sample(connection, lambda: connection.fetch(SQL["read_workspaces"], ["w"]))
        found["expiry"] = await sample(connection, lambda: connection.fetch(SQL["ending_items"], None, None, None, 500))
        async with held_snapshot(stack):
            await bench.cycles(connection, "w", found["cycles"])
            found["held"] = await sample(connection, claim)
    return found


async def others(bench: Bench, *, flood: bool) -> float:
    """p99 in ms of other workspaces' claims, alone or while one workspace takes 100 new items at a time."""
    await claim_kit.empty(bench.pool)
    done = asyncio.Event()

    async def flooding() -> None:
        at = 0
        async with bench.pool.acquire() as connection:
            while not done.is_set():
                await claim_kit.load(connection, "flooded", 100, after=at)
                await bench.cycles(connection, "flooded", 1)
                at += 100

    times = []
    async with bench.pool.acquire() as connection:
        for number in range(OTHERS):
            await claim_kit.load(connection, f"o{number}", 50)
        task = asyncio.create_task(flooding()) if flood else None
        for _ in range(40):
            for number in range(OTHERS):
                begun = time.perf_counter()
                await bench.cycles(connection, f"o{number}", 1)
                times.append((time.perf_counter() - begun) * 1e3)
        done.set()
        if task is not None:
            await task
    return sorted(times)[int(len(times) * 0.99)]


async def run(stack: Stack, sizes: list[int]) -> dict[str, Any]:
    admin = await asyncpg.connect(stack.database_url)
    async with claim_kit.bench(stack) as bench:
        found: dict[str, Any] = {"sizes": {size: await measure(stack, bench, admin, size) for size in sizes}}
        pairs = [(await others(bench, flood=False), await others(bench, flood=True)) for _ in range(3)]
        found["others_p99_ms"] = {
            "alone": statistics.median(pair[0] for pair in pairs),
            "flood": statistics.median(pair[1] for pair in pairs),
        }
    await admin.close()
    return found


def rows(found: dict[str, Any]) -> list[Row]:
    sizes = found["sizes"]
    made = []
    for size, row in sizes.items():
        told = f"{size:,} waiting"
        plain, held = row["plain"]["buffers"], row["held"]["buffers"]
        note = f"{row['plain']['us'] / 1000:.1f} ms; never analysed {row['never analysed']['buffers']:.0f} buffers"
        rest = " · ".join(f"{row[name]['buffers']:.0f}" for name in ("position", "depth", "expiry"))
        made += [
            Row(figure="F7", what=f"whole claim, {told}", value=plain, unit="buffers", goal=28, at_most=True,
                note=f"{note}, {row['sorts']} sorts; a whole turn {row['turn']['buffers']:.0f}"),
            Row(figure="F7", what=f"the same under a held snapshot, {row['cycles']:,} cycles old", value=held / plain,
                unit="x", goal=3, at_most=True),
            Row(figure="F7", what=f"listing 50 · position · depth · expiry, {told}", value=row["list 50"]["buffers"],
                unit="buffers", note=rest),
        ]  # fmt: skip
    buffers = [row["plain"]["buffers"] for row in sizes.values()]
    p99 = found["others_p99_ms"]
    return [
        *made,
        Row(figure="F7", what="whole claim, longest line", value=buffers[-1], unit="buffers", goal=1.5 * buffers[0] + 8,
            at_most=True, note="goal: 1.5 x the shortest + 8"),
        Row(figure="F7", what="others' claim p99 under one workspace's flood, of alone", unit="x",
            value=p99["flood"] / p99["alone"], note=f"{p99['alone']:.1f} and {p99['flood']:.1f} ms"),
    ]  # fmt: skip
