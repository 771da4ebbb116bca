"""Where two promises of the queue meet: a pause and a removal, a listing and a cursor that it never gave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from shared.facts import Priority, WorkspaceBacklog, WorkspaceRemoved
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.queue_kit import Door, door, queue_service

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, inbox, outbox, dead_letters"
NOWHERE = "http://127.0.0.1:20001"


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Door]:
    """An empty queue service and a door to it, and at the end no fact that was set aside."""
    async with door(stack) as opened:
        await opened.side.pool.execute(f"TRUNCATE {TABLES}")
        async with queue_service(stack, sweep_s=0.5, reconcile_s=0.5):
            yield opened
        letters = await opened.side.pool.fetch("SELECT fact_type, reason, error FROM dead_letters")
        assert not letters, letters


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


@pytest.mark.parametrize("place", ["99999.1", f"1.{1 << 70}", "-1.0", "1.1_0", "one.1"])
async def test_a_cursor_that_no_listing_gave_is_refused_and_sets_nothing_aside(front: Door, place: str) -> None:
    status, body = await front.ask("list", fresh(), cursor=f"{place}.{uuid7()}")
    assert (status, body["code"]) == (400, "bad_cursor")


async def remove(front: Door, name: str) -> None:
    """Remove it, and wait until the queue knows."""
    await front.publisher.publish(WorkspaceRemoved(workspace_id=name, rev=(uuid7().int >> 80) + 1000))

    async def is_removed() -> bool:
        return bool(await front.side.pool.fetchval("SELECT removed FROM workspaces WHERE workspace_id = $1", name))

    await until(is_removed)


async def test_what_waits_in_a_workspace_that_was_removed_while_paused_ends_by_its_clocks(front: Door) -> None:
    """Nobody can resume it any more, so the pause that held its clocks is over."""
    name = fresh()
    await front.register(name, NOWHERE, paused=True)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    late = front.busy(name, "x", expires_at=tomorrow)
    due = front.busy(name, "x", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    await front.keep(late)
    await front.keep(due)
    await remove(front, name)
    (ended,) = await front.ended(due.queue_id)
    assert ended["status"] == "expired"
    waits = await front.item(late.queue_id)
    assert (waits["status"], waits["waits"]["reason"]) == ("queued", "removed")
    # It would have been given up on after a day too: whichever is first has the pause's time back.
    assert datetime.fromisoformat(waits["expires_at"]) > tomorrow


async def test_a_removed_workspace_takes_no_retry(front: Door) -> None:
    """What nobody will ever deliver is refused, as a new message is."""
    name = fresh()
    fact = front.busy(name, "x")
    await front.keep(fact)
    await front.ask("cancel", name, queue_id=fact.queue_id)
    await remove(front, name)
    status, body = await front.ask("retry", name, queue_id=fact.queue_id)
    assert (status, body["code"]) == (410, "workspace_removed")
    assert (await front.item(fact.queue_id))["retried_by"] is None


async def test_a_critical_message_is_told_its_place_before_the_others(front: Door) -> None:
    name = fresh()
    for number in range(3):
        await front.keep(front.busy(name, str(number)))
    for expected in (1, 2):
        fact = front.busy(name, "c", priority=Priority.CRITICAL)
        told = await front.keep(fact)
        assert (told.position, told.depth) == (expected, 3 + expected)
        assert (await front.item(fact.queue_id))["position"] == expected


async def test_what_a_verb_changes_of_a_line_is_told_at_once(stack: Stack) -> None:
    """A proxy that did not know that a retried message waits would let newer ones pass it."""
    name = fresh()
    async with door(stack) as front, replica(stack, "proxy") as beside:
        await front.side.pool.execute(f"TRUNCATE {TABLES}")
        told: asyncio.Queue[int] = asyncio.Queue()

        async def heard(facts: Sequence[WorkspaceBacklog]) -> None:
            for fact in facts:
                told.put_nowait(fact.waiting)

        beside.reader.hear(WorkspaceBacklog, heard)
        await beside.reader.start()
        async with queue_service(stack, snapshot_s=600.0):
            fact = front.busy(name, "x")
            await front.keep(fact)
            assert await asyncio.wait_for(told.get(), 10) == 1
            await front.ask("cancel", name, queue_id=fact.queue_id)
            assert await asyncio.wait_for(told.get(), 10) == 0
            await front.ask("retry", name, queue_id=fact.queue_id)
            assert await asyncio.wait_for(told.get(), 10) == 1
            await front.ask("cancel_many", name)
            assert await asyncio.wait_for(told.get(), 10) == 0


async def test_a_proposed_id_that_ends_is_counted_as_ended(front: Door) -> None:
    """Whatever becomes a finished item is in the count of what ended, by its status."""

    def counted(status: str) -> float:
        return REGISTRY.get_sample_value("bide_queue_ended_total", {"status": status}) or 0.0

    name, before = fresh(), {status: counted(status) for status in ("superseded", "failed")}
    first = front.busy(name, "x", key="k")
    await front.keep(first)
    assert (await front.keep(front.busy(name, "x", key="k", body=first.body))).duplicate_of == first.queue_id
    assert (await front.keep(front.busy(name, "another", key="k"))).conflict
    assert {status: counted(status) - number for status, number in before.items()} == {"superseded": 1, "failed": 1}
