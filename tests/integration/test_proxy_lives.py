"""What follows a death at the door, on real servers: messages are kept, live forwards end, an operator resumes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from shared.facts import LivenessQuery, QueryAnswered, WorkspaceStatus
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.proxy_kit import Proxy, Reply, empty, fresh, nothing_left, proxy
from tests.integration.queue_kit import agent, queue_pool, queue_service
from tests.integration.session_kit import Puppet, puppet

GRACE_S = 3.0
TIMING = {"sweep_s": 0.3, "reread_s": 0.1, "snapshot_s": 0.3, "snapshot_pause_s": 0.1, "stop_grace_s": GRACE_S}
EXTENSION = "urn:bide:queue:1"


@pytest.fixture
async def ring(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy and a queue service on empty tables; the proxy has had its first snapshot."""
    await empty(stack)
    async with (
        proxy(stack, kept_wait_s=5.0, query_timeout_s=10.0, stop_grace_s=GRACE_S) as front,
        queue_service(stack, **TIMING),
    ):
        await front.ready()
        yield front


_revs = iter(range(1, 1_000_000))


async def life(front: Proxy, name: str, status: Any, *, incarnation: int = 1) -> None:
    """Say what liveness believes, and come back when this replica has heard it."""
    fact = WorkspaceStatus(workspace_id=name, rev=next(_revs), incarnation=incarnation, status=status, reason="a test")
    await front.service.publisher.publish(fact)

    async def is_heard() -> bool:
        said = front.copies.registry._statuses.get(name)
        return said is not None and said.rev >= fact.rev

    await until(is_heard)


async def reborn(front: Proxy, name: str, url: str) -> None:
    """Another process registers."""
    before = front.copies.registry.find(name)
    said = await front.register(name, url, boot_id=str(uuid7()))
    assert before is not None
    assert said["incarnation"] == before.incarnation + 1


async def key(front: Proxy, caller_id: str, *rights: str) -> str:
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id, rights) VALUES (sha256($1::bytea), $2, $3)"
    await front.service.pool.execute(query, token.encode(), caller_id, list(rights))
    return token


async def is_asked(mute: Puppet) -> bool:
    return bool(mute.asked)


def extension(reply: Reply) -> Any:
    return reply.json()["result"]["metadata"][EXTENSION]


