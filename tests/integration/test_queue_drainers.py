"""Twelve drainers on four workspaces: nobody twice, nobody out of turn, never more at once than the agent takes.

The same check is run on the product's turn and on the ways of claiming that look right and are not.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from uuid import UUID

import asyncpg
import pytest

from services.queue.decide import Item
from services.queue.deliver import Ending
from shared.database import Connection
from tests.conftest import Stack
from tests.integration import claim_kit
from tests.integration.claim_kit import Bench

DRAINERS = 12
ITEMS = 600
CAPACITY = {"w1": 1, "w2": 1, "w3": 1, "w4": 3}
_DISPATCHED = "SELECT workspace_id, queue_id FROM a2a_finished ORDER BY workspace_id, dispatched_at"

Claim = Callable[[Connection, str], Awaitable[UUID | None]]
Finish = Callable[[Connection, UUID], Awaitable[object]]


@dataclass(slots=True)
class Seen:
    """What the agents saw."""

    begun: dict[str, list[UUID]] = field(default_factory=lambda: {name: [] for name in CAPACITY})
    running: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    async def deliver(self, name: str, queue_id: UUID, chance: random.Random) -> None:
        self.begun[name].append(queue_id)
        self.running[name] += 1
        self.most[name] = max(self.most[name], self.running[name])
        for _ in range(chance.randrange(40)):  # others get their turns meanwhile
            await asyncio.sleep(0)
        self.running[name] -= 1

    def wrong(self, order: Mapping[str, list[UUID]]) -> dict[str, int]:
        """How often each promise was broken; `order` is that in which the database dispatched."""
        return {
            "delivered twice": sum(len(ids) - len(set(ids)) for ids in self.begun.values()),
            "out of turn": sum(later < earlier for ids in order.values() for earlier, later in pairwise(ids)),
            "above capacity": sum(max(0, self.most[name] - most) for name, most in CAPACITY.items()),
        }


@pytest.fixture
async def bench(stack: Stack) -> AsyncIterator[Bench]:
    async with claim_kit.bench(stack) as made:
        await claim_kit.empty(made.pool)
        yield made
        await claim_kit.empty(made.pool)


async def fill(bench: Bench, items: int) -> None:
    async with bench.pool.acquire() as connection:
        for number, (name, most) in enumerate(CAPACITY.items()):
            await claim_kit.load(connection, name, items, after=number * items)
            await connection.execute(
                "UPDATE workspaces SET waiting = $2, max_concurrent = $3 WHERE workspace_id = $1", name, items, most
            )


async def connections(stack: Stack) -> list[asyncpg.Connection[asyncpg.Record]]:
    """One each: as replicas have, and more than a pool gives."""
    url = stack.settings().database_url.get_secret_value()
    return [await asyncpg.connect(url) for _ in range(DRAINERS)]


async def test_twelve_drainers_deliver_each_item_once_in_its_turn_within_capacity(bench: Bench, stack: Stack) -> None:
    """B-01, B-02: 600 items in each of four workspaces."""
    await fill(bench, ITEMS)
    seen, left = Seen(), ITEMS * len(CAPACITY)

    async def drainer(connection: Connection, chance: random.Random) -> None:
        nonlocal left
        held: list[tuple[str, Item]] = []
        while left or held:
            name = chance.choice(list(CAPACITY))
            endings = [Ending(item, "delivered", b"{}") for of, item in held if of == name]
            turn = await bench.turn(connection, name, endings)
            held = [each for each in held if each[0] != name]
            left -= len(endings)
            for item in turn.items:
                await seen.deliver(name, item.queue_id, chance)
                held.append((name, item))

    drainers = await connections(stack)
    await asyncio.gather(*(drainer(each, random.Random(seed)) for seed, each in enumerate(drainers)))
    order: dict[str, list[UUID]] = {name: [] for name in CAPACITY}
    for row in await bench.pool.fetch(_DISPATCHED):
        order[row["workspace_id"]].append(row["queue_id"])
    for each in drainers:
        await each.close()
    assert {name: len(ids) for name, ids in order.items()} == dict.fromkeys(CAPACITY, ITEMS)
    assert seen.wrong(order) == {"delivered twice": 0, "out of turn": 0, "above capacity": 0}
    assert seen.most["w4"] > 1, "the capacity was never used: the test shows nothing"


# ── forms that fail ──────────────────────────────────────────────────────────────────────────────────────────────────

_TAKE = """
UPDATE a2a_queue
SET status = 'dispatched', owner = 'me', delivery_no = delivery_no + 1, dispatched_at = clock_timestamp()
"""
_FIRST = "SELECT queue_id FROM a2a_queue WHERE workspace_id = {name} AND status = 'queued' ORDER BY rank_ms LIMIT 1"
_FREE = "NOT EXISTS (SELECT FROM a2a_queue o WHERE o.workspace_id = {name} AND o.status = 'dispatched')"
FORMS = {
    "no lock": f"{_TAKE} WHERE queue_id = ({_FIRST}) RETURNING queue_id",
    "skip locked alone": f"{_TAKE} WHERE queue_id = ({_FIRST} FOR UPDATE SKIP LOCKED) RETURNING queue_id",
    "the key's row and the claim in one statement": f"""
        WITH held AS (SELECT workspace_id FROM workspaces w WHERE workspace_id = $1 AND {_FREE} FOR UPDATE SKIP LOCKED)
        {_TAKE} FROM held WHERE queue_id = ({_FIRST.replace("{name}", "held.workspace_id")}) RETURNING queue_id""",
}


@pytest.mark.parametrize("form", FORMS)
async def test_the_check_catches_the_ways_of_claiming_that_are_wrong(bench: Bench, stack: Stack, form: str) -> None:
    """B-01, A-Q-23: each of them breaks a promise within a few rounds, or the test above could not fail."""
    statement = FORMS[form].replace("{name}", "$1")
    drainers = await connections(stack)
    broken: dict[str, int] = {}
    for round_number in range(8):
        await claim_kit.empty(bench.pool)
        await fill(bench, 150)
        broken = await _run_form(drainers, statement, round_number)
        if any(broken.values()):
            break
    for each in drainers:
        await each.close()
    print(form, broken)
    assert any(broken.values()), "the wrong form went unnoticed"


async def _run_form(
    drainers: list[asyncpg.Connection[asyncpg.Record]], statement: str, round_number: int
) -> dict[str, int]:
    seen = Seen()

    async def drainer(connection: Connection, chance: random.Random) -> None:
        misses = 0
        while misses < 20:
            name = chance.choice(list(CAPACITY))
            queue_id = await connection.fetchval(statement, name)
            misses = misses + 1 if queue_id is None else 0
            if queue_id is not None:
                await seen.deliver(name, queue_id, chance)
                await connection.execute("DELETE FROM a2a_queue WHERE queue_id = $1", queue_id)

    await asyncio.gather(*(drainer(each, random.Random(100 * round_number + n)) for n, each in enumerate(drainers)))
    return seen.wrong(seen.begun)
