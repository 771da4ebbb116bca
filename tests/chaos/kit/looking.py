"""What a test must set and see beside its load: settings of a workspace, and who of the queue's replicas has what.

The tables are only looked at to know whom to hurt and when, never for how a message ended.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg

from tests.chaos.kit.account import Sent, Witness
from tests.chaos.kit.processes import Process, Ring
from tests.chaos.kit.storm import Storm
from tests.conftest import until


async def change(ring: Ring, agent: Witness, column: str, value: object, **settings: object) -> None:
    """Change settings of a workspace; come back when the queue service shows it in its `column`."""

    def patch() -> int:
        connection = http.client.HTTPConnection(urlsplit(ring.ready.proxy).netloc, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {ring.ready.admin_token}"}
            connection.request("PATCH", f"/workspaces/{agent.workspace}", json.dumps(settings), headers)
            return connection.getresponse().status
        finally:
            connection.close()

    assert await asyncio.to_thread(patch) == 200
    await known(ring, agent, column, value)


async def known(ring: Ring, agent: Witness, column: str, value: object) -> None:
    """Come back when the queue service has heard of a change of a workspace."""
    await _until(ring, f"SELECT {column} FROM queue.workspaces WHERE workspace_id = $1", agent.workspace, value)


async def status(ring: Ring, sent: Sent, value: str) -> None:
    """Come back when an item has this status."""
    await _until(ring, "SELECT status FROM queue.a2a_queue WHERE queue_id = $1", UUID(sent.queue_id), value)


async def holder(ring: Ring, sent: Sent) -> Process:
    """The replica that delivers it now."""
    owner = await _value(ring, "SELECT owner FROM queue.a2a_queue WHERE queue_id = $1", UUID(sent.queue_id))
    return next(each for each in ring.of("queue") if f'"replica": "{owner}"' in each.log.read_text())


async def ended(load: Storm, sent: Sent, within_s: float = 60.0) -> None:
    """Come back when its caller sees the end of it."""
    async with asyncio.timeout(within_s):
        await load._ended(sent, asyncio.Semaphore())


async def _until(ring: Ring, query: str, key: object, value: object) -> None:
    async def holds() -> bool:
        return bool(await _value(ring, query, key) == value)

    await until(holds)


async def _value(ring: Ring, query: str, key: object) -> Any:
    connection = await asyncpg.connect(ring.stack.database_url)
    try:
        return await connection.fetchval(query, key)
    finally:
        await connection.close()
