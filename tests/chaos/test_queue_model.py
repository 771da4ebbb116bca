"""The queue against a model, on a real Postgres: any order of messages, turns, endings, deaths, beats and commands.

Postgres runs in the test's time, so every clock is predicted, through a pause too. After every step each row is what
the model says it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from shared.database import transact
from shared.facts import MessageBusy, QueueQuery, WorkspaceRegistered
from tests.chaos.kit.machine import run_machine, steps_of
from tests.chaos.kit.model_machine import QueueMachine
from tests.chaos.kit.model_rig import Rig, open_rig
from tests.conftest import Stack, until
from tests.integration.queue_kit import digest
from tests.integration.rows_kit import message

STEPS = steps_of(2500)


@pytest.mark.timeout(1200)
def test_whatever_happens_in_whatever_order_the_rows_are_what_the_model_says(stack: Stack) -> None:
    """I1 to I4; A-Q-01, A-Q-03, A-Q-04, A-Q-12, A-Q-22, A-Q-23, B-01, B-02, B-03, B-04, B-05, B-06, B-12, B-13."""
    run_machine(QueueMachine, "rig", open_rig(stack), steps=STEPS, each=44)
    assert QueueMachine.steps >= min(STEPS, 2000)


@pytest.fixture
async def rig(stack: Stack) -> AsyncIterator[Rig]:
    async with open_rig(stack) as opened:
        await opened.empty()
        yield opened


async def counted(rig: Rig) -> tuple[Any, ...]:
    row = await rig.pool.fetchrow("SELECT waiting, running FROM workspaces")
    return tuple(row or ())


async def test_two_deliveries_of_one_item_that_end_in_one_turn_are_not_mixed_up(rig: Rig) -> None:
    """B-03, B-06: a stalled replica claims again what was taken from it; both of its deliveries fail together."""
    stalled, heir = await rig.replica(), await rig.replica()
    registered = WorkspaceRegistered(
        workspace_id="w", rev=1, incarnation=1, url="http://agent.example", max_concurrent_tasks=3
    )
    await rig.read(WorkspaceRegistered, stalled.handlers.registered, [registered])
    first, other = message("w"), message("w")
    await rig.read(MessageBusy, stalled.handlers.message_busy, [first, other])
    await rig.turn(stalled)
    for silent, judge in ((stalled, heir), (heir, stalled)):  # the heir takes it, and dies with it
        await rig.silence([silent.name])
        await rig.ripen(judge.name)
        async with rig.long_ago([silent.name]):
            await judge.loops.beat()
        await rig.turn(judge)
    for said, number in (("busy", 1), ("failed_attempt", 3)):
        await rig.answer(stalled, (str(first.queue_id), number), said)
    while stalled.endings():
        await rig.turn(stalled)
    row = await rig.pool.fetchrow(
        "SELECT status, attempts, delivery_no FROM a2a_queue WHERE queue_id = $1", first.queue_id
    )
    assert tuple(row or ()) == ("queued", 3, 3), (
        "one attempt for each owner's death, one for the failure, none for busy"
    )
    assert await counted(rig) == (1, 1)


async def test_a_cancel_that_meets_a_return_to_the_queue_is_not_lost(rig: Rig) -> None:
    """B-13: it reads the item as being delivered; before it has the lock, the item waits again."""
    replica = await rig.replica()
    registered = WorkspaceRegistered(workspace_id="w", rev=1, incarnation=1, url="http://agent.example")
    await rig.read(WorkspaceRegistered, replica.handlers.registered, [registered])
    fact = message("w")
    await rig.read(MessageBusy, replica.handlers.message_busy, [fact])
    await rig.turn(replica)
    await rig.answer(replica, (str(fact.queue_id), 1), "busy")
    query = QueueQuery(
        workspace_id="-", rev=1, query_id=uuid7(), verb="cancel", queue_id=fact.queue_id, caller_hash=digest("c"),
        expires_at=fact.occurred_at.replace(year=fact.occurred_at.year + 1), reply_to="door",
    )  # fmt: skip

    async def waits_for_the_lock() -> bool:
        count: int = await rig.pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return count > 0

    async with rig.pool.acquire() as connection:
        held = connection.transaction()
        await held.start()
        await connection.fetch("SELECT FROM workspaces FOR UPDATE")
        turn = asyncio.create_task(rig.turn(replica))
        await until(waits_for_the_lock)  # the turn is first in the line
        cancel = asyncio.create_task(transact(rig.pool, lambda connection: replica.answers.query(connection, [query])))

        async def both_wait() -> bool:
            count: int = await rig.pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            return count > 1

        await until(both_wait)
        await held.rollback()
    tell = await cancel
    assert tell is not None
    tell()
    await turn
    assert rig.broker.answered[query.query_id].status == 200
    assert await rig.pool.fetchval("SELECT status FROM a2a_finished WHERE queue_id = $1", fact.queue_id) == "canceled"
    assert await counted(rig) == (0, 0)
