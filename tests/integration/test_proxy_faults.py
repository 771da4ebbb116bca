"""What goes wrong around a proxy: agents that break, callers that leave, a broker, queue or registry that is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import aio_pika
import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from bide_agent.agent import Agent
from services.proxy.api.asking import Asking
from services.proxy.api.identity import Caller
from services.proxy.api.questions import Questions
from shared import topology
from tests.conftest import Stack, until
from tests.integration.calendar_kit import LONG, free
from tests.integration.proxy_kit import Proxy, empty, fresh, message, proxy, proxy_settings
from tests.integration.queue_kit import agent, queue_service


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy and a queue service."""
    await empty(stack)
    async with proxy(stack) as opened, queue_service(stack, sweep_s=0.5, snapshot_s=0.3, busy_cap_s=0.5):
        await opened.ready()
        yield opened


@pytest.fixture
async def lonely(stack: Stack) -> AsyncIterator[Proxy]:
    """A proxy alone: nobody reads what it publishes."""
    await empty(stack)
    await purge(stack)
    async with proxy(stack, query_timeout_s=0.3) as opened:
        yield opened
    await purge(stack)


async def purge(stack: Stack) -> None:
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        for name in ("queue.message.busy", "queue.queue.query", "queue.workspace.registered"):
            channel = await connection.channel()
            try:
                await (await channel.get_queue(name)).purge()
            except aio_pika.exceptions.ChannelNotFoundEntity:
                continue


async def seat(front: Proxy, worker: Agent, **more: Any) -> str:
    """Register the agent under its own name; its token."""
    token: str = (await front.register(worker._state.options.workspace, worker.url, **more))["auth_token"]
    return token


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


BROKEN = [
    ("failing", "failed_attempt", 500),
    ("failing_rpc", "failed_attempt", 200),
    ("refusing", "refused", 200),
    ("cut", "unknown", 502),
    ("half_answer", "answer_lost", 502),
]


@pytest.mark.parametrize(("fate", "outcome", "status"), BROKEN, ids=[row[0] for row in BROKEN])
async def test_what_breaks_is_the_caller_s_with_class_status_and_text(
    front: Proxy, fate: str, outcome: str, status: int
) -> None:
    """A-P-08, A-P-04: bytes reached the agent, so nothing is repeated; and no error is empty."""
    name = fresh()
    before = counted("bide_proxy_forwards_total", outcome=outcome)
    async with agent(name, behaviour={fate: 1}) as worker:
        await seat(front, worker)
        reply = await front.say(name, "x", request_id="r")
        assert reply.status == status, reply.body
        error = reply.json()["error"]
        assert reply.json()["id"] == "r"
        assert error["message"]
        if "class" in error.get("data", {}):
            assert error["data"]["class"] == outcome
            assert error["data"]["target"] == name
            assert error["data"]["text"]
        else:
            assert reply.headers["x-bide-outcome"] == outcome, "the agent's own error, byte for byte, and our word"
        assert counted("bide_proxy_forwards_total", outcome=outcome) == before + 1
        assert (await front.say(name, "again")).status == 200, "it holds no slot"


@pytest.mark.parametrize(("fate", "reason"), [("bare_503", "busy"), ("preempted", "preempted")])
async def test_what_comes_back_is_kept_with_no_attempt(front: Proxy, fate: str, reason: str) -> None:
    """A-Q-17: whatever says busy is kept before anybody is told."""
    name = fresh()
    async with agent(name, behaviour={fate: 1}) as worker:
        await seat(front, worker)
        reply = await front.say(name, "later")
        assert reply.status == 202, reply.body
        assert reply.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"] == reason
        found = await ended(front, reply.json()["queue_id"])
        assert (found["status"], found["attempts"]) == ("completed", 0)


async def ended(front: Proxy, queue_id: str) -> dict[str, Any]:
    async def has_ended() -> bool:
        return (await front.call("GET", f"/queue/{queue_id}")).json().get("status") not in {
            "queued",
            "dispatched",
            None,
        }

    await until(has_ended)
    said: dict[str, Any] = (await front.call("GET", f"/queue/{queue_id}")).json()
    return said


