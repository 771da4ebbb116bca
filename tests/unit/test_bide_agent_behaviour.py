"""What an agent can be told to do wrong: each behaviour shown over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import pytest

from bide_agent import Agent, Options, running
from bide_agent.behaviour import (
    DOOR_FATES,
    HUGE_MAX,
    TURN_FATES,
    WORDS,
    Behaviour,
    BehaviourError,
    Fate,
    changed,
    parse,
    spend,
)
from bide_agent.client import Reply, UnreachableError, request
from bide_agent.turns import Turns


def body(method: str = "message/send", text: str = "hello") -> bytes:
    params = {"message": {"role": "user", "messageId": "m-1", "parts": [{"kind": "text", "text": text}]}}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()


async def send(agent: Agent, method: str = "message/send", *, text: str = "hello", timeout_s: float = 5.0) -> Reply:
    return await request("POST", agent.url, body(method, text), timeout_s=timeout_s)


async def opened(agent: Agent, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection over which the message was sent: for what a client would not show."""
    reader, writer = await asyncio.open_connection(*agent.url.removeprefix("http://").split(":"))
    sent = body(method)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent)
    return reader, writer


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with running(Options(workspace="w1", work_s=0, grace_s=0)) as one:
        yield one


@asynccontextmanager
async def sending(agent: Agent, **given: Any) -> AsyncIterator[asyncio.Task[Reply]]:
    """A message that the agent has begun; what becomes of the call is the block's question."""
    begun = len(agent.received)
    call = asyncio.create_task(send(agent, **given))
    await agent.until(lambda: len(agent.received) > begun)
    yield call
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


def code(reply: Reply) -> tuple[int, Any]:
    error = reply.json()["error"]
    return error["code"], error.get("data", {}).get("code")


async def test_at_capacity_the_refusal_is_marked_busy(agent: Agent) -> None:
    agent.behave(work_s=600, retry_after_s=7)
    async with sending(agent):
        reply = await send(agent, text="second")
        assert (reply.status, reply.headers["retry-after"], code(reply)) == (503, "7", (-32603, "busy"))
        assert [(one.text, one.outcome, one.active) for one in agent.refused] == [("second", "busy", 1)]


@pytest.mark.parametrize(("slots", "refused"), [(1, 2), (2, 1), (3, 0)])
async def test_an_agent_takes_as_many_as_it_has_slots(slots: int, refused: int) -> None:
    async with running(Options(workspace="w1", work_s=1, max_concurrent=slots)) as agent:
        replies = await asyncio.gather(*(send(agent) for _ in range(3)))
        assert sorted(reply.status for reply in replies) == [200] * (3 - refused) + [503] * refused
        assert agent.active == 0


async def test_foreign_work_refuses_as_any_work_does_and_ends_by_itself(agent: Agent) -> None:
    agent.busy_for(1)
    assert (await send(agent)).status == 503
    await agent.until(lambda: agent.active == 0)
    assert (await send(agent)).status == 200


async def test_foreign_work_comes_on_top_of_a_running_turn(agent: Agent) -> None:
    agent.behave(work_s=600)
    async with sending(agent):
        agent.busy_for(600)
        assert agent.active == 2
        agent.busy_for(0)
        assert agent.active == 1


@pytest.mark.parametrize("method", ["message/send", "message/stream"])
async def test_a_slow_agent_stalls_before_the_head(agent: Agent, method: str) -> None:
    agent.behave(slow_s=600)
    reader, writer = await opened(agent, method)
    await agent.until(lambda: agent.active == 1)
    agent._state.turns.max_concurrent = 2
    agent.behave(slow_s=0)
    assert (await send(agent, method)).status == 200
    # The other one came first and has not a byte yet.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("method", ["message/send", "message/stream", "SendMessage", "SendStreamingMessage"])
@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("failing", 500, None),
        ("failing_rpc", 200, (-32603, None)),
        ("refusing", 200, (-32602, None)),
        ("preempted", 200, (-32603, "preempted")),
        ("bare_503", 503, None),
        ("wrong_token", 401, None),
    ],
)
async def test_an_error_is_answered_as_often_as_it_was_told(
    agent: Agent, method: str, name: str, status: int, said: tuple[int, str | None] | None
) -> None:
    agent.behave(**{name: 2})
    for _ in range(2):
        reply = await send(agent, method)
        assert reply.status == status
        assert "retry-after" not in reply.headers
        assert said is None or code(reply) == said
    assert (await send(agent, method)).status == 200
    assert agent.active == 0


