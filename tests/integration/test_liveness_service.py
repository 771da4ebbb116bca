"""Liveness on the real bus: agents of the operator's file are started, ended by order, and started again."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from shared.broker import Publisher, open_publisher
from shared.database import Pool, open_pool
from shared.facts import FLEET, KillDone, ProxyBeat, WorkspaceStatus
from tests.conftest import Stack, until
from tests.integration.listening import listening
from tests.integration.liveness_kit import (
    AgentsFile,
    agent_row,
    agents,
    beat,
    change,
    emptied,
    kill_order,
    liveness_service,
    liveness_settings,
    registration,
    restart_rows,
)

__all__ = ["agents"]


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    async with open_pool(liveness_settings(stack)) as pool:
        await emptied(pool)
        yield pool


@pytest.fixture
async def bus(stack: Stack) -> AsyncIterator[Publisher]:
    async with open_publisher(stack.settings("proxy")) as publisher:
        yield publisher


async def test_an_agent_of_the_operators_file_is_started_once_and_counts_as_up_when_it_is_heard(
    stack: Stack, rows: Pool, bus: Publisher, agents: AgentsFile
) -> None:
    agents.add("w1")
    async with listening(stack, WorkspaceStatus) as statuses, liveness_service(stack, **agents.settings()):
        await bus.publish(registration("w1"))
        await until(lambda: _is(agents.runs("w1")))
        mark = agents.mark("w1")
        await until(lambda: _is(bool(statuses) and "not been heard" in statuses[-1].reason))
        await bus.publish(beat("w1", incarnation=2))
        await until(lambda: _is(statuses[-1].status == "online"))
    assert [each.status for each in statuses][-2:] == ["restarting", "online"]
    assert [each.rev for each in statuses] == sorted({each.rev for each in statuses})
    assert agents.runs("w1"), "it outlives the liveness that started it"
    assert agents.mark("w1") == mark
    assert [(row["reason"], row["result"]) for row in await restart_rows(rows, "w1")] == [("first_start", "started")]


async def test_an_ordered_kill_ends_the_agent_answers_and_starts_it_again(
    stack: Stack, rows: Pool, bus: Publisher, agents: AgentsFile
) -> None:
    """D-S10: neither debounce nor backoff nor budget for an order; the fence all the same."""
    agents.add("w1")
    async with listening(stack, KillDone, "scheduler") as done, liveness_service(stack, **agents.settings()):
        await _started(bus, rows, agents, "w1")
        first = agents.mark("w1")
        order = kill_order("w1", incarnation=2)
        await bus.publish(order)
        await until(lambda: _is(bool(done)))
        assert (done[0].order_id, done[0].result, done[0].session_id) == (order.order_id, "applied", "s1")
        await until(lambda: _is(agents.mark("w1") != first and agents.runs("w1")))
        # Twice the same, and another one against a life that has ended.
        again = kill_order("w1", incarnation=2, session_id="s2")
        await bus.publish(order)
        await bus.publish(again)
        await until(lambda: _is(len(done) == 2))
        assert (done[1].order_id, done[1].result) == (again.order_id, "already_ended")
        second = agents.mark("w1")
        await bus.publish(beat("w1", incarnation=3))
        await until(lambda: _is_up(rows, "w1"))
        late = kill_order("w1", incarnation=2, session_id="s3")
        await bus.publish(late)
        await until(lambda: _is(len(done) == 3))
        assert (done[2].order_id, done[2].result) == (late.order_id, "stale")
    assert agents.mark("w1") == second
    assert [row["reason"] for row in await restart_rows(rows, "w1")] == ["first_start", "ceiling"]


async def test_an_agent_that_nobody_runs_is_not_killable_and_an_expired_order_is_not_carried_out(
    stack: Stack, rows: Pool, bus: Publisher, agents: AgentsFile
) -> None:
    agents.add("w1")
    async with listening(stack, KillDone, "scheduler") as done, liveness_service(stack, **agents.settings()):
        await bus.publish(registration("ext", runtime={}))
        await _started(bus, rows, agents, "w1")
        await until(lambda: _is_there(rows, "ext"))
        past = datetime.now(UTC) - timedelta(seconds=1)
        expired = kill_order("w1", incarnation=2, expires_at=past)
        await bus.publish(expired)
        await bus.publish(kill_order("ext"))
        await until(lambda: _is(bool(done)))
        assert [(each.workspace_id, each.result) for each in done] == [("ext", "not_killable")]
        assert await rows.fetchval("SELECT result FROM orders WHERE order_id = $1", expired.order_id) == "expired"
    assert len(await restart_rows(rows, "w1")) == 1


async def test_a_crash_is_noticed_by_its_exit_and_the_agent_is_started_again(
    stack: Stack, rows: Pool, bus: Publisher, agents: AgentsFile
) -> None:
    """D-S6: the engine's own word, although it was heard a moment ago."""
    agents.add("w1")
    async with liveness_service(stack, **agents.settings()):
        await _started(bus, rows, agents, "w1")
        first = agents.mark("w1")
        assert first is not None
        await rows.execute("UPDATE agents SET restarted_at = now() - interval '1 hour'")
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: _is(agents.mark("w1") != first and agents.runs("w1")))
    assert [row["reason"] for row in await restart_rows(rows, "w1")] == ["first_start", "exited"]


