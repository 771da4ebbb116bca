"""What a claim and its neighbours cost with a full queue: buffers and plans, whatever the machine (F7)."""

from __future__ import annotations

import random
import statistics
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.queue.decide import Item, Reply
from services.queue.deliver import Ending
from services.queue.handlers import Handlers
from shared.database import Connection
from shared.facts import MessageBusy, Priority
from tests.conftest import Stack
from tests.integration import claim_kit
from tests.integration.claim_kit import Bench, explain, held_snapshot
from tests.integration.queue_kit import digest

ROWS = 100_000
CLAIM_MAX = 28
"""The lock, the claim and the counters, as the design counts them."""
TURN_MAX = 34
"""And what the turn tells of the workspace: its deliveries are read."""


@pytest.fixture
async def bench(stack: Stack) -> AsyncIterator[Bench]:
    async with claim_kit.bench(stack) as made:
        await claim_kit.empty(made.pool)
        yield made
        await claim_kit.empty(made.pool)


@pytest.fixture
async def never_analysed(admin: asyncpg.Connection[asyncpg.Record], bench: Bench) -> AsyncIterator[Bench]:
    """As just after a flood."""
    async with claim_kit.never_analysed(admin):
        yield bench


async def use_plans_of_an_empty_table(bench: Bench, connection: Connection) -> None:
    """Claim until the connection has settled on its plans: asyncpg keeps them for its life."""
    await claim_kit.load(connection, "small", 30)
    await bench.cycles(connection, "small", 12)


async def test_a_claim_touches_few_buffers_whatever_its_plans_were_made_for(
    never_analysed: Bench, admin: asyncpg.Connection[asyncpg.Record]
) -> None:
    """B-24: plans of an empty table, of one never analysed, of one analysed: the same claim among 100,000 items."""
    bench = never_analysed
    async with bench.pool.acquire() as old:
        await use_plans_of_an_empty_table(bench, old)
        await claim_kit.load(old, "w", ROWS)
        counts = {"plans of an empty table": [(await bench.claim(old, "w"))[1] for _ in range(8)]}
        async with bench.pool.acquire() as new:
            counts["never analysed"] = [(await bench.claim(new, "w"))[1] for _ in range(8)]
            await admin.execute("VACUUM ANALYZE queue.a2a_queue, queue.workspaces")
            counts["analysed"] = [(await bench.claim(new, "w"))[1] for _ in range(8)]
    print(counts)
    # The first claim of a connection, and of a table that was vacuumed, reads the indexes' meta pages as well.
    assert all(max(each[1:]) <= TURN_MAX for each in counts.values()), counts
    async with bench.pool.acquire() as connection:
        alone = [await bench.touched(connection, lambda: bench.claim_alone(connection, "w")) for _ in range(8)]
    print(alone)
    # One that meets the end of a page touches a neighbour and the free space map as well.
    assert statistics.median(alone) <= CLAIM_MAX, alone
    assert max(alone[1:]) <= TURN_MAX, alone


async def test_an_ending_and_a_return_touch_few_buffers_with_plans_of_an_empty_table(never_analysed: Bench) -> None:
    bench = never_analysed
    async with bench.pool.acquire() as connection:
        await use_plans_of_an_empty_table(bench, connection)
        await claim_kit.load(connection, "w", ROWS)
        replies: list[Reply] = ["delivered", "preempted"]
        for reply in replies:
            turn = await bench.turn(connection, "w")
            _, touched = await bench.claim(connection, "w", [Ending(turn.items[0], reply, b"{}")])
            assert touched <= 3 * TURN_MAX, reply
            await bench.turn(connection, "w", [Ending(turn.items[0], "delivered", b"{}")], room=0)


LISTED = "'w', NULL, -1::smallint, -1, '00000000-0000-0000-0000-000000000000'"
FAR = "'w', 1::smallint, 9999999999999, '00000000-0000-0000-0000-000000000000'"
PLANS = {
    "claim_items": ("'{w}', '{1}', '{0}', 'me', NULL", "a2a_queue_waiting", 30),
    "line_heads": ("'{w,w}', '{2,2}', '{0,1}', '{0,0}', NULL", "a2a_queue_waiting", 20),
    "oldest_items": ("'{w,w}', '{0,1}', now()", "a2a_queue_waiting", 20),
    "list_waiting": (f"{LISTED}, 51, NULL", "a2a_queue_waiting", 70),
    "count_ahead": (FAR, "a2a_queue_waiting", 1100),
    "find_ticks": ("'{w}', ARRAY[sha256('schedule')]", "a2a_queue_key", 10),
    "ending_items": ("NULL, NULL, NULL, 500", "a2a_queue_ending", 10),
    "running_items": ("'{w}', '{1}'", "a2a_queue_running", 10),
    "lock_workspaces": ("'{w}', NULL", "workspaces_pkey", 10),
    "waiting_workspaces": ("'', 500", "workspaces_active", 10),
}