@pytest.mark.parametrize("method", ["message/send", "message/stream"])
async def test_a_cut_connection_ends_before_any_byte(agent: Agent, method: str) -> None:
    agent.behave(cut=1)
    with pytest.raises(UnreachableError, match="closed"):
        await send(agent, method)
    assert (await send(agent, method)).status == 200
    assert [one.outcome for one in agent.received] == ["cut", "answered"]


@pytest.mark.parametrize("method", ["message/send", "message/stream"])
async def test_half_an_answer_is_a_head_and_then_nothing(agent: Agent, method: str) -> None:
    agent.behave(half_answer=1)
    reader, writer = await opened(agent, method)
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert rest
    assert b"completed" not in rest
    assert not rest.endswith((b"0\r\n\r\n", b"}"))
    writer.close()
    await writer.wait_closed()


async def test_a_silent_agent_holds_its_slot_until_the_caller_hangs_up(agent: Agent) -> None:
    agent.behave(silent=1)
    async with sending(agent) as call:
        assert (await send(agent)).status == 503
        assert not call.done()
    await agent.until(lambda: agent.active == 0)
    assert agent.received[0].outcome == "silent"
    assert (await send(agent)).status == 200


async def test_at_capacity_no_fate_of_a_turn_is_spent(agent: Agent) -> None:
    agent.behave(failing=1)
    agent.busy_for(600)
    assert (await send(agent)).status == 503
    assert agent.behaviour.failing == 1


async def test_polls_fail_for_the_first_seconds_of_a_task(agent: Agent) -> None:
    agent.behave(asynchronous=True, polls_fail_s=600)
    task_id = (await send(agent)).json()["result"]["id"]
    poll = json.dumps({"jsonrpc": "2.0", "id": 2, "method": "tasks/get", "params": {"id": task_id}}).encode()
    assert (await request("POST", agent.url, poll)).status == 500
    agent.behave(polls_fail_s=0)
    assert (await request("POST", agent.url, poll)).json()["result"]["status"]["state"] == "completed"


@pytest.mark.parametrize("size", [8 * 1024 * 1024 - 1, 8 * 1024 * 1024, 8 * 1024 * 1024 + 1])
@pytest.mark.parametrize("answer", ["message", "task"])
async def test_a_huge_answer_has_exactly_so_many_bytes(agent: Agent, size: int, answer: str) -> None:
    agent.behave(huge=size, answer=answer)
    reply = await send(agent)
    assert len(reply.body) == size
    assert reply.json()["result"]["kind"] == answer


async def test_a_huge_stream_has_a_text_of_so_many_bytes(agent: Agent) -> None:
    agent.behave(huge=100_000)
    assert len((await send(agent, "message/stream")).body) > 100_000


async def test_control_changes_an_agent_while_it_runs(agent: Agent) -> None:
    reply = await request("POST", f"{agent.url}/control/behave", b'{"work_s": 2, "failing": true, "busy_s": 600}')
    told = reply.json()
    assert (told["behaviour"]["work_s"], told["behaviour"]["failing"], told["active"]) == (2, -1, 1)
    assert agent.behaviour == Behaviour(work_s=2, failing=-1)
    assert (await request("POST", f"{agent.url}/control/beat")).status == 200


@pytest.mark.parametrize(
    "wrong", [b"{", b"[]", b'{"shy": 1}', b'{"work_s": "long"}', b'{"busy_s": -1}', b'{"busy_s": 5, "dies": true}']
)
async def test_control_refuses_what_there_is_not_and_changes_nothing(agent: Agent, wrong: bytes) -> None:
    reply = await request("POST", f"{agent.url}/control/behave", wrong)
    assert (reply.status, reply.headers["content-type"]) == (422, "application/problem+json")
    assert agent.behaviour == Behaviour(work_s=0)
    assert agent.active == 0


