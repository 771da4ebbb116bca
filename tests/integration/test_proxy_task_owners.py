"""Task ownership on real servers: what an agent gave one caller does not exist for another, through any replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bide_agent.agent import Agent
from tests.conftest import Stack, until
from tests.integration.proxy_kit import Proxy, empty, free_port, fresh, message, proxy
from tests.integration.queue_kit import agent, queue_service

AT_ONCE = {"blocking": False}
NO_SUCH_TASK = -32001


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy that forwards, on empty tables."""
    await empty(stack)
    async with proxy(stack) as opened, queue_service(stack, snapshot_s=0.3):
        await opened.ready()
        yield opened


async def key(front: Proxy, caller_id: str) -> str:
    """An API key without rights."""
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id) VALUES (sha256($1::bytea), $2)"
    await front.service.pool.execute(query, token.encode(), caller_id)
    return token


async def seat(front: Proxy, worker: Agent, name: str) -> None:
    said = await front.register(name, worker.url)
    assert (await front.beat(name, said["auth_token"])).status == 200


async def ask(front: Proxy, name: str, method: str, params: dict[str, Any], token: str) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    said: dict[str, Any] = (await front.call("POST", f"/workspaces/{name}/a2a", body, token=token)).json()
    return said


async def begin(front: Proxy, name: str, token: str) -> str:
    """Have the agent begin a task that works on; its id."""
    reply = await front.call("POST", f"/workspaces/{name}/a2a", message("go", configuration=AT_ONCE), token=token)
    assert reply.status == 200, reply.body
    task_id: str = reply.json()["result"]["id"]
    return task_id


def code(said: dict[str, Any]) -> int | None:
    found: int | None = said.get("error", {}).get("code")
    return found


CALLS = [
    ("tasks/get", "id"),
    ("tasks/cancel", "id"),
    ("tasks/resubscribe", "id"),
    ("tasks/pushNotificationConfig/set", "taskId"),
    ("GetTask", "id"),
    ("CancelTask", "id"),
    ("SubscribeToTask", "id"),
]


async def test_another_s_live_task_does_not_exist_and_one_s_own_does(front: Proxy) -> None:
    """The agent works on for its caller: whoever else knows the id can neither read, cancel, follow nor speak to it."""
    name = fresh()
    one, other = await key(front, "one"), await key(front, "other")
    async with agent(name, work_s=30) as worker:
        await seat(front, worker, name)
        task_id = await begin(front, name, one)
        for method, member in CALLS:
            assert code(await ask(front, name, method, {member: task_id}, other)) == NO_SUCH_TASK, method
        into = {"message": {"role": "user", "messageId": "m", "parts": [], "taskId": task_id}}
        assert code(await ask(front, name, "message/send", into, other)) == NO_SUCH_TASK
        assert worker.active == 1, "nobody has canceled it"
        assert (await ask(front, name, "tasks/get", {"id": task_id}, one))["result"]["status"]["state"] == "working"
        operator = await front.call(
            "POST", f"/workspaces/{name}/a2a", {"id": 1, "method": "tasks/get", "params": {"id": task_id}}
        )
        assert operator.json()["result"]["id"] == task_id, "an operator sees everybody's"
        canceled = await ask(front, name, "tasks/cancel", {"id": task_id}, one)
        assert canceled["result"]["status"]["state"] == "canceled"


async def test_a_stream_s_task_is_its_caller_s_while_it_still_runs(front: Proxy) -> None:
    name = fresh()
    one, other = await key(front, "one"), await key(front, "other")
    async with agent(name, work_s=30) as worker:
        await seat(front, worker, name)
        path = f"/workspaces/{name}/a2a"
        stream = asyncio.create_task(front.call("POST", path, message("s", method="message/stream"), token=one))
        await until(lambda: _told(front), 10)
        (task_id,) = worker._state.tasks._by_id
        assert code(await ask(front, name, "tasks/cancel", {"id": task_id}, other)) == NO_SUCH_TASK
        assert not stream.done()
        assert (await ask(front, name, "tasks/cancel", {"id": task_id}, one))["result"]["id"] == task_id
        assert (await stream).status == 200


async def _told(front: Proxy) -> bool:
    return bool(front.copies.owners._known)