async def test_no_statement_sorts_or_reads_a_table_that_was_never_analysed(never_analysed: Bench) -> None:
    """B-24: by the generic plan, made while the tables were empty or while they were full."""
    async with never_analysed.pool.acquire() as connection:
        for rows in (3, ROWS):
            await claim_kit.load(connection, "w", rows, after=0 if rows == 3 else 3)
            for name, (arguments, index, most) in PLANS.items():
                nodes = await explain(connection, name, arguments)
                kinds = {node["Node Type"] for node in nodes}
                assert not kinds & {"Sort", "Incremental Sort", "Seq Scan", "Bitmap Heap Scan", "Hash Join"}, (
                    name,
                    nodes,
                )
                assert index in {node.get("Index Name") for node in nodes}, (name, nodes)
                touched = nodes[0]["Shared Hit Blocks"] + nodes[0]["Shared Read Blocks"]
                assert touched <= most, (name, nodes)


async def test_a_snapshot_held_open_elsewhere_does_not_slow_the_claim(bench: Bench, stack: Stack) -> None:
    """B-20, B-24: a backup runs; nothing that ended since can be cleared away, and no claim meets it."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 5_000)
        plain = min([(await bench.claim(connection, "w"))[1] for _ in range(4)])
        async with held_snapshot(stack):
            await bench.cycles(connection, "w", 2_000)
            held = [(await bench.claim(connection, "w"))[1] for _ in range(4)]
            dead = await connection.fetchval("SELECT pg_relation_size('workspaces') / 8192")
    print(f"plain {plain}, held {held}")
    assert dead > 30, "the snapshot did not hold: the workspace's earlier versions were cleared away"
    assert max(held) <= 3 * plain
    assert max(held[1:]) <= 2 * TURN_MAX


# ── the floor ────────────────────────────────────────────────────────────────────────────────────────────────────────


def message(chance: random.Random, now: datetime) -> MessageBusy:
    """A message that may come late, out of turn, or wait by its own clock."""
    queue_id = UUID(int=uuid7().int - (chance.choice([0, 0, 300, 3_000]) << 80))
    return MessageBusy(
        workspace_id="w", rev=1, queue_id=queue_id, caller_id="c", caller_hash=digest("c"),
        priority=chance.choice([Priority.TASK, Priority.TASK, Priority.TASK, Priority.CRITICAL]),
        key_hash=digest(str(queue_id)), body_hash=digest("b"), reason="backlog", method="message/send", body=b"{}",
        not_before=chance.choice([None, None, now, now + timedelta(seconds=2)]),
    )  # fmt: skip


_NEXT = """
SELECT queue_id FROM a2a_queue WHERE status = 'queued' AND (not_before IS NULL OR not_before <= $1)
ORDER BY lane, rank_ms, queue_id LIMIT 1
"""
_BELOW = """
SELECT count(*) FROM a2a_queue q JOIN workspaces w USING (workspace_id)
WHERE q.status = 'queued' AND q.rank_ms < w.floors[1 + q.lane]
"""


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_waits_is_ever_below_the_floor(bench: Bench, seed: int) -> None:
    """B-01: late, out of turn, returned, waiting by its own clock: each claim takes the first of all that it may."""
    chance = random.Random(seed)
    handlers = Handlers(bench.drain._settings, bench.drain._publisher, bench.drain)
    replies: list[Reply] = ["delivered", "preempted", "written_back", "failed_attempt"]
    held: list[Item] = []
    claimed = raised = 0
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 1)
        await connection.execute("UPDATE workspaces SET max_concurrent = 3")
        for _ in range(150):
            now = datetime.now(UTC) + timedelta(seconds=chance.random() * 3)
            match chance.choice(["put", "put", "claim", "claim", "claim", "end", "end"]):
                case "put":
                    async with connection.transaction():
                        await handlers.message_busy(connection, [message(chance, now) for _ in range(2)])
                case "claim":
                    wanted = await connection.fetchval(_NEXT, now) if len(held) < 3 else None
                    turn = await bench.turn(connection, "w", now=now)
                    assert [item.queue_id for item in turn.items] == ([wanted] if wanted else [])
                    held += turn.items
                    claimed += len(turn.items)
                case "end" if held:
                    item = held.pop(chance.randrange(len(held)))
                    await bench.turn(connection, "w", [Ending(item, chance.choice(replies), b"{}")], room=0, now=now)
            assert await connection.fetchval(_BELOW) == 0
            raised += await connection.fetchval("SELECT floors[2] > 0 FROM workspaces")
    assert claimed > 20
    assert raised > 50, "the floor never rose: the test shows nothing"
