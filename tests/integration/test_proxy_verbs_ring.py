"""The verbs on real servers, from the HTTP face to the rows of the queue and to the agent, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import asyncpg
import pytest

from bide_agent.agent import Agent
from tests.conftest import Stack, until
from tests.integration.proxy_kit import Proxy, empty, fresh, proxy
from tests.integration.queue_kit import agent, queue_service

CRITICAL = {"urn:bide:queue:1": {"priority": "CRITICAL"}}
INFO = {"urn:bide:queue:1": {"priority": "INFO"}}


@pytest.fixture
async def ring(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy and a queue service on empty tables; the proxy has had its first snapshot."""
    await empty(stack)
    async with proxy(stack) as front, queue_service(stack, sweep_s=0.5, snapshot_s=0.3):
        await front.ready()
        yield front


async def kept(front: Proxy, name: str, text: str, **more: Any) -> str:
    reply = await front.say(name, text, prefer="respond-async", **more)
    assert reply.status == 202, reply.body
    queue_id: str = reply.json()["queue_id"]

    async def is_there() -> bool:
        """Verbs are for what the queue has read."""
        return (await front.call("GET", f"/queue/{queue_id}")).json().get("position") is not None

    await until(is_there)
    return queue_id


async def becomes(front: Proxy, queue_id: str, status: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def is_so() -> bool:
        found.update((await front.call("GET", f"/queue/{queue_id}")).json())
        return found.get("status") == status

    await until(is_so)
    return found


async def line(front: Proxy, name: str, query: str = "") -> list[str]:
    listed = await front.call("GET", f"/workspaces/{name}/queue{query}")
    assert listed.status == 200, listed.body
    return [each["queue_id"] for each in listed.json()["items"]]


async def pause(front: Proxy, admin: asyncpg.Connection[asyncpg.Record], name: str, **body: str) -> None:
    """Pause, and wait until the queue knows: before that it may still deliver."""
    assert (await front.call("POST", f"/workspaces/{name}/pause", body)).status == 200

    async def is_known() -> bool:
        return bool(await admin.fetchval("SELECT paused FROM queue.workspaces WHERE workspace_id = $1", name))

    await until(is_known)


async def seat(front: Proxy, worker: Agent, name: str) -> None:
    token = (await front.register(name, worker.url))["auth_token"]
    assert (await front.beat(name, token)).status == 200


async def test_what_failed_is_sent_again_once_and_answered(ring: Proxy) -> None:
    """A-D-04: the new item names the old one, and the agent gets it under an id of its own."""
    name = fresh()
    await ring.register(name)
    await ring.call("PATCH", f"/workspaces/{name}", {"admission": "queue_first"})
    async with agent(name, behaviour={"refusing": 1}) as worker:
        reply = await ring.say(name, "again", prefer="respond-async")
        old = reply.json()["queue_id"]
        await seat(ring, worker, name)
        assert (await becomes(ring, old, "failed"))["reason"]
        first = await ring.call("POST", f"/queue/{old}/retry", {"note": "it was a bad day"}, x_workspace_id="lead")
        assert first.status == 201, first.body
        new = first.json()["queue_id"]
        assert (first.json()["retry_of"], first.headers["location"]) == (old, f"/queue/{new}")
        second = await ring.call("POST", f"/queue/{old}/retry", x_workspace_id="lead")
        assert (second.status, second.json()["queue_id"]) == (200, new)
        assert "again" in str((await becomes(ring, new, "completed"))["answer"])
        assert [(each.text, each.queue_id) for each in worker.received] == [("again", old), ("again", new)]
        refused = await ring.call("POST", f"/queue/{new}/retry", x_workspace_id="lead")
        assert refused.status == 409
        assert refused.json()["detail"]


async def test_a_promoted_message_is_delivered_first(ring: Proxy) -> None:
    name = fresh()
    await ring.register(name)
    ids = [await kept(ring, name, text, caller=f"c{text}") for text in "123"]
    for _ in range(2):
        moved = await ring.call("POST", f"/queue/{ids[2]}/promote", {"note": "the demo waits"})
        assert (moved.status, moved.json()["position"]) == (200, 1), moved.body
    assert await line(ring, name) == [ids[2], ids[0], ids[1]]
    async with agent(name) as worker:
        await seat(ring, worker, name)
        await worker.until(lambda: len(worker.received) == 3, 20)
        assert [each.text for each in worker.received] == ["3", "1", "2"]


async def test_what_is_stale_is_dropped_and_the_rest_delivered(ring: Proxy) -> None:
    """A-Q-16: by priority, caller and age; counted before, and told to whoever asks for one of them."""
    name = fresh()
    await ring.register(name)
    task = await kept(ring, name, "task")
    infos = [await kept(ring, name, "info", metadata=INFO, caller=caller) for caller in ("a", "b", "a")]
    critical = await kept(ring, name, "critical", metadata=CRITICAL)
    assert await line(ring, name, "?priority=INFO") == infos
    shown = (await ring.call("GET", f"/workspaces/{name}")).json()["queue"]
    assert shown["depth"] == 5

    async def drop(**form: Any) -> dict[str, int]:
        reply = await ring.call("POST", f"/workspaces/{name}/queue/cancel", form)
        assert reply.status == 200, reply.body
        said: dict[str, int] = reply.json()
        return said

    assert await drop(priority="INFO", count_only=True) == {"matched": 3, "canceled": 0, "remaining": 3}
    assert await drop(priority="INFO", older_than_s=3600) == {"matched": 0, "canceled": 0, "remaining": 0}
    assert await drop(priority="INFO", caller="a") == {"matched": 2, "canceled": 2, "remaining": 0}
    assert await drop(priority="INFO", caller="a") == {"matched": 0, "canceled": 0, "remaining": 0}
    assert (await becomes(ring, infos[0], "canceled"))["reason"]
    assert await line(ring, name) == [critical, task, infos[1]]
    async with agent(name) as worker:
        await seat(ring, worker, name)
        await worker.until(lambda: len(worker.received) == 3, 20)
        assert [each.text for each in worker.received] == ["critical", "task", "info"]


async def test_a_paused_workspace_keeps_and_goes_on_where_it_was(
    ring: Proxy, admin: asyncpg.Connection[asyncpg.Record]
) -> None:
    name = fresh()
    async with agent(name) as worker:
        await seat(ring, worker, name)
        await pause(ring, admin, name, note="moving house")
        ids = [await kept(ring, name, text) for text in "12"]
        shown = (await ring.call("GET", f"/queue/{ids[0]}")).json()
        assert shown["why"], "it says why it waits"
        assert not worker.received
        assert (await ring.call("POST", f"/workspaces/{name}/resume")).status == 200
        await worker.until(lambda: len(worker.received) == 2, 20)
        assert [each.text for each in worker.received] == ["1", "2"]


async def test_a_line_that_was_drained_for_a_while_says_how_long_a_turn_takes(
    ring: Proxy, admin: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A-Q-24: what the queue measured is what the next 429 is computed from."""
    name = fresh()
    async with agent(name, work_s=0.05) as worker:
        await seat(ring, worker, name)
        await ring.call("PATCH", f"/workspaces/{name}", {"admission": "queue_first", "queue_depth_max": 3})
        sent = 0
        while sent < 6:
            sent += (await ring.say(name, str(sent), prefer="respond-async")).status == 202
        await worker.until(lambda: len(worker.received) == 6 and worker.active == 0, 20)

        async def is_measured() -> bool:
            return (await ring.call("GET", f"/workspaces/{name}")).json()["queue"]["turn_s"] is not None

        await until(is_measured)
        await pause(ring, admin, name)
        replies = await asyncio.gather(*(ring.say(name, "x", prefer="respond-async") for _ in range(8)))
        full = [reply for reply in replies if reply.status == 429]
        assert len(full) == 5
        assert {reply.headers["retry-after"] for reply in full} == {"1"}, "and not the 30 s of a guess"


async def test_what_was_set_aside_is_shown_and_what_nobody_can_read_stays(ring: Proxy, stack: Stack) -> None:
    async with await aio_pika.connect(stack.amqp_url) as connection:
        channel = await connection.channel()
        await channel.default_exchange.publish(aio_pika.Message(b"no batch at all"), "queue.message.busy")
    letter: dict[str, Any] = {}

    async def is_listed() -> bool:
        listed = (await ring.call("GET", "/dead-letters?limit=5")).json()["items"]
        letter.update(listed[0] if listed else {})
        return bool(letter)

    await until(is_listed)
    assert letter["error"]
    assert letter["replayed_at"] is None
    refused = await ring.call("POST", f"/dead-letters/{letter['digest']}/replay", {"note": "let us see"})
    assert (refused.status, refused.headers["content-type"]) == (409, "application/problem+json")
    assert refused.json()["detail"]
