"""How long a live turn may last, what is said of a message that ended badly, and an agent's messages to itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bide_agent.agent import Agent
from services.proxy.api.outgoing import delivery_token
from shared.facts import MessageBusy, SessionStop
from tests.conftest import Stack, until
from tests.integration.proxy_kit import SECRET, Proxy, Reply, empty, fresh, message, proxy, send
from tests.integration.queue_kit import agent
from tests.integration.session_kit import puppet, task
from tests.integration.stand_in_kit import StandIn, item, stand_in

IDLE_S = 3.0
"""More than this machine stands still."""


@pytest.fixture
async def queue(stack: Stack) -> AsyncIterator[StandIn]:
    await empty(stack)
    async with stand_in(stack) as there:
        yield there


@asynccontextmanager
async def beating(front: Proxy, name: str, token: str) -> AsyncIterator[None]:
    """The agent's heart: it says the same again and again, and nothing about its progress."""

    async def beat() -> None:
        while True:
            assert (await front.beat(name, token, 1)).status == 200
            await asyncio.sleep(0.05)  # an agent's cadence

    heart = asyncio.create_task(beat())
    try:
        yield
    finally:
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)


def why(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["data"]["code"]


async def test_heartbeats_alone_keep_a_silent_turn_alive(stack: Stack, queue: StandIn) -> None:
    """A-P-01, A-P-02: a turn of several idle limits without a byte is answered; without its beats it is cut."""
    del queue
    async with proxy(stack, forward_idle_s=IDLE_S) as front, agent(name := fresh()) as worker:
        await front.ready()
        token = (await front.register(name, worker.url))["auth_token"]
        worker.behave(work_s=3 * IDLE_S)
        async with beating(front, name, token):
            reply = await front.say(name, "slow")
        assert reply.status == 200, reply.body
        assert "slow" in str(reply.json()["result"])
        await front.beat(name, token, 0)
        worker.behave(silent=1)
        assert why(await front.say(name, "silent")) == (504, "idle_timeout")


async def test_a_turn_that_beats_is_cut_at_the_configured_ceiling_and_not_before(stack: Stack, queue: StandIn) -> None:
    """A-P-01, A-P-03: it outlives the idle limit, and ends for the one reason that an operator set."""
    del queue
    async with proxy(stack, forward_idle_s=IDLE_S, forward_max_s=3 * IDLE_S) as front, agent(name := fresh()) as worker:
        await front.ready()
        token = (await front.register(name, worker.url))["auth_token"]
        await front.call("PATCH", f"/workspaces/{name}", {"session_ceiling_s": 0})
        worker.behave(silent=1)
        async with beating(front, name, token):
            assert why(await front.say(name, "hangs")) == (504, "total_timeout")
        assert (await front.say(name, "next")).status in {200, 202}, "and nothing of it is left behind"


@pytest.mark.parametrize("way", ["patch", "stop"])
async def test_a_live_forward_is_not_cut_by_the_bound_that_it_began_with(
    stack: Stack, queue: StandIn, way: str
) -> None:
    """C-K9: a raised ceiling reaches what runs, and while a stop is being said only who says it ends the turn."""
    del queue
    go_on = asyncio.Event()

    async def answered(_: object) -> dict[str, object]:
        await go_on.wait()
        return task("completed")

    async with proxy(stack, forward_max_s=3.0) as front, puppet(send=answered) as slow:
        await front.ready()
        await front.register(name := fresh(), slow.url)
        await front.call("PATCH", f"/workspaces/{name}", {"session_ceiling_s": 0})
        call = asyncio.create_task(front.say(name, "long"))

        async def is_asked() -> bool:
            return bool(slow.asked)

        await until(is_asked)
        if way == "patch":
            await front.call("PATCH", f"/workspaces/{name}", {"session_ceiling_s": 600})
        else:
            [session_id] = front.copies.uses.of(name).own
            await front.service.publisher.publish(
                SessionStop(workspace_id=name, rev=1, session_id=session_id, incarnation=1, reason="ceiling")
            )
        await asyncio.sleep(3.5)  # beyond the bound it began with
        assert not call.done()
        go_on.set()
        assert (await call).status == 200


ENDS = [("failed", "attempts"), ("failed", "ceiling"), ("expired", "ttl"), ("canceled", "canceled")]


@pytest.mark.parametrize(("status", "reason"), ENDS, ids=[f"{status}-{reason}" for status, reason in ENDS])
async def test_whatever_ended_badly_carries_the_id_that_its_caller_was_told(
    stack: Stack, queue: StandIn, status: str, reason: str
) -> None:
    """A-D-04: in the item, in the Task of either version and in the answer to a late retry; with how it ended."""
    async with proxy(stack, kept_wait_s=5.0, query_timeout_s=20.0) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        kept = await front.say(name, "doomed", message_id="m-1", idempotency_key="k-1")
        queue_id = kept.json()["queue_id"]
        ended = item(queue_id, name, status=status, reason=reason, position=None, last_error="the disk was full")
        queue.says["item"] = lambda _: (200, ended)
        shown = (await front.call("GET", f"/queue/{queue_id}")).json()
        assert (shown["queue_id"], shown["status"], shown["reason"]) == (queue_id, status, reason)
        for method in ("tasks/get", "GetTask"):
            said = {"jsonrpc": "2.0", "id": 7, "method": method, "params": {"id": queue_id}}
            task = (await front.call("POST", f"/workspaces/{name}/a2a", said)).json()["result"]
            assert_it_is_named(task, queue_id, status, reason)
        queue.on_kept = lambda _: {"duplicate_of": queue_id}
        late = await front.say(name, "doomed", message_id="m-1", idempotency_key="k-1")
        assert (late.status, late.headers["x-queue-id"]) == (200, queue_id)
        assert_it_is_named(late.json()["result"], queue_id, status, reason)


def assert_it_is_named(task: dict[str, object], queue_id: str, status: str, reason: str) -> None:
    state = str(task["status"]["state"])  # type: ignore[index]
    assert task["id"] == queue_id
    assert state.lower().removeprefix("task_state_") == ("canceled" if status == "canceled" else "failed")
    ours = task["metadata"]["urn:bide:queue:1"]  # type: ignore[index]
    assert (ours["queueId"], ours["status"], ours["reason"]) == (queue_id, status, reason)


# ── an agent and itself ──────────────────────────────────────────────────────────────────────────────────────────────

WAYS = [
    ("at once", {}, 202),
    ("with a limited wait", {"prefer": "wait=60"}, 202),
    ("with a limited wait of the original kind", {"x_timeout": "60"}, 202),
    ("blocking", {"a2a_version": "1.0"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), [row[1:] for row in WAYS], ids=[row[0] for row in WAYS])
async def test_an_agent_that_delegates_to_itself_is_not_held_up_by_itself(
    stack: Stack, queue: StandIn, headers: dict[str, str], status: int
) -> None:
    """A-D-10, A-P-12: while its turn runs it is answered with a promise, whatever it asked for; its turn can end."""
    async with proxy(stack) as front, agent(name := fresh()) as worker:
        await front.ready()
        token = (await front.register(name, worker.url))["auth_token"]
        worker.behave(silent=1)
        turn = asyncio.create_task(front.say(name, "delegate"))
        await worker.until(lambda: worker.active == 1)
        async with asyncio.timeout(20):
            own = await front.call("POST", f"/workspaces/{name}/a2a", message("to myself"), token=token, **headers)
        assert own.status == status, own.body
        assert own.json()["result"]["status"]["state"].lower().endswith("submitted")
        assert own.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"] == "self"
        assert not turn.done()
        turn.cancel()
    assert_it_is_marked_as_its_own(queue.lines[name], name)


def assert_it_is_marked_as_its_own(kept: list[MessageBusy], name: str) -> None:
    """A-P-07: whoever reads the item sees that nobody else has sent it."""
    assert [(fact.caller_id, fact.reason) for fact in kept] == [(name, "self")]


async def test_an_agent_knows_that_it_is_bide_who_calls_whoever_sent_the_message(stack: Stack, queue: StandIn) -> None:
    """A-P-07: the delivery token and our marks are on every call, the caller's own authorization on none of them."""
    del queue
    async with proxy(stack) as front, agent(name := fresh()) as worker:
        await front.ready()
        await front.register(name, worker.url)
        expect_token(worker, delivery_token(SECRET, name))
        other = (await front.register(fresh()))["auth_token"]
        for token in ("the-admin-token", other):
            reply = await front.call("POST", f"/workspaces/{name}/a2a", message("hi"), token=token)
            assert reply.status == 200, reply.body
        told = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"id": "its-own"}}
        asked = await front.call("POST", f"/workspaces/{name}/a2a", told)
        assert asked.status != 401, "what is no message goes there with the token too"
        assert len(worker.received) == 2
        for each in worker.received:
            assert (each.queue_id, each.delivery, each.hops) == (each.session, 0, 1)
        past = await send(worker.url.rstrip("/"), "POST", "/", message("forged"))
        assert past.status == 401, "it does ask for it"


def expect_token(worker: Agent, token: str) -> None:
    """What registering tells an agent that belongs to a Bide."""
    worker._state.tokens.delivery = token
