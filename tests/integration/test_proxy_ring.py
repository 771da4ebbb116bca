"""The ring on real servers: register, heartbeat, forward, keep, deliver, answer; proxy, queue and agent as they run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bide_agent.agent import Agent
from tests.conftest import Stack, until
from tests.integration.calendar_kit import LONG, free
from tests.integration.proxy_kit import Proxy, empty, fresh, proxy
from tests.integration.queue_kit import agent, queue_service


def rpc(method: str, task_id: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": {"id": task_id}}


@pytest.fixture
async def ring(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy and a queue service on empty tables; the proxy has had its first snapshot."""
    await empty(stack)
    async with (
        proxy(stack, kept_wait_s=5.0, query_timeout_s=20.0) as front,
        queue_service(stack, sweep_s=0.5, snapshot_s=0.3),
    ):
        await front.ready()
        yield front


async def seat(front: Proxy, worker: Agent, name: str, **more: Any) -> str:
    """Register the agent and send its first beat; its token."""
    said = await front.register(name, worker.url, **more)
    token: str = said["auth_token"]
    assert (await front.beat(name, token)).status == 200
    return token


async def test_an_idle_agent_answers_straight_through(ring: Proxy) -> None:
    name = fresh()
    async with agent(name) as worker:
        await seat(ring, worker, name)
        reply = await ring.say(name, "ping")
        assert reply.status == 200, reply.body
        assert "ping" in str(reply.json()["result"])
        (received,) = worker.received
        assert (received.delivery, received.hops) == (0, 1)
        assert received.queue_id == received.session