async def test_every_replica_knows_it_also_one_that_starts_later(front: Proxy, stack: Stack) -> None:
    """What a forward saw is written behind it, and at the latest when its proxy ends."""
    name = fresh()
    one, other = await key(front, "one"), await key(front, "other")
    async with agent(name, work_s=30) as worker:
        await seat(front, worker, name)
        async with proxy(stack, task_owner_pause_s=600.0) as gone:
            await gone.ready()
            first = await begin(gone, name, one)
            assert code(await ask(gone, name, "tasks/cancel", {"id": first}, one)) is None
            await worker.until(lambda: worker.active == 0)
            second = await begin(gone, name, one)
            assert gone.copies.owners.unwritten, "the pause holds it back until the end"
        async with proxy(stack) as later:
            for task_id in (first, second):
                assert code(await ask(later, name, "tasks/get", {"id": task_id}, other)) == NO_SUCH_TASK
                assert (await ask(later, name, "tasks/get", {"id": task_id}, one))["result"]["id"] == task_id


async def test_what_nobody_was_given_is_the_agent_s_to_answer(front: Proxy) -> None:
    """A proxy that forgot must not tell an owner that his task is gone; and an id that is none is the agent's error."""
    name = fresh()
    one = await key(front, "one")
    async with agent(name, work_s=30) as worker:
        await seat(front, worker, name)
        task_id = await begin(front, name, one)
        await until(lambda: _written(front), 10)
        await front.service.pool.execute("TRUNCATE task_owners")
        front.copies.owners._known.clear()
        assert (await ask(front, name, "tasks/get", {"id": task_id}, one))["result"]["id"] == task_id
        unknown = await ask(front, name, "tasks/get", {"id": "none"}, one)
        assert (code(unknown), "data" in unknown["error"]) == (NO_SUCH_TASK, False), "byte for byte the agent's"


async def _written(front: Proxy) -> bool:
    return not front.copies.owners.unwritten and bool(
        await front.service.pool.fetchval("SELECT count(*) FROM task_owners")
    )


async def test_the_agent_s_task_of_a_kept_message_is_its_caller_s_too(front: Proxy) -> None:
    """GET /queue/{id} names it, and the answer carries it."""
    name = fresh()
    one, other = await key(front, "one"), await key(front, "other")
    async with agent(name, work_s=30, behaviour={"asynchronous": True}) as worker:
        await seat(front, worker, name)
        path = f"/workspaces/{name}/a2a"
        kept = await front.call("POST", path, message("k"), token=one, prefer="wait=0")
        queue_id = kept.json()["queue_id"]

        async def named() -> bool:
            shown = await front.call("GET", f"/queue/{queue_id}", token=one)
            return shown.json().get("agent_task_id") is not None

        await until(named)
        task_id = (await front.call("GET", f"/queue/{queue_id}", token=one)).json()["agent_task_id"]
        assert code(await ask(front, name, "tasks/get", {"id": task_id}, other)) == NO_SUCH_TASK
        assert (await ask(front, name, "tasks/get", {"id": task_id}, one))["result"]["id"] == task_id


@asynccontextmanager
async def lister(answer: dict[str, Any]) -> AsyncIterator[str]:
    """An agent that can list its tasks; every call gets `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                )
                await reader.readexactly(length)
                body = json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
        except asyncio.IncompleteReadError:
            writer.close()

    port = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", port):
        yield f"http://127.0.0.1:{port}/"


async def test_a_list_holds_only_one_s_own(front: Proxy) -> None:
    name = fresh()
    one, other = await key(front, "one"), await key(front, "other")
    tasks = [{"id": word, "contextId": "c", "status": {"state": "TASK_STATE_WORKING"}} for word in ("a", "b", "c")]
    listed = {
        "jsonrpc": "2.0",
        "id": 7,
        "result": {"tasks": tasks, "totalSize": 3, "pageSize": 50, "nextPageToken": ""},
    }
    async with lister(listed) as url:
        await front.register(name, url)
        for token, task_id in ((one, "a"), (other, "b")):
            front.copies.owners.tell(name, task_id, await _caller_hash(front, token))
        own = await ask(front, name, "ListTasks", {}, one)
        assert [each["id"] for each in own["result"]["tasks"]] == ["a"]
        assert own["result"]["totalSize"] == 1
        assert [each["id"] for each in (await ask(front, name, "ListTasks", {}, other))["result"]["tasks"]] == ["b"]
        body = {"jsonrpc": "2.0", "id": 7, "method": "ListTasks", "params": {}}
        operator = await front.call("POST", f"/workspaces/{name}/a2a", body)
        assert operator.json() == listed, "an operator's passes as it is"


async def _caller_hash(front: Proxy, token: str) -> bytes:
    query = "SELECT sha256(caller_id::bytea) FROM callers WHERE key_hash = sha256($1::bytea)"
    found: bytes = await front.service.pool.fetchval(query, token.encode())
    return found