async def test_an_agent_that_does_its_own_work_is_kept_for(front: Proxy) -> None:
    """It beats with everything in use, or refuses before its beat has told: the same for the caller."""
    name = fresh()
    async with agent(name) as worker:
        token = await seat(front, worker)
        worker.busy_for(600)
        refused = await front.say(name, "refused by the agent")
        assert (refused.status, reason(refused)) == (202, "busy")
        await front.beat(name, token, active=1)
        kept = await front.say(name, "known to be busy")
        assert kept.status == 202
        worker.busy_for(0)
        await front.beat(name, token, active=0)
        await worker.until(lambda: len(worker.received) == 2)
        assert [each.text for each in worker.received] == ["refused by the agent", "known to be busy"]


def reason(reply: Any) -> str:
    said: str = reply.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"]
    return said


async def test_nobody_at_the_address_is_kept(front: Proxy) -> None:
    """A-P-14, A-Q-11."""
    name = fresh()
    await front.register(name, "http://127.0.0.1:1/")
    reply = await front.say(name)
    assert (reply.status, reason(reply)) == (202, "not_delivered")


async def test_a_caller_that_leaves_ends_nothing(front: Proxy) -> None:
    """A-P-05: the forward goes on, its slot stays taken, and its outcome is known."""
    name = fresh()
    before = counted("bide_proxy_forwards_total", outcome="delivered")
    async with agent(name, work_s=LONG) as worker:
        await seat(front, worker)
        host, _, port = front.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = message("left alone")
        head = f"POST /workspaces/{name}/a2a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer the-admin-token\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await worker.until(lambda: worker.active == 1)
        writer.close()
        kept = await front.say(name, "next")
        assert (kept.status, reason(kept)) == (202, "at_capacity")
        free(worker)
        await worker.until(lambda: len(worker.received) == 2)
        assert worker.received[0].outcome == "answered" or worker.received[0].ended_at is not None
        await until(lambda: _grown(before))


async def _grown(before: float) -> bool:
    return counted("bide_proxy_forwards_total", outcome="delivered") >= before + 1


async def test_a_large_answer_streams_through_whole(front: Proxy) -> None:
    name = fresh()
    async with agent(name, behaviour={"huge": 3 << 20}) as worker:
        await seat(front, worker)
        reply = await front.say(name)
        assert (reply.status, len(reply.body), reply.complete) == (200, 3 << 20, True)


async def test_a_large_answer_that_breaks_off_is_not_taken_for_whole(front: Proxy) -> None:
    name = fresh()
    async with agent(name, behaviour={"huge": 3 << 20, "half_answer": 1}) as worker:
        await seat(front, worker)
        reply = await front.say(name)
        assert (reply.status, reply.complete) == (200, False)


@pytest.mark.parametrize(("size", "status"), [((1 << 20) - 1, 200), (1 << 20, 200), ((1 << 20) + 1, 413)])
async def test_a_body_is_never_cut(front: Proxy, size: int, status: int) -> None:
    """A-P-17."""
    name = fresh()
    async with agent(name) as worker:
        await seat(front, worker)
        empty_one = message("")
        body = message("x" * (size - len(empty_one)))
        reply = await front.call("POST", f"/workspaces/{name}/a2a", body)
        assert reply.status == status
        if status == 413:
            assert reply.json()["error"]["data"]["code"] == "body_too_large"
        else:
            assert worker.received[0].body == body


@pytest.mark.parametrize(
    ("body", "code", "status"),
    [
        (b"", -32700, 400),
        (b"{", -32700, 400),
        (b"\xff", -32700, 400),
        (b"[]", -32600, 400),
        (b'{"id":7}', -32600, 400),
        (b'{"id":7,"method":"message/send","params":{"message":{"metadata":{"urn:bide:queue:1":{"priority":"x"}}}}}',
         -32602, 400),
    ],
)  # fmt: skip
async def test_what_is_no_request_gets_a_json_rpc_error(front: Proxy, body: bytes, code: int, status: int) -> None:
    name = fresh()
    await front.register(name)
    reply = await front.call("POST", f"/workspaces/{name}/a2a", body)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert reply.json()["id"] == (7 if b"7" in body else None)


async def test_a_message_that_goes_in_circles_is_stopped(front: Proxy) -> None:
    name = fresh()
    async with agent(name) as worker:
        await seat(front, worker)
        assert (await front.say(name, x_bide_hops="16")).status == 200
        assert worker.received[0].hops == 17
        assert (await front.say(name, x_bide_hops="17")).status == 508


async def test_the_depth_has_an_end(front: Proxy) -> None:
    """A-Q-24, A-P-13."""
    name = fresh()
    await front.register(name)
    await front.call("PATCH", f"/workspaces/{name}", {"queue_depth_max": 3})
    assert [(await front.say(name, str(n))).status for n in range(4)] == [202, 202, 202, 429]
    full = await front.say(name, "again")
    assert full.json()["error"]["data"]["code"] == "queue_full"
    assert int(full.headers["retry-after"]) > 0


