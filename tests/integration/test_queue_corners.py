"""Where promises of the queue meet what nobody meant to say: a cursor that no listing gave."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from uuid_utils.compat import uuid7

from tests.conftest import Stack
from tests.integration.queue_kit import Door, door, queue_service

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, inbox, outbox, dead_letters"


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
