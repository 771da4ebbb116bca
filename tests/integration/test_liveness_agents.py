"""Real agents behind a real proxy: the operator says what is run, an agent never does; a crash is repaired."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.database import Pool, open_pool
from shared.facts import KillDone
from tests.conftest import Stack, until
from tests.integration.listening import listening
from tests.integration.liveness_kit import (
    AgentsFile,
    agents,
    emptied,
    kill_order,
    liveness_service,
    liveness_settings,
    restart_rows,
)
from tests.integration.proxy_kit import ADMIN, Proxy, empty, fresh, proxy

__all__ = ["agents"]


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Proxy]:
    await empty(stack)
    async with proxy(stack) as opened:
        yield opened


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    async with open_pool(liveness_settings(stack)) as pool:
        await emptied(pool)
        yield pool


def real_agent(front: Proxy, agents: AgentsFile, name: str) -> list[str]:
    """The command line of an agent that registers and beats every 0.2 s."""
    about = ["--workspace", name, "--bide", front.url, "--token", ADMIN, "--heartbeat-s", "0.2", "--grace-s", "0"]
    return [sys.executable, "-m", "bide_agent", *about, "--state-dir", str(agents.root)]


async def test_an_agent_is_started_registers_and_is_back_after_a_crash_and_after_a_kill(
    stack: Stack, front: Proxy, rows: Pool, agents: AgentsFile
) -> None:
    """D-S6, D-S10: the whole way, over HTTP and the bus."""
    name = fresh()
    agents.add(name, command=real_agent(front, agents, name), cwd=str(Path.cwd()))
    async with listening(stack, KillDone, "scheduler") as done, liveness_service(stack, **agents.settings()):
        await front.register(name)
        said = await front.call("PATCH", f"/workspaces/{name}", {"runtime": {"driver": "process"}})
        assert said.status == 200, said.body
        await until(lambda: _speaks(front, name))
        life = _incarnation(front, name)
        first = agents.mark(name)
        assert first is not None
        await rows.execute("UPDATE agents SET restarted_at = now() - interval '1 hour'")
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: _speaks(front, name, after=life))
        second = agents.mark(name)
        assert second != first
        order = kill_order(name, incarnation=_incarnation(front, name))
        await front.service.publisher.publish(order)
        await until(lambda: _speaks(front, name, after=life + 1))
        assert [(each.order_id, each.result) for each in done] == [(order.order_id, "applied")]
    reasons = [row["reason"] for row in await restart_rows(rows, name)]
    assert reasons == ["first_start", "exited", "ceiling"]


async def test_an_agent_never_chooses_what_is_run(stack: Stack, front: Proxy, rows: Pool, agents: AgentsFile) -> None:
    """Neither by register, nor by a beat, nor by its card, nor by a patch with its own token."""
    name = fresh()
    agents.add("other")
    mine: dict[str, Any] = {"runtime": {"driver": "process", "command": "sh"}, "command": ["sh"], "driver": "process"}
    async with liveness_service(stack, **agents.settings(), sweep_s=0.1):
        token = (await front.register(name, "http://127.0.0.1:9/", boot_id="b1", settings=mine, **mine))["auth_token"]
        assert (await front.beat(name, token, boot_id="b1", runtime_state="process", **mine)).status == 200
        card = {"workspace_id": name, "agent_card": {"name": "x", **mine}, **mine}
        await front.call("POST", "/registry/update-card", card, token=token)
        refused = await front.call("PATCH", f"/workspaces/{name}", {"runtime": {"driver": "process"}}, token=token)
        assert refused.status in {403, 404}
        await until(lambda: _knows(rows, name, rev=2))
    row = await rows.fetchrow("SELECT driver, runtime FROM agents WHERE workspace_id = $1", name)
    assert row is not None
    assert (row["driver"], json.loads(row["runtime"])) == (None, {})
    assert await rows.fetchval("SELECT count(*) FROM restarts") == 0


def _incarnation(front: Proxy, name: str) -> int:
    found = front.copies.registry.find(name)
    assert found is not None
    return found.incarnation


async def _speaks(front: Proxy, name: str, *, after: int = 0) -> bool:
    """The agent beats, and the proxy believes that it is there."""
    use = front.copies.uses.of(name)
    found = front.copies.registry.find(name)
    if found is None or use.beat is None or found.incarnation <= after:
        return False
    said = front.copies.registry.status(found)
    return said is None or said.status == "online"


async def _knows(rows: Pool, name: str, *, rev: int) -> bool:
    return bool(await rows.fetchval("SELECT rev >= $2 FROM agents WHERE workspace_id = $1", name, rev))
