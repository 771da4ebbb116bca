"""Liveness over a real dockerd: a crash is restarted once; what a person does to a container is not undone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.liveness.decide.seen import Observation
from services.liveness.drivers import Target
from services.liveness.drivers.docker import DockerDriver
from shared.broker import open_publisher
from shared.database import Pool, open_pool
from shared.facts import FLEET, ProxyBeat
from tests.conftest import Stack, until
from tests.integration.dockerd_kit import Engine
from tests.integration.liveness_kit import (
    Replica,
    agent_row,
    beat,
    change,
    emptied,
    kill_order,
    liveness_service,
    liveness_settings,
    registration,
    restart_rows,
)

RUNTIME = {"driver": "docker", "container": "agent-w1"}
MINUTE = timedelta(minutes=1)


@pytest.fixture
def engine(dockerd: Engine) -> Iterator[Engine]:
    yield dockerd
    dockerd.clear()


@pytest.fixture
async def pool(stack: Stack) -> AsyncIterator[Pool]:
    async with open_pool(liveness_settings(stack)) as opened:
        await emptied(opened)
        yield opened


@pytest.fixture
async def one(stack: Stack, pool: Pool, engine: Engine) -> AsyncIterator[Replica]:
    async with replica(stack, pool, engine.driver(look_s=0.5)) as opened:
        yield opened


@pytest.fixture
def agent(engine: Engine) -> Any:
    """The container of w1, as its operator started it."""
    return engine.run("w1", "agent-w1")


class Slow(DockerDriver):
    """A driver whose replica stands still when it is about to act."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.stands = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        self.stands.set()
        await self.goes_on.wait()
        return await super().restart(target, expected=expected, fence=fence)


@asynccontextmanager
async def replica(stack: Stack, pool: Pool, driver: DockerDriver) -> AsyncIterator[Replica]:
    yield Replica(liveness_settings(stack), pool, driver, called="docker")
    await driver.close()


async def up(one: Replica, **about: Any) -> None:
    """w1 runs, was seen, and was heard a moment ago."""
    await one.up(None, "w1", runtime=RUNTIME, **about)
    row = await agent_row(one.pool, "w1")
    assert row["container_id"] is not None
    assert row["status"] == "online"


# ── a crash ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_container_that_dies_is_restarted_once_within_seconds(
    stack: Stack, pool: Pool, engine: Engine, agent: Any
) -> None:
    """D-S6: two replicas hear the engine, one restarts, although it was heard a moment ago."""
    settings = {"docker_url": engine.url, "sweep_s": 0.2}
    async with (
        open_publisher(stack.settings("proxy")) as bus,
        liveness_service(stack, **settings),
        liveness_service(stack, **settings),
    ):
        await bus.publish(registration("w1", runtime=RUNTIME))
        await bus.publish(ProxyBeat(workspace_id=FLEET, rev=1, proxy_id="p1"))
        await until(lambda: _knows(pool, engine.life(agent)))
        await bus.publish(beat("w1"))
        await until(lambda: _is_heard(pool))
        before = engine.life(agent)
        engine.crash(agent)
        await until(lambda: _has(pool, "restarting"))
        await until(lambda: _is(engine.life(agent) != before))
        await until(lambda: _knows(pool, engine.life(agent)))
        await bus.publish(beat("w1", incarnation=2))
        await until(lambda: _has(pool, "online"))
        assert engine.starts(agent) == 2
    assert [(row["reason"], row["result"]) for row in await restart_rows(pool, "w1")] == [("exited", "started")]
    assert engine.runs(engine.life(agent)), "it outlives liveness"


async def test_an_order_ends_the_container_and_it_is_started_again(one: Replica, engine: Engine, agent: Any) -> None:
    """D-S10: the ceiling of a session."""
    await up(one)
    await one.hear(kill_order("w1"))
    await one.restart()
    assert [(row["reason"], row["result"]) for row in await restart_rows(one.pool, "w1")] == [("ceiling", "started")]
    assert (await agent_row(one.pool, "w1"))["container_id"] == engine.life(agent)
    assert engine.starts(agent) == 2


async def test_one_replica_frozen_between_deciding_and_acting_leaves_one_restart(
    stack: Stack, pool: Pool, one: Replica, engine: Engine, agent: Any
) -> None:
    """D-S12: its lease ends, another restarts, and when it wakes another life runs than the one that it expects."""
    slow = Slow(engine.url)
    async with replica(stack, pool, slow) as frozen:
        await up(frozen)
        engine.crash(agent)
        await frozen.silence("w1")
        await until(lambda: _looked_dead(frozen))
        await frozen.restarts.run_once()
        async with asyncio.timeout(30):
            await slow.stands.wait()
        later = datetime.now(UTC) + timedelta(seconds=one.settings.lease_s + 1)
        await one.restart(later)
        restarted = engine.life(agent)
        slow.goes_on.set()
        await frozen.restarts.settled()
    assert engine.starts(agent) == 2
    assert engine.life(agent) == restarted
    row = await agent_row(pool, "w1")
    assert (row["container_id"], row["restarts"], row["status"]) == (restarted, 1, "restarting")
    assert [row["result"] for row in await restart_rows(pool, "w1")] == ["started"]