@pytest.mark.parametrize(
    "behaviour", [{"silent": -1}, {"slow_s": 600}, {"work_s": 600}, {"asynchronous": True, "work_s": 600}]
)
@pytest.mark.parametrize("method", ["message/send", "message/stream"])
async def test_an_agent_that_is_stopped_leaves_nothing_behind(
    method: str, behaviour: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    async with running(Options(workspace="w1", grace_s=0, behaviour=behaviour)) as agent:
        call = asyncio.create_task(send(agent, method))
        await agent.until(lambda: agent.active == 1)
        agent.busy_for(600)
    (outcome,) = await asyncio.gather(call, return_exceptions=True)
    assert isinstance(outcome, Reply if "asynchronous" in behaviour else UnreachableError)
    assert agent.active == 0
    assert agent.received[0].ended_at is not None
    assert asyncio.all_tasks() - before == set()
    assert not caplog.records


async def test_a_turn_that_ends_within_the_grace_is_answered() -> None:
    async with running(Options(workspace="w1", work_s=1, grace_s=30)) as agent:
        call = asyncio.create_task(send(agent))
        await agent.until(lambda: agent.active == 1)
    assert (await call).status == 200


async def test_a_count_is_taken_off_however_a_turn_ends() -> None:
    """A-Q-15: a counter that was raised outside of try/finally left an agent busy for ever."""
    falls: list[int] = []
    turns = Turns(1, lambda: falls.append(turns.active))
    full: list[bool] = []

    def work() -> None:
        with turns.begin():
            full.append(turns.full)
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        work()
    assert full == [True]
    assert (turns.active, turns.full, falls) == (0, False, [0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"work_s": 1}, Behaviour(work_s=1.0)),
        ({"silent": True}, Behaviour(silent=-1)),
        ({"silent": False}, Behaviour()),
        ({"silent": 3.0}, Behaviour(silent=3)),
        ({"deaf": True, "answer": "task"}, Behaviour(deaf=True, answer="task")),
        ({"huge": HUGE_MAX}, Behaviour(huge=HUGE_MAX)),
        ({"checkpoint": "ceiling_only", "stop": "ignore"}, Behaviour(checkpoint="ceiling_only", stop="ignore")),
    ],
)
def test_a_behaviour_changes_by_name(changes: dict[str, Any], expected: Behaviour) -> None:
    assert changed(Behaviour(), changes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"shy": 1}, {"work_s": -0.1}, {"work_s": True}, {"work_s": float("inf")}, {"work_s": float("nan")},
        {"silent": -2}, {"silent": 1.5}, {"silent": "1"}, {"deaf": 1}, {"answer": "poem"}, {"huge": HUGE_MAX + 1},
        {"huge": True}, {"stop": "message"}, {"checkpoint": True}, {"sigterm": []},
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BehaviourError):
        changed(Behaviour(), changes)


def test_fates_are_spent_in_their_order() -> None:
    behaviour, met = Behaviour(failing=2, cut=1, preempted=-1), []
    for _ in range(5):
        fate, behaviour = spend(behaviour, TURN_FATES)
        met.append(fate)
    assert met == [Fate.CUT, Fate.FAILING, Fate.FAILING, Fate.PREEMPTED, Fate.PREEMPTED]
    assert spend(behaviour, DOOR_FATES) == (None, behaviour)


def test_every_fate_has_its_place_and_its_counter() -> None:
    assert {*DOOR_FATES, *TURN_FATES} == set(Fate)
    assert {fate.value for fate in Fate} <= set(Behaviour.__slots__)


def test_a_behaviour_that_is_a_word_has_its_words() -> None:
    words = {field.name for field in fields(Behaviour) if isinstance(field.default, str)}
    assert words == WORDS.keys()
    assert all(getattr(Behaviour(), name) == WORDS[name][0] for name in words)


def test_the_words_of_a_command_line_are_read() -> None:
    words = ["silent", "failing=3", "work_s=0.5", "check_token=false", "answer=task"]
    assert parse(words) == {"silent": True, "failing": 3, "work_s": 0.5, "check_token": False, "answer": "task"}
    with pytest.raises(BehaviourError, match="name=value"):
        parse(["=3"])