async def test_a_fresh_key_or_id_buys_no_place_and_a_retry_keeps_its_own(front: Proxy) -> None:
    """A-Q-24, I2: also of what has ended, while the line is full; and another caller's id is worth nothing."""
    name = fresh()
    await front.register(name)
    canceled = (await front.say(name, "0", message_id="m-0", idempotency_key="k-0")).json()["queue_id"]
    assert (await front.call("DELETE", f"/queue/{canceled}")).status == 200
    await front.call("PATCH", f"/workspaces/{name}", {"queue_depth_max": 2})
    first = (await front.say(name, "1", message_id="m-1", idempotency_key="k-1")).json()["queue_id"]
    second = (await front.say(name, "2", message_id="m-2")).json()["queue_id"]
    assert (await front.say(name, "3", idempotency_key="fresh")).status == 429
    assert (await front.say(name, "3", x_queue_id=str(uuid7()))).status == 429
    assert (await front.say(name, "3", caller="another", x_queue_id=second)).status == 429
    keyed = await front.say(name, "1", message_id="m-1", idempotency_key="k-1")
    assert (keyed.status, keyed.json()["queue_id"]) == (202, first)
    told = await front.say(name, "2", message_id="m-2", x_queue_id=second)
    assert (told.status, told.json()["queue_id"]) == (202, second)
    ended = await front.say(name, "0", message_id="m-0", idempotency_key="k-0")
    assert (ended.status, ended.headers["x-queue-id"]) == (200, canceled), ended.body
    listed = (await front.call("GET", f"/workspaces/{name}/queue")).json()["items"]
    assert [each["queue_id"] for each in listed] == [first, second]


# ── the broker, the queue, the registry ──────────────────────────────────────────────────────────────────────────────


async def test_without_a_snapshot_a_proxy_keeps_and_answers_for_its_promise(lonely: Proxy) -> None:
    """The queue service is away: the message is in the broker, and whoever promised it says so."""
    name = fresh()
    async with agent(name) as worker:
        await seat(lonely, worker)
        reply = await lonely.say(name)
        assert (reply.status, reason(reply)) == (202, "no_copy")
        queue_id = reply.json()["queue_id"]
        item = await lonely.call("GET", f"/queue/{queue_id}")
        assert (item.status, item.json()["status"]) == (200, "queued")
        task = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"id": queue_id}}
        asked = await lonely.call("POST", f"/workspaces/{name}/a2a", task)
        assert asked.json()["result"]["status"]["state"] == "submitted", "an operator sees everybody's"
        away = await lonely.call("DELETE", f"/queue/{queue_id}")
        assert (away.status, away.json()["code"]) == (503, "queue_away")
        assert not worker.received


async def test_a_proxy_that_starts_asks_for_its_first_copy(stack: Stack) -> None:
    """Rule 8: it does not wait for the queue's next turn, which here would not come; after a cut it asks again."""
    await empty(stack)
    await purge(stack)
    name = fresh()
    async with AsyncExitStack() as exits:
        one = await exits.enter_async_context(proxy(stack))
        await exits.enter_async_context(queue_service(stack, snapshot_s=3600.0, snapshot_pause_s=0.2))
        await one.ready()
        worker = await exits.enter_async_context(agent(name))
        await seat(one, worker)
        assert (await one.say(name)).status == 200, "it forwards"
        two = await exits.enter_async_context(proxy(stack))
        await two.ready()
        first = two.copies.backlogs.snapshot_at or 0.0
        transport = two.service.publisher._connection.transport
        assert transport is not None
        await transport.connection.close(ConnectionResetError("cut"))

        async def has_newer() -> bool:
            return (two.copies.backlogs.snapshot_at or 0.0) > first

        await until(has_newer)


async def test_an_id_that_another_replica_promised_is_not_yet_visible(stack: Stack) -> None:
    await empty(stack)
    await purge(stack)
    async with AsyncExitStack() as exits:
        one, two = [await exits.enter_async_context(proxy(stack, query_timeout_s=30.0)) for _ in range(2)]
        name = fresh()
        await one.register(name)
        await exits.enter_async_context(queue_service(stack))
        await two.ready()
        unknown = await two.call("GET", "/queue/01890000-0000-7000-8000-000000000001")
        assert unknown.status == 404
        young = str(one.copies.uses.fleet_beat().fact_id)
        reply = await two.call("GET", f"/queue/{young}")
        assert (reply.status, reply.json()["code"]) == (503, "not_yet_visible")
        assert int(reply.headers["retry-after"]) > 0