async def test_a_container_that_was_removed_is_given_up_and_is_back_when_there_is_one(
    one: Replica, engine: Engine, agent: Any
) -> None:
    """Liveness makes no containers: that is the operator's."""
    await up(one)
    agent.remove(force=True)
    await one.silence("w1")
    await one.look()
    await one.restart()
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["reason"]) == ("gave_up", "no container has the label bide.workspace=w1")
    made = engine.run("w1", "agent-w1")
    await one.look()
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["container_id"]) == ("online", engine.life(made))


# ── a person ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_paused_container_is_left_alone(one: Replica, engine: Engine, agent: Any) -> None:
    """D-S17: however long, and however silent it is."""
    await up(one)
    await one.silence("w1")
    await asyncio.to_thread(agent.pause)
    now = datetime.now(UTC)
    for minutes in range(5):
        await one.look(now + minutes * MINUTE)
        await one.restart(now + minutes * MINUTE)
    assert await restart_rows(one.pool, "w1") == []
    agent.reload()
    assert (agent.status, engine.starts(agent)) == ("paused", 1)


@pytest.mark.parametrize("held", [{"desired": "stopped"}, {"settings": {"cordoned": True}}, {"paused": True}])
async def test_a_container_stopped_by_hand_stays_down_where_it_is_not_wanted_up(
    one: Replica, engine: Engine, agent: Any, held: dict[str, Any]
) -> None:
    """D-S17: a manual stop is not undone."""
    await up(one)
    await one.hear(change("w1", rev=9, runtime=RUNTIME, **held))
    await asyncio.to_thread(agent.stop)
    await one.silence("w1")
    now = datetime.now(UTC)
    for minutes in range(3):
        await one.look(now + minutes * MINUTE)
        await one.restart(now + minutes * MINUTE)
    assert await restart_rows(one.pool, "w1") == []
    agent.reload()
    assert (agent.status, engine.starts(agent)) == ("exited", 1)


async def test_a_restart_or_redeployment_by_hand_is_not_raced(one: Replica, engine: Engine, agent: Any) -> None:
    """It is down for a moment between two looks, and comes back as another life."""
    await up(one)
    exits = asyncio.create_task(one.looks.exits(one.restarts._drivers["docker"]))
    await until(lambda: _hears(one))
    await asyncio.to_thread(agent.restart)
    agent.remove(force=True)
    now = datetime.now(UTC)
    await one.look(now)
    assert (await agent_row(one.pool, "w1"))["status"] == "suspect"
    made = engine.run("w1", "agent-w1")
    await one.look(now + timedelta(seconds=9))
    exits.cancel()
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["container_id"]) == ("online", engine.life(made))
    assert await restart_rows(one.pool, "w1") == []


# ── an engine that is ill ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_frozen_engine_restarts_nobody(one: Replica, engine: Engine, agent: Any) -> None:
    """D-S14: not even one that is silent for long; `probe_blind` says so after 120 s, and it recovers."""
    await up(one)
    await one.silence("w1")
    life = engine.life(agent)
    engine.freeze()
    try:
        now = datetime.now(UTC)
        for seconds in (0, 30, 121):
            await one.look(now + timedelta(seconds=seconds))
            await one.restart(now + timedelta(seconds=seconds))
        row = await agent_row(one.pool, "w1")
        assert (row["status"], row["blind_since"]) == ("online", now)
    finally:
        engine.thaw()
    await until(lambda: _sees_again(one))
    assert await restart_rows(one.pool, "w1") == []
    assert (engine.life(agent), engine.starts(agent)) == (life, 1)


async def _knows(pool: Pool, life: str) -> bool:
    return bool(await pool.fetchval("SELECT container_id FROM agents WHERE workspace_id = 'w1'") == life)


async def _is(value: bool) -> bool:
    return value


async def _is_heard(pool: Pool) -> bool:
    return await pool.fetchval("SELECT heard_at FROM agents WHERE workspace_id = 'w1'") is not None


async def _has(pool: Pool, status: str) -> bool:
    return bool(await pool.fetchval("SELECT status FROM agents WHERE workspace_id = 'w1'") == status)


async def _looked_dead(one: Replica) -> bool:
    await one.look()
    return await _has(one.pool, "offline")


async def _sees_again(one: Replica) -> bool:
    await one.look()
    return (await agent_row(one.pool, "w1"))["blind_since"] is None


async def _hears(one: Replica) -> bool:
    driver = one.restarts._drivers["docker"]
    return isinstance(driver, DockerDriver) and driver._engine.hears()