async def test_a_paused_agent_that_ends_stays_down_until_it_is_resumed(
    stack: Stack, rows: Pool, bus: Publisher, agents: AgentsFile
) -> None:
    """A-L-18, D-S17."""
    agents.add("w1")
    async with liveness_service(stack, **agents.settings(), sweep_s=0.2):
        await _started(bus, rows, agents, "w1")
        first = agents.mark("w1")
        assert first is not None
        await bus.publish(change("w1", rev=5, incarnation=2, paused=True))
        await until(lambda: _has(rows, "w1", "paused"))
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: _looked_since(rows, "w1"))
        assert not agents.runs("w1")
        assert len(await restart_rows(rows, "w1")) == 1
        await bus.publish(ProxyBeat(workspace_id=FLEET, rev=1, proxy_id="p1"))
        await until(lambda: _is_heard(rows))
        await rows.execute("UPDATE agents SET restarted_at = NULL, heard_at = NULL")
        await bus.publish(change("w1", rev=6, incarnation=2))
        await until(lambda: _is(agents.runs("w1")))


async def _started(bus: Publisher, rows: Pool, agents: AgentsFile, workspace_id: str) -> None:
    """Register it, let it be started, and let its new life be heard: incarnation 2."""
    await bus.publish(registration(workspace_id))
    await until(lambda: _is(agents.runs(workspace_id)))
    await until(lambda: _has(rows, workspace_id, "restarting"))
    await until(lambda: _booting(rows, workspace_id))
    await bus.publish(beat(workspace_id, incarnation=2))
    await until(lambda: _is_up(rows, workspace_id))


async def _is(value: bool) -> bool:
    return value


async def _has(rows: Pool, workspace_id: str, status: str) -> bool:
    return bool(await rows.fetchval("SELECT status FROM agents WHERE workspace_id = $1", workspace_id) == status)


async def _booting(rows: Pool, workspace_id: str) -> bool:
    return (await agent_row(rows, workspace_id))["boot_until"] is not None


async def _is_up(rows: Pool, workspace_id: str) -> bool:
    row = await agent_row(rows, workspace_id)
    return bool(row["status"] == "online" and row["boot_until"] is None)


async def _is_there(rows: Pool, workspace_id: str) -> bool:
    return await rows.fetchval("SELECT true FROM agents WHERE workspace_id = $1", workspace_id) is True


async def _is_heard(rows: Pool) -> bool:
    return await rows.fetchval("SELECT true FROM proxies") is True


async def _looked_since(rows: Pool, workspace_id: str) -> bool:
    """Two looks have come and gone."""
    first = (await agent_row(rows, workspace_id))["next_check_at"]
    await until(lambda: _moved(rows, workspace_id, first))
    second = (await agent_row(rows, workspace_id))["next_check_at"]
    await until(lambda: _moved(rows, workspace_id, second))
    return True


async def _moved(rows: Pool, workspace_id: str, moment: datetime) -> bool:
    return bool((await agent_row(rows, workspace_id))["next_check_at"] > moment)