async def test_an_item_that_is_read_between_two_questions_is_not_denied_to_its_owner(stack: Stack) -> None:
    """A-Q-12: told no, then asked why not, and by then it is there: come again. A stranger's it is not."""
    await empty(stack)
    await purge(stack)
    async with proxy(stack) as one, queue_service(stack):
        await one.ready()
        name = fresh()
        await one.register(name)
        queue_id = UUID((await one.say(name)).json()["queue_id"])
        settings = proxy_settings(stack, replica_id=one.service.settings.replica_id)
        questions = Questions(settings, one.copies, Asking(settings, one.copies, one.service.publisher))

        async def is_read() -> bool:
            found = await questions.ask("item", queue_id=queue_id, caller_hash=None)
            return found is not None and found.status == 200

        await until(is_read)
        operator = Caller("lead", bytes(32), frozenset({"operator"}))
        assert (await questions.why_not(queue_id, operator)).code == "not_yet_visible"
        assert (await questions.why_not(queue_id, Caller("stranger", bytes(32)))).code == "item_unknown"


async def test_what_the_broker_refuses_is_not_promised(lonely: Proxy, stack: Stack) -> None:
    """A-P-16: 503 with its own code, never a 202; nothing of it counts afterwards."""
    name = fresh()
    await lonely.register(name)
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.queue_delete("queue.message.busy")
        reply = await lonely.say(name)
        assert (reply.status, reply.json()["error"]["code"]) == (503, -32603)
        assert reply.json()["error"]["data"]["code"] == "not_kept"
        assert int(reply.headers["retry-after"]) > 0
        assert lonely.copies.keeps.pending(name) == 0
        await topology.declare(channel)
        assert (await lonely.say(name)).status == 202


