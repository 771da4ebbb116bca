"""Liveness killed over a real dockerd, when the engine has restarted a container and no row says so yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import asyncpg
import pytest

from shared.addresses import AddressRules
from shared.agents import Agents
from tests.chaos.kit.database import admin
from tests.chaos.kit.processes import ring
from tests.conftest import Stack, until
from tests.e2e.conftest import Caller
from tests.integration.dockerd_kit import Engine, engine_or_reason

WRITES_STARTED = b"\x00\x00\x00\x07started"
"""The result of a restart as an argument on its way to Postgres: its driver has come back, and nothing is committed."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    yield from engine_or_reason()


async def test_liveness_killed_between_the_engines_restart_and_its_row_is_finished_once_by_another(
    faulty: Stack, engine: Engine
) -> None:
    """D-S13, D-S26: the fence that the first replica had in memory is gone; what it expected to be there is, too."""
    name = f"w-{uuid4().hex[:8]}"
    quick = {"BIDE_LIVENESS_DOCKER_URL": engine.url, "BIDE_LIVENESS_CALL_S": "3", "BIDE_LIVENESS_LEASE_S": "4"}
    client = Agents(AddressRules(allow_loopback=True))
    async with ring(faulty, "proxy-1", "liveness-1", "liveness-2", **quick) as services:
        first, second = services["liveness-1"], services["liveness-2"]
        await second.stop()
        container = engine.run(name)
        operator = Caller(services.ready, client, "operator")
        assert (await operator.call("POST", "/registry/register", {"id": name, "url": ""})).status == 200
        patched = await operator.call("PATCH", f"/workspaces/{name}", {"runtime": {"driver": "docker"}})
        assert patched.status == 200, patched.body

        async def agent() -> asyncpg.Record | None:
            async with admin(faulty) as connection:
                return await connection.fetchrow("SELECT * FROM liveness.agents WHERE workspace_id = $1", name)

        async def is_seen() -> bool:
            row = await agent()
            return row is not None and row["container_id"] == engine.life(container)

        await until(is_seen)
        held = first.postgres.hold_after(WRITES_STARTED)
        engine.crash(container)
        await asyncio.wait_for(held.wait(), 60)
        restarted = engine.life(container)
        await first.kill()
        first.postgres.release()
        await second.start()

        async def rows() -> list[asyncpg.Record]:
            async with admin(faulty) as connection:
                query = "SELECT * FROM liveness.restarts WHERE workspace_id = $1"
                return await connection.fetch(query, name)

        assert [row["result"] for row in await rows()] == [None]

        async def is_finished() -> bool:
            return [row["result"] for row in await rows()] == ["replaced"] and await is_seen()

        await until(is_finished, within_s=60)
        (row,) = await rows()
        print(f"asked {row['tries']} times under one fence: {row['last_error']}")
        assert row["tries"] == 2
        assert (engine.life(container), engine.starts(container)) == (restarted, 2), "by its operator, and once by us"
        found = await agent()
        assert found is not None
        assert found["status"] == "online"
    await client.close()
