"""Liveness killed and frozen between deciding and acting, and without its servers: what dies is restarted once.

The engine is a control plane in this process: it counts what it is asked, under which Idempotency-Key, and what it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from uuid import UUID, uuid4

import asyncpg
import pytest

from deploy.demo.plane import SECRET, Plane, plane
from deploy.local.servers import Servers
from shared.addresses import AddressRules
from shared.agents import Agents
from tests.chaos.conftest import away_s
from tests.chaos.kit.broker import outage, well
from tests.chaos.kit.database import admin
from tests.chaos.kit.processes import Process, Ring, ring
from tests.conftest import Stack, until
from tests.e2e.conftest import Caller, Fleet

LEASE_S = 4.0
QUICK = {
    "BIDE_LIVENESS_WEBHOOK_SECRET": SECRET,
    "BIDE_LIVENESS_SETTLE_S": "0",
    "BIDE_LIVENESS_SWEEP_S": "0.5",
    "BIDE_LIVENESS_LOOK_S": "0.5",
    "BIDE_LIVENESS_BOOT_S": "1",
    "BIDE_LIVENESS_BOOT_SLOT_S": "1",
    "BIDE_LIVENESS_BACKOFF_S": "5",
    "BIDE_LIVENESS_CALL_S": "3",
    "BIDE_LIVENESS_LEASE_S": f"{LEASE_S:g}",
}
"""Seconds for minutes. A second death waits 5 s for its turn: long enough to hit whoever decided it."""
Point = Literal["decided", "leased", "called", "started"]
POINTS: tuple[Point, ...] = ("decided", "leased", "called", "started")


@pytest.fixture
def engine() -> Iterator[Plane]:
    with plane(lambda name: f"{name}-{uuid4().hex[:4]}") as made:
        yield made


@dataclass
class Died:
    """One workspace that the engine has started once."""

    name: str
    engine: Plane
    services: Ring

    async def rows(self) -> list[asyncpg.Record]:
        """Its restarts, the oldest first."""
        async with admin(self.services.stack) as connection:
            query = "SELECT * FROM liveness.restarts WHERE workspace_id = $1 ORDER BY decided_at"
            return await connection.fetch(query, self.name)

    async def is_decided(self) -> bool:
        """It is offline, and nobody has begun its restart."""
        rows = await self.rows()
        return len(rows) == 2 and rows[1]["ended_at"] is None and rows[1]["owner"] is None

    async def is_called(self) -> bool:
        return len(self.engine.starts(self.name)) >= 2

    async def is_started(self) -> bool:
        return len(self.engine.started(self.name)) == 2

    async def is_back(self) -> bool:
        rows = await self.rows()
        return len(rows) == 2 and rows[1]["result"] == "started"

    async def reach(self, point: Point, whom: Process) -> None:
        """Let it die, and come back when its restart is so far, by the hand of this one replica."""
        if point == "leased":
            self.engine.crash(self.name)
            await until(self.is_decided)
            # What is due is named when it is leased; the commit passes, and the replica never hears of it.
            restart_id: UUID = (await self.rows())[1]["restart_id"]
            await asyncio.wait_for(whom.postgres.hold_after(restart_id.bytes, b"COMMIT").wait(), 30)
            return
        if point == "called":
            self.engine.may_act.clear()
        elif point == "started":
            self.engine.may_answer.clear()
        self.engine.crash(self.name)
        reached = {"decided": self.is_decided, "called": self.is_called, "started": self.is_started}[point]
        await until(reached)


@asynccontextmanager
async def died(services: Ring, engine: Plane) -> AsyncIterator[Died]:
    """An agent that was started and never speaks, and need not: the next look at its end is its death."""
    client = Agents(AddressRules(allow_loopback=True))
    made = Died(f"w-{uuid4().hex[:8]}", engine, services)
    await _let_run(Caller(services.ready, client, "operator"), made.name, engine, heartbeat="none")

    async def first_is_over() -> bool:
        rows = await made.rows()
        return len(rows) == 1 and rows[0]["result"] == "started"

    await until(first_is_over)
    try:
        yield made
    finally:
        await client.close()


async def _let_run(operator: Caller, name: str, engine: Plane, **settings: str) -> None:
    enrolled = await operator.call("POST", "/registry/register", {"id": name, "url": ""})
    assert enrolled.status == 200, enrolled.body
    patched = await operator.call("PATCH", f"/workspaces/{name}", {"runtime": engine.runtime(name), **settings})
    assert patched.status == 200, patched.body


async def test_liveness_killed_between_offline_and_restart_is_finished_once_by_another(
    faulty: Stack, engine: Plane
) -> None:
    """D-S13, D-S26: whatever was done of it, one start comes of it."""
    async with ring(faulty, "proxy-1", "liveness-1", "liveness-2", **QUICK) as services:
        first, second = services["liveness-1"], services["liveness-2"]
        await second.stop()
        for point in POINTS:
            async with died(services, engine) as agent:
                await agent.reach(point, first)
                await first.kill()
                first.postgres.release()
                asked = len(engine.starts(agent.name))
                await second.start()
                if point in {"called", "started"}:
                    await until(lambda agent=agent, asked=asked: _is(len(engine.starts(agent.name)) > asked))  # type: ignore[misc]
                engine.may_act.set()
                engine.may_answer.set()
                await until(agent.is_back)
                orders = engine.starts(agent.name)[1:]
                count = len(engine.started(agent.name)) - 1
                print(f"killed when it was {point}: asked {len(orders)} times, started {count} times")
                assert count == 1
                assert len({order.key for order in orders}) == 1, "another one went on under the same fence"
                assert (await agent.rows())[1]["tries"] == (1 if point == "decided" else 2)
            first, second = second, first


async def test_a_replica_that_stands_still_between_deciding_and_acting_makes_no_call_of_its_own(
    faulty: Stack, engine: Plane
) -> None:
    """D-S12: SIGSTOP beyond its lease; another one acts; awake, it finds that its time is over. One call in all."""
    async with ring(faulty, "proxy-1", "liveness-1", "liveness-2", **QUICK) as services:
        first, second = services["liveness-1"], services["liveness-2"]
        await second.stop()
        for point in POINTS[:2]:
            async with died(services, engine) as agent:
                await agent.reach(point, first)
                await first.freeze()
                await second.start()
                await until(agent.is_back, within_s=60)
                assert len(engine.starts(agent.name)) == 2
                first.postgres.release()
                first.thaw()
                if point == "leased":
                    await until(lambda: _is(first.logged("driver_call_failed") == 1))
                    assert "the lease ended before the driver was called" in first.log.read_text()
                await _looks(engine, agent.name, 6)
                assert len(engine.starts(agent.name)) == 2, "its first start, and one call for its death"
                assert len(await agent.rows()) == 2
            await second.stop()


async def test_what_cannot_be_written_is_not_restarted_and_afterwards_it_is(
    faulty: Stack, engine: Plane, own_servers: Servers
) -> None:
    """D-S19: Postgres goes between the look that finds it dead and the verdict."""
    replicas = ring(faulty, "proxy-1", "liveness-1", "liveness-2", **QUICK)
    async with replicas as services, died(services, engine) as agent:
        engine.may_look.clear()
        engine.crash(agent.name)
        before = engine.asked[agent.name]
        await until(lambda: _is(engine.asked[agent.name] > before))
        await asyncio.to_thread(own_servers.postgres.stop, "immediate")
        engine.may_look.set()
        await asyncio.sleep(away_s(8.0))  # the outage itself
        assert len(engine.starts(agent.name)) == 1
        waits = sum(each.logged("verdict_not_written") + each.logged("loop_waits") for each in services.of("liveness"))
        assert waits > 0, "it was about to decide"
        await asyncio.to_thread(own_servers.postgres.start)
        await until(agent.is_back, within_s=60)
        assert len(engine.starts(agent.name)) == 2
        print(f"Postgres away: {waits} turns waited, 0 restarts; then {(await agent.rows())[1]['evidence']}")


async def test_without_rabbitmq_nobodys_silence_is_a_death(faulty: Stack, engine: Plane, own_servers: Servers) -> None:
    """D-S1: 20 s without any heartbeat, a flaky look at each agent meanwhile and another right after: 0 restarts."""
    async with AsyncExitStack() as exits:
        services = await exits.enter_async_context(ring(faulty, "proxy-1", "liveness-1", "liveness-2", **QUICK))
        client = Agents(AddressRules(allow_loopback=True))
        exits.push_async_callback(client.close)
        fleet, operator = Fleet(services.ready, exits), Caller(services.ready, client, "operator")
        agents = [await fleet.start(heartbeat_s=1.0) for _ in range(3)]
        names = [agent.workspace for agent in agents]
        for agent in agents:
            await agent.until(lambda agent=agent: agent.beats >= 4)  # type: ignore[misc]
            engine.running[agent.workspace] = "c1"
            await _let_run(operator, agent.workspace, engine)
        await asyncio.gather(*(_looks(engine, name, 2) for name in names))
        async with outage(services, "stopped", own_servers.rabbitmq.stop, own_servers.rabbitmq.start):
            await asyncio.sleep(17)  # longer than any of them may be silent
            for name in names:
                engine.claims[name].append("stopped")
            await asyncio.gather(*(_looks(engine, name, 2) for name in names))
            await asyncio.sleep(away_s(3.0, 60.0))
        await well(services)
        for name in names:
            engine.claims[name].append("stopped")
        await asyncio.gather(*(_looks(engine, name, 3) for name in names))
        assert [engine.starts(name) for name in names] == [[], [], []]

        async def is_up(name: str) -> bool:
            shown: dict[str, Any] = (await operator.call("GET", f"/workspaces/{name}")).json
            return bool(shown["status"] == "online")

        for name in names:
            await until(partial(is_up, name))
        async with admin(faulty) as connection:
            rows = await connection.fetch("SELECT sentence FROM liveness.evidence WHERE verdict = 'suspect'")
            assert await connection.fetchval("SELECT count(*) FROM liveness.restarts") == 0
        print(f"RabbitMQ away: 0 restarts, {len(rows)} suspicions, such as: {rows[0]['sentence']}")


async def _looks(engine: Plane, name: str, count: int) -> None:
    """Come back after so many more looks, and no claim is left."""
    before = engine.looks[name]
    await until(lambda: _is(engine.looks[name] >= before + count and not engine.claims[name]), within_s=60)


async def _is(value: bool) -> bool:
    return value