# ── kept ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", ["offline", "restarting", "gave_up"])
async def test_a_message_to_the_dead_is_kept_and_reaches_the_next_life(stack: Stack, ring: Proxy, status: str) -> None:
    """A-P-14, A-L-07: never a 503, and nothing is delivered to what was declared dead, though its port answers."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await ring.register(name, worker.url, boot_id="first")
        await life(ring, name, status)
        async with queue_pool(stack) as rows:
            heard = "SELECT status = $2 FROM workspaces WHERE workspace_id = $1"
            await until(lambda: rows.fetchval(heard, name, status), 15)
        reply = await ring.say(name)
        assert (reply.status, extension(reply)["reason"]) == (202, status)
        queue_id = reply.json()["queue_id"]
        waits = (await ring.call("GET", f"/queue/{queue_id}")).json()["waits"]
        assert waits["reason"] == "offline"
        assert not worker.received
        await reborn(ring, name, worker.url)

        async def is_delivered() -> bool:
            return bool((await ring.call("GET", f"/queue/{queue_id}")).json()["status"] == "completed")

        await until(is_delivered)
        await life(ring, name, "gave_up")  # of the life before: it comes late

        async def is_forwarded() -> bool:
            return (await ring.say(name)).status == 200

        await until(is_forwarded)


# ── live forwards ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_live_forward_to_the_dead_ends_after_the_grace_and_says_what_to_do(ring: Proxy) -> None:
    """A-Q-18: the caller is told, and the same message again is kept for the next life."""
    name, message_id = fresh(), str(uuid7())
    async with puppet() as mute:
        await ring.register(name, mute.url)
        call = asyncio.create_task(ring.say(name, message_id=message_id))
        await until(lambda: is_asked(mute))
        await life(ring, name, "offline")
        died_at = asyncio.get_running_loop().time()
        reply = await asyncio.wait_for(call, 60)
        assert asyncio.get_running_loop().time() - died_at >= GRACE_S - 0.2
        error = reply.json()["error"]
        assert (reply.status, error["code"], error["data"]["code"]) == (502, -32603, "agent_died")
        assert (error["data"]["class"], error["data"]["target"]) == ("unknown", name)
        assert "Send it again with the same messageId" in error["message"]
        assert not ring.copies.uses.of(name).own
        again = await ring.say(name, message_id=message_id)
        assert (again.status, extension(again)["reason"]) == (202, "offline")


async def test_a_live_forward_ends_at_once_when_another_life_is_heard(ring: Proxy) -> None:
    name = fresh()
    async with puppet() as mute, agent(name, work_s=0.01) as worker:
        await ring.register(name, mute.url, boot_id="first", settings={"stop_grace_s": 3600})
        call = asyncio.create_task(ring.say(name))
        await until(lambda: is_asked(mute))
        await life(ring, name, "restarting")
        await asyncio.sleep(0)
        assert not call.done()
        await reborn(ring, name, worker.url)
        reply = await asyncio.wait_for(call, 60)
        assert (reply.status, reply.json()["error"]["data"]["code"]) == (502, "agent_died")
        assert (await ring.say(name)).status == 200


async def test_a_stream_of_the_dead_is_cut_and_not_ended(ring: Proxy) -> None:
    """Its caller must not take what is missing for the end."""
    name = fresh()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        event = (
            b'data: {"jsonrpc": "2.0", "id": 1, "result": {"kind": "task", "id": "t", "status": {"state": "working"}}}'
        )
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + event + b"\n\n")
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        await ring.register(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        call = asyncio.create_task(ring.say(name, method="message/stream"))

        async def has_task() -> bool:
            return any(each.task_id == "t" for each in ring.copies.uses.of(name).own.values())

        await until(has_task)
        await life(ring, name, "gave_up")
        reply = await asyncio.wait_for(call, 60)
        assert (reply.status, reply.complete, len(reply.events())) == (200, False, 1)


async def test_a_forward_to_an_agent_that_was_alive_after_all_goes_on(ring: Proxy) -> None:
    """A-L-07."""
    name = fresh()
    async with agent(name, work_s=2 * GRACE_S) as worker:
        await ring.register(name, worker.url)
        call = asyncio.create_task(ring.say(name))
        await worker.until(lambda: worker.active == 1)
        await life(ring, name, "offline")
        await life(ring, name, "online")
        assert (await asyncio.wait_for(call, 60)).status == 200


# ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Said = tuple[int, bytes]


@asynccontextmanager
async def liveness(stack: Stack, asked: list[LivenessQuery], says: Callable[[], Said]) -> AsyncIterator[None]:
    async with nothing_left(), replica(stack, "liveness") as side:

        async def hear(facts: Sequence[LivenessQuery]) -> None:
            for fact in facts:
                asked.append(fact)
                status, body = says()
                answer = QueryAnswered(
                    workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id, status=status, body=body
                )
                side.publisher.post(answer, to=fact.reply_to)

        side.reader.hear(LivenessQuery, hear)
        await side.reader.start()
        yield


async def test_a_resume_reaches_liveness_and_stands_without_it(stack: Stack, ring: Proxy) -> None:
    """Said twice it is said twice, which changes nothing; an owner's reaches nobody but the registry."""
    name = fresh()
    owner = await key(ring, "ops")
    await ring.register(name, "http://127.0.0.1:9/", token=await key(ring, "ops", "operator"))
    path = f"/workspaces/{name}"
    await ring.call("POST", f"{path}/pause")
    alone = await ring.call("POST", f"{path}/resume", {"note": "mended"})
    assert (alone.status, alone.json()["paused"], alone.json()["liveness"]["told"]) == (200, False, False)
    assert "does not answer" in alone.json()["liveness"]["text"]
    assert "stays down until it is resumed again" in alone.json()["liveness"]["text"]
    asked: list[LivenessQuery] = []
    said: list[Said] = [(200, b"{}")]
    async with liveness(stack, asked, lambda: said[-1]):
        for _ in range(2):
            told = await ring.call("POST", f"{path}/resume", {"note": "mended"})
            assert (told.status, told.json()["liveness"]) == (200, {"told": True, "text": None})
        said.append((409, b'{"code": "external", "detail": "No driver runs it."}'))
        other = await ring.call("POST", f"{path}/resume")
        assert (other.status, other.json()["liveness"]) == (200, {"told": True, "text": "No driver runs it."})
        assert [(each.verb, each.note, each.by) for each in asked[-3:]] == [
            ("resume", "mended", "admin"), ("resume", "mended", "admin"), ("resume", "", "admin"),
        ]  # fmt: skip
        before = len(asked)
        own = await ring.call("POST", f"{path}/resume", token=owner)
        assert (own.status, own.json()["liveness"]) == (200, None)
        assert len(asked) == before