async def test_a_keep_without_a_confirm_is_unknown_and_its_retry_is_one_item(
    front: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A-P-16, I2: the id comes back with the retry, and it is the same item, whether the broker had it or not."""
    name = fresh()
    await front.register(name)
    publisher, sent = front.service.publisher, front.service.publisher._publish

    async def lost(*arguments: Any) -> None:
        await sent(*arguments)
        raise ConnectionResetError("cut before the confirm")

    monkeypatch.setattr(publisher, "_publish", lost)
    unknown = await front.say(name, "once", message_id="m-1")
    assert (unknown.status, unknown.json()["error"]["data"]["code"]) == (503, "keep_unknown")
    monkeypatch.setattr(publisher, "_publish", sent)
    told = unknown.headers["x-queue-id"]
    retry = await front.say(name, "once", message_id="m-1", x_queue_id=told)
    assert (retry.status, retry.json()["queue_id"]) == (202, told)

    async def listed() -> list[str]:
        found = (await front.call("GET", f"/workspaces/{name}/queue")).json()["items"]
        return [each["queue_id"] for each in found]

    async def has_come() -> bool:  # the 202 waits for the queue's word no longer than a moment
        return bool(await listed())

    await until(has_come)
    assert await listed() == [told]
    assert (await front.say(name, "once", x_queue_id="not-ours")).status == 400


async def test_all_who_joined_a_message_that_may_be_kept_are_told_one_id(
    front: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A-P-16, I2: whichever of them sends it again, it is the same item."""
    name = fresh()
    await front.register(name)
    publisher, sent = front.service.publisher, front.service.publisher._publish
    cut = asyncio.Event()

    async def lost(*arguments: Any) -> None:
        await sent(*arguments)
        await cut.wait()
        raise ConnectionResetError("cut before the confirm")

    monkeypatch.setattr(publisher, "_publish", lost)
    calls = [asyncio.create_task(front.say(name, "once", message_id="m-1", request_id=n)) for n in range(3)]
    await until(lambda: _joined(front, 2), 5)
    cut.set()
    replies = await asyncio.gather(*calls)
    monkeypatch.setattr(publisher, "_publish", sent)
    assert [reply.json()["error"]["data"]["code"] for reply in replies] == ["keep_unknown"] * 3
    told = {reply.headers["x-queue-id"] for reply in replies}
    assert len(told) == 1, told
    retries = [await front.say(name, "once", message_id="m-1", x_queue_id=each) for each in told]
    assert {retry.json()["queue_id"] for retry in retries} == told


async def _joined(front: Proxy, count: int) -> bool:
    return sum(flight.joined for flight in front.copies.flights._flights.values()) == count


async def test_idle_agents_stay_reachable_while_the_queue_is_away(stack: Stack) -> None:
    """A copy of the backlog that is too old holds nothing back, and is counted."""
    await empty(stack)
    before = counted("bide_proxy_stale_copy_total")
    name = fresh()
    async with proxy(stack, copy_stale_s=0.5) as opened:
        async with queue_service(stack, snapshot_s=0.2):
            await opened.ready()
        async with agent(name) as worker:
            await seat(opened, worker)

            async def is_old() -> bool:
                return time.time() - (opened.copies.backlogs.copied_at(name) or 0) > 0.5

            await until(is_old)
            assert (await opened.say(name)).status == 200
    assert counted("bide_proxy_stale_copy_total") == before + 1


async def test_the_next_message_waits_for_a_live_forward_and_follows_at_once(front: Proxy) -> None:
    """A-Q-23: capacity 1, a live forward, one kept behind it: delivered after its end and not before."""
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await seat(front, worker)
        first = asyncio.create_task(front.say(name, "live"))
        await worker.until(lambda: worker.active == 1)
        worker.behave(work_s=0.05)
        assert (await front.say(name, "kept")).status == 202
        free(worker)
        assert (await first).status == 200
        await worker.until(lambda: len(worker.received) == 2)
        live, kept = worker.received
        assert live.ended_at is not None
        assert kept.started_at is not None
        print(f"after {(kept.started_at - live.ended_at) * 1000:.0f} ms")
        assert live.ended_at <= kept.started_at


async def test_another_proxy_s_forwards_are_seen(stack: Stack) -> None:
    await empty(stack)
    name = fresh()
    async with AsyncExitStack() as exits:
        one, two = [await exits.enter_async_context(proxy(stack)) for _ in range(2)]
        await exits.enter_async_context(queue_service(stack, snapshot_s=0.3))
        worker = await exits.enter_async_context(agent(name, work_s=LONG))
        await one.ready()
        await two.ready()
        await seat(one, worker)

        async def known() -> bool:
            return two.copies.registry.find(name) is not None

        await until(known)
        live = asyncio.create_task(one.say(name, "live"))

        async def seen() -> bool:
            return two.copies.uses.of(name).in_use(time.time()) == 1

        await until(seen)
        kept = await two.say(name, "kept")
        assert (kept.status, reason(kept)) == (202, "at_capacity")
        free(worker)
        assert (await live).status == 200


async def test_a_closing_proxy_finishes_what_it_began_and_takes_nothing_new(stack: Stack) -> None:
    await empty(stack)
    name = fresh()
    async with proxy(stack) as opened, queue_service(stack, snapshot_s=0.3), agent(name, work_s=LONG) as worker:
        await opened.ready()
        await seat(opened, worker)
        live = asyncio.create_task(opened.say(name))
        await worker.until(lambda: worker.active == 1)
        waiting = asyncio.create_task(opened.say(name, "waits", prefer="wait=60"))

        async def is_kept() -> bool:
            return opened.copies.keeps.pending(name) == 1 or bool(opened.copies.backlogs.view(name).waiting)

        await until(is_kept)
        closing = asyncio.create_task(opened.door.close(60))
        await opened.door.stopping.wait()
        refused = await opened.say(name, "new")
        assert (refused.status, refused.json()["error"]["data"]["code"]) == (503, "stopping")
        assert (await opened.call("GET", "/readyz")).status == 503
        assert (await opened.call("GET", "/livez")).status == 200
        free(worker)
        assert (await live).status == 200
        assert (await waiting).status == 202, "it was kept: its caller can ask another replica"
        await closing


async def test_a_message_about_our_task_reaches_the_agent_under_its_own_id(front: Proxy) -> None:
    """The caller knows the task by our id; the agent never heard of that."""
    name = fresh()
    async with agent(name, behaviour={"answer": "task"}) as worker:
        await seat(front, worker)
        first = await front.say(name, "first", idempotency_key=fresh())
        found = await ended(front, first.json()["queue_id"])
        agents_id = found["answer"]["result"]["id"]
        await front.say(name, "about it", task_id=first.json()["queue_id"])
        assert f'"taskId": "{agents_id}"'.encode() in (worker.received or worker.refused)[-1].body