async def test_a_busy_agent_s_message_is_kept_delivered_and_answered(ring: Proxy) -> None:
    """A-Q-09, A-Q-17, A-P-09: the 202 is a promise, a Task in submitted; nothing in it could be taken for an answer."""
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        first = asyncio.create_task(ring.say(name, "first"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        second = await ring.say(name, "second")
        assert second.status == 202, second.body
        said = second.json()
        queue_id = said["queue_id"]
        assert said["queued"] is True
        assert said["result"]["status"]["state"] == "submitted"
        assert second.headers["location"] == f"/queue/{queue_id}"
        assert "message" not in said["result"]["status"]
        free(worker)
        assert (await first).status == 200

        async def done() -> bool:
            found = await ring.call("GET", f"/queue/{queue_id}")
            return found.status == 200 and found.json()["status"] == "completed"

        await until(done)
        assert [each.text for each in worker.received] == ["first", "second"]
        task = await ring.call("POST", f"/workspaces/{name}/a2a", rpc("tasks/get", queue_id), x_workspace_id="lead")
        assert task.json()["result"]["status"]["state"] == "completed", task.body
        assert task.json()["result"]["id"] == queue_id
        assert "second" in json.dumps(task.json()["result"]["artifacts"])


async def item(front: Proxy, queue_id: str, **headers: Any) -> dict[str, Any]:
    reply = await front.call("GET", f"/queue/{queue_id}", **headers)
    assert reply.status == 200, reply.body
    said: dict[str, Any] = reply.json()
    return said


async def ended(front: Proxy, queue_id: str, status: str = "completed") -> dict[str, Any]:
    async def has_ended() -> bool:
        return bool((await item(front, queue_id))["status"] == status)

    await until(has_ended)
    return await item(front, queue_id)


async def test_a_body_of_any_spelling_arrives_byte_for_byte_live_and_kept(ring: Proxy) -> None:
    """A-Q-06: a NUL escape, a lone surrogate, a 20-digit integer, odd spacing; in the text, and in the messageId."""
    name = fresh()
    bodies = [
        b'{ "jsonrpc" : "2.0", "id": 12345678901234567890, "method":"message/send",\n "params": {"message":'
        b' {"role":"user", "parts":[{"kind":"text","text":"\\u0000 \\ud800 x"}], "n": 1e3, "n": 1E3,'
        b' "messageId" : "m\\u0000\\ud800-%d"}}}' % number
        for number in range(2)
    ]
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        path = f"/workspaces/{name}/a2a"
        first = asyncio.create_task(ring.call("POST", path, bodies[0], x_workspace_id="caf\xe9"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        second = await ring.call("POST", path, bodies[1], x_workspace_id="caf\xe9")
        assert second.status == 202, second.body
        free(worker)
        assert (await first).status == 200
        await worker.until(lambda: len(worker.received) == 2)
        assert [each.body for each in worker.received] == bodies
        kept = await ended(ring, second.json()["queue_id"])
        assert kept["caller_id"] == "caf\\udce9"


async def test_what_the_original_callers_leave_out_is_supplied(ring: Proxy) -> None:
    """No jsonrpc, no id, no messageId, `type` for `kind`: it arrives with them, and the answer can be matched."""
    name = fresh()
    async with agent(name) as worker:
        await seat(ring, worker, name)
        body = b'{"method":"message/send","params":{"message":{"role":"user","parts":[{"type":"text","text":"seed"}]}}}'
        reply = await ring.call("POST", f"/workspaces/{name}/a2a", body)
        assert reply.status == 200, reply.body
        sent = json.loads(worker.received[0].body)
        assert sent["jsonrpc"] == "2.0"
        assert sent["id"] == reply.json()["id"]
        assert sent["params"]["message"]["messageId"]


async def test_twenty_concurrent_sends_of_one_message_are_one(ring: Proxy) -> None:
    """B-15, A-Q-02 (the other caller's is its own): all get its id; a twin of a live forward gets its answer."""
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        live = [asyncio.create_task(ring.say(name, "live", message_id="m-live", request_id=n)) for n in range(3)]
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        sent = [ring.say(name, "same", message_id="m-1", request_id=n) for n in range(20)]
        other = ring.say(name, "same", message_id="m-1", caller="another")
        *replies, others = await asyncio.gather(*sent, other)
        assert {reply.status for reply in replies} == {202}
        assert len({reply.json()["queue_id"] for reply in replies}) == 1
        assert [reply.json()["id"] for reply in replies] == list(range(20))
        assert others.json()["queue_id"] != replies[0].json()["queue_id"]
        free(worker)
        answers = await asyncio.gather(*live)
        assert [reply.json()["id"] for reply in answers] == [0, 1, 2]
        assert len({json.dumps(reply.json()["result"]) for reply in answers}) == 1
        await worker.until(lambda: len(worker.received) == 3)
        assert [each.text for each in worker.received] == ["live", "same", "same"]


async def test_a_key_with_another_body_is_refused(ring: Proxy) -> None:
    """B-16: 409 while the first is in flight here, 422 while it waits; never swallowed."""
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        first = asyncio.create_task(ring.say(name, "a", message_id="m-0"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        clash = await ring.say(name, "b", message_id="m-0")
        assert (clash.status, clash.json()["error"]["code"]) == (409, -32600)
        assert (await ring.say(name, "c", message_id="m-1")).status == 202
        clash = await ring.say(name, "d", message_id="m-1")
        assert (clash.status, clash.json()["error"]["data"]["code"]) == (422, "key_conflict")
        free(worker)
        assert (await first).status == 200


async def test_an_explicit_key_is_one_execution_idle_busy_and_after(ring: Proxy) -> None:
    """A-Q-20, A-Q-21: a new messageId per retry does not defeat it, and a late retry gets the stored answer."""
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)

        async def send(message_id: str) -> Any:
            body = {"jsonrpc": "2.0", "id": message_id, "method": "message/send", "params": PARAMS}
            return await ring.call("POST", f"/workspaces/{name}/a2a", body, x_workspace_id="l", idempotency_key="k-1")

        first = await send("1")
        assert first.status == 202, first.body
        queue_id = first.json()["queue_id"]
        assert (await send("2")).json()["queue_id"] == queue_id
        await worker.until(lambda: worker.active == 1)
        free(worker)
        await ended(ring, queue_id)
        late = await send("3")
        assert (late.status, late.headers.get("idempotent-replayed")) == (200, "true"), late.body
        assert late.json()["id"] == "3"
        assert late.headers["x-queue-id"] == queue_id
        assert len(worker.received) == 1


PARAMS = {"message": {"role": "user", "messageId": "m", "parts": [{"kind": "text", "text": "once"}]}}


async def test_a_limited_wait_gives_the_answer_or_a_promise(ring: Proxy) -> None:
    name = fresh()
    async with agent(name, work_s=0.2) as worker:
        await seat(ring, worker, name)
        quick = await ring.say(name, "quick", prefer="wait=60")
        assert (quick.status, quick.headers.get("preference-applied")) == (200, "wait=60"), quick.body
        assert "quick" in str(quick.json()["result"])
        worker.behave(work_s=LONG)
        slow = await ring.say(name, "slow", x_timeout="0.5")
        assert slow.status == 202, slow.body
        assert slow.json()["result"]["status"]["state"] in {"submitted", "working"}
        await worker.until(lambda: worker.active == 1)
        free(worker)
        found = await ended(ring, slow.json()["queue_id"])
        assert "slow" in str(found["answer"])


@pytest.mark.parametrize(("asynchronous", "whose"), [(True, "ours"), (False, "the agent's")])
async def test_a_limited_wait_of_a_modern_caller_gets_what_send_message_answers(
    ring: Proxy, asynchronous: bool, whose: str
) -> None:
    """1.0's oneof, also where the agent accepted and its Task was followed to the end; then under our id."""
    name = fresh()
    async with agent(name, work_s=0.2, behaviour={"asynchronous": asynchronous, "answer": "task"}) as worker:
        await seat(ring, worker, name)
        reply = await ring.say(name, "m", method="SendMessage", a2a_version="1.0", prefer="wait=60", request_id=9)
        assert (reply.status, reply.headers.get("preference-applied")) == (200, "wait=60"), reply.body
        assert (reply.json()["id"], reply.json()["result"].keys()) == (9, {"task"})
        task = reply.json()["result"]["task"]
        assert task["status"]["state"] == "TASK_STATE_COMPLETED"
        queue_id = reply.headers["x-queue-id"]
        assert (task["id"] == queue_id) is (whose == "ours")
        found = await ring.call("POST", f"/workspaces/{name}/a2a", rpc("GetTask", task["id"]), x_workspace_id="lead")
        assert found.json()["result"]["id"] == task["id"], "and that can be asked for"
        assert found.json()["result"]["status"]["state"] == "TASK_STATE_COMPLETED"


async def test_blocking_and_streaming_callers_get_the_submitted_task(ring: Proxy) -> None:
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        first = asyncio.create_task(ring.say(name, "first"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        blocking = await ring.say(name, "b", configuration={"blocking": True})
        assert (blocking.status, blocking.json()["result"]["status"]["state"]) == (200, "submitted")
        modern = await ring.say(name, "m", method="SendMessage", a2a_version="1.0")
        assert modern.status == 200
        assert modern.json()["result"]["task"]["status"]["state"] == "TASK_STATE_SUBMITTED"
        assert modern.json().keys() == {"jsonrpc", "id", "result"}
        now = await ring.say(
            name, "n", method="SendMessage", a2a_version="1.0", configuration={"returnImmediately": True}
        )
        assert now.status == 202
        stream = await ring.say(name, "s", method="message/stream")
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        (event,) = stream.events()
        assert event["result"]["status"]["state"] == "submitted"
        free(worker)
        assert (await first).status == 200


async def test_a_stream_of_an_idle_agent_comes_through_as_it_is(ring: Proxy) -> None:
    name = fresh()
    async with agent(name, work_s=0.2) as worker:
        await seat(ring, worker, name)
        reply = await ring.say(name, "s", method="message/stream")
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.complete
        assert len(reply.events()) > 1
        assert "s" in str(reply.events())


async def test_a_waiting_message_is_canceled_and_another_s_does_not_exist(ring: Proxy) -> None:
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(ring, worker, name)
        first = asyncio.create_task(ring.say(name, "first"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)  # the turns after this one
        one, two = [(await ring.say(name, text)).json()["queue_id"] for text in ("one", "two")]
        path, key = f"/workspaces/{name}/a2a", await operator(ring, "stranger", ())
        stranger = await ring.call("POST", path, rpc("tasks/cancel", one), token=key)
        assert (stranger.status, stranger.json()["error"]["code"]) == (200, -32001), stranger.body
        assert (await ring.call("GET", f"/queue/{one}", token=key)).status == 404
        assert (await ring.call("DELETE", f"/queue/{one}")).status == 200
        canceled = await ring.call("POST", path, rpc("tasks/cancel", two), x_workspace_id="lead")
        assert canceled.json()["result"]["status"]["state"] == "canceled", canceled.body
        again = await ring.call("POST", path, rpc("tasks/get", one), x_workspace_id="lead")
        assert again.json()["result"]["status"]["state"] == "canceled"
        free(worker)
        assert (await first).status == 200
        assert [each.text for each in worker.received] == ["first"]


async def test_what_the_protocol_itself_answers_about_a_task_comes_with_200(ring: Proxy) -> None:
    """Official clients raise on any other status before they read the error; trouble of ours keeps its own."""
    name = fresh()
    async with agent(name) as worker:
        await seat(ring, worker, name)
        path = f"/workspaces/{name}/a2a"
        kept = await ring.say(name, "k", prefer="wait=10")
        queue_id = kept.headers["x-queue-id"]
        over = await ring.call("POST", path, rpc("tasks/cancel", queue_id), x_workspace_id="lead")
        assert (over.status, over.json()["error"]["code"]) == (200, -32002), over.body
        other = fresh()
        await ring.register(other, worker.url)
        elsewhere = await ring.call("POST", f"/workspaces/{other}/a2a", rpc("tasks/get", queue_id))
        assert (elsewhere.status, elsewhere.json()["error"]["code"]) == (200, -32001), elsewhere.body
        assert elsewhere.json()["error"]["data"]["code"] == "item_unknown"
        nowhere = await ring.call("POST", f"/workspaces/{fresh()}/a2a", rpc("tasks/get", queue_id))
        assert (nowhere.status, nowhere.json()["error"]["code"]) == (404, -32001), "no such address is no reply"
        assert (await ring.call("POST", path, rpc("tasks/get", queue_id), token="no")).status == 401


async def operator(front: Proxy, caller_id: str, rights: tuple[str, ...]) -> str:
    """An API key."""
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id, rights) VALUES (sha256($1::bytea), $2, $3)"
    await front.service.pool.execute(query, token.encode(), caller_id, list(rights))
    return token


async def test_the_line_is_listed_in_order_and_by_pages(ring: Proxy) -> None:
    name = fresh()
    await ring.register(name)  # without a url: it is reachable nowhere yet (A-P-14)
    sent = [(await ring.say(name, str(n), caller=f"c{n % 2}")).json() for n in range(5)]
    assert {each["result"]["metadata"]["urn:bide:queue:1"]["reason"] for each in sent} <= {"no_url", "backlog"}
    path = f"/workspaces/{name}/queue"
    listed = (await ring.call("GET", f"{path}?limit=3")).json()
    rest = (await ring.call("GET", f"{path}?limit=3&cursor={listed['next_cursor']}")).json()
    ids = [each["queue_id"] for each in listed["items"] + rest["items"]]
    assert ids == [each["queue_id"] for each in sent]
    assert rest["next_cursor"] is None
    assert listed["items"][0]["why"]
    only = (await ring.call("GET", f"{path}?caller=c1")).json()
    assert [each["queue_id"] for each in only["items"]] == [sent[1]["queue_id"], sent[3]["queue_id"]]
    key = await operator(ring, "c0", ())
    own = (await ring.call("GET", path, token=key)).json()
    assert [each["caller_id"] for each in own["items"]] == ["c0", "c0", "c0"]
    assert (await ring.call("GET", f"{path}?limit=0")).status == 400


async def test_a_message_to_oneself_is_kept_and_never_waited_for(ring: Proxy) -> None:
    """A-P-12."""
    name = fresh()
    async with agent(name) as worker:
        token = await seat(ring, worker, name)
        reply = await ring.call(
            "POST", f"/workspaces/{name}/a2a", {"method": "message/send", "id": 1, "params": PARAMS}, token=token
        )
        assert reply.status == 202
        assert reply.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"] == "self"


async def test_sixty_messages_from_one_caller_are_kept_none_refused(ring: Proxy) -> None:
    """A-Q-24: they are delivered in the order in which they were sent, one at a time."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await seat(ring, worker, name)
        replies = [await ring.say(name, f"{n:02}", prefer="respond-async") for n in range(60)]
        assert {reply.status for reply in replies} <= {200, 202}
        await worker.until(lambda: len(worker.received) == 60 and worker.active == 0, 30)
        texts = [each.text for each in worker.received]
        assert texts == sorted(texts)
        ends = [each.ended_at or 0.0 for each in worker.received]
        assert all(
            later.started_at > end for later, end in zip(worker.received[1:], ends, strict=False) if later.started_at
        )
