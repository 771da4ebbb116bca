"""What an agent answers: both dialects of A2A, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bide_agent import Agent, Options, running
from bide_agent.calls import METHODS, WITH_SUBSCRIBE, CallError, Dialect, Verb, read
from bide_agent.client import Reply, request

URI = "urn:bide:queue:1"
HEADERS = {"x-queue-id": "q-1", "x-bide-delivery": "2"}
SAID = {URI: {"queue_id": "q-1", "delivery": 2}}


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with running(Options(workspace="w1", work_s=0, grace_s=0)) as one:
        yield one


def message(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"message": {"role": "user", "messageId": "m-1", "contextId": "c-1", "parts": [{"text": text}]}, **more}


async def call(agent: Agent, method: str, params: Any, **headers: str) -> Reply:
    body = json.dumps({"jsonrpc": "2.0", "id": "r-1", "method": method, "params": params}).encode()
    return await request("POST", agent.url, body, headers={**HEADERS, **headers})


async def result(agent: Agent, method: str, params: Any) -> Any:
    reply = await call(agent, method, params)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    said = reply.json()
    assert (said.pop("jsonrpc"), said.pop("id")) == ("2.0", "r-1")
    return said["result"] if "result" in said else said["error"]["code"]


async def events(agent: Agent, method: str, params: Any) -> list[dict[str, Any]]:
    reply = await call(agent, method, params)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.body.decode().split("\n\n") if line]
    return [json.loads(line)["result"] for line in lines]


async def test_a_message_is_echoed_in_0_3(agent: Agent) -> None:
    said = await result(agent, "message/send", message())
    assert said.pop("messageId")
    assert said == {
        "kind": "message",
        "role": "agent",
        "contextId": "c-1",
        "parts": [{"kind": "text", "text": "hello"}],
        "metadata": SAID,
    }


async def test_a_message_is_echoed_in_1_0(agent: Agent) -> None:
    said = await result(agent, "SendMessage", message())
    assert said["message"].pop("messageId")
    assert said == {
        "message": {"role": "ROLE_AGENT", "contextId": "c-1", "parts": [{"text": "hello"}], "metadata": SAID}
    }


async def test_a_task_that_is_answered_whole_has_the_dialects_shape(agent: Agent) -> None:
    agent.behave(answer="task")
    old = await result(agent, "message/send", message())
    assert (old["kind"], old["status"]["state"], old["metadata"]) == ("task", "completed", SAID)
    assert old["artifacts"][0]["parts"] == [{"kind": "text", "text": "hello"}]
    new = (await result(agent, "SendMessage", message()))["task"]
    assert (new["status"]["state"], new["artifacts"][0]["parts"]) == ("TASK_STATE_COMPLETED", [{"text": "hello"}])
    assert "kind" not in new
    assert await result(agent, "GetTask", {"id": new["id"]}) == new


async def test_a_stream_tells_the_life_of_a_task_in_0_3(agent: Agent) -> None:
    first, artifact, last = await events(agent, "message/stream", message())
    task_id = first["id"]
    assert (first["kind"], first["contextId"], first["status"]["state"]) == ("task", "c-1", "working")
    assert (artifact["kind"], artifact["taskId"], artifact["lastChunk"]) == ("artifact-update", task_id, True)
    assert artifact["artifact"]["parts"] == [{"kind": "text", "text": "hello"}]
    assert (last["kind"], last["status"]["state"], last["final"]) == ("status-update", "completed", True)
    assert (await result(agent, "tasks/get", {"id": task_id}))["artifacts"] == [artifact["artifact"]]


async def test_a_stream_tells_the_life_of_a_task_in_1_0(agent: Agent) -> None:
    first, artifact, last = await events(agent, "SendStreamingMessage", message())
    assert [list(one) for one in (first, artifact, last)] == [["task"], ["artifactUpdate"], ["statusUpdate"]]
    assert first["task"]["status"]["state"] == "TASK_STATE_WORKING"
    assert artifact["artifactUpdate"]["artifact"]["parts"] == [{"text": "hello"}]
    assert last["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"
    assert "final" not in last["statusUpdate"]


@pytest.mark.parametrize(
    ("method", "poll", "configuration", "working", "completed"),
    [
        ("message/send", "tasks/get", {"blocking": False}, "working", "completed"),
        ("SendMessage", "GetTask", {"returnImmediately": True}, "TASK_STATE_WORKING", "TASK_STATE_COMPLETED"),
        ("SendMessage", "GetTask", {"return_immediately": True}, "TASK_STATE_WORKING", "TASK_STATE_COMPLETED"),
    ],
)
async def test_who_does_not_want_to_wait_gets_a_working_task(  # noqa: PLR0917 - the columns of a table
    agent: Agent, method: str, poll: str, configuration: dict[str, Any], working: str, completed: str
) -> None:
    agent.behave(work_s=600)
    first = await result(agent, method, message(configuration=configuration))
    first = first.get("task", first)
    assert first["status"]["state"] == working
    assert agent.active == 1
    assert (await result(agent, poll, {"id": first["id"]}))["status"]["state"] == working
    agent.behave(work_s=0)
    agent._state.tasks._by_id[first["id"]].turn._asked.set()
    await agent.until(lambda: agent.active == 0)
    last = await result(agent, poll, {"id": first["id"]})
    assert (last["status"]["state"], last["metadata"]) == (completed, SAID)


async def test_an_asynchronous_agent_answers_at_once_and_holds_its_slot(agent: Agent) -> None:
    agent.behave(asynchronous=True, work_s=600)
    first = await result(agent, "message/send", message())
    assert (first["kind"], first["status"]["state"], agent.active) == ("task", "working", 1)
    assert (await call(agent, "message/send", message())).status == 503
    canceled = await result(agent, "tasks/cancel", {"id": first["id"]})
    assert (canceled["status"]["state"], agent.active) == ("canceled", 0)
    assert agent.received[0].outcome == "canceled"


async def test_an_asynchronous_stream_ends_without_a_terminal_state(agent: Agent) -> None:
    agent.behave(asynchronous=True, work_s=600)
    (only,) = await events(agent, "SendStreamingMessage", message())
    assert only["task"]["status"]["state"] == "TASK_STATE_WORKING"
    assert agent.active == 1


async def test_a_stream_that_is_canceled_says_so(agent: Agent) -> None:
    agent.behave(work_s=600)
    streaming = asyncio.create_task(events(agent, "message/stream", message()))
    await agent.until(lambda: agent.active == 1)
    (task_id,) = agent._state.tasks._by_id
    assert (await result(agent, "tasks/cancel", {"id": task_id}))["status"]["state"] == "canceled"
    first, last = await streaming
    assert (first["status"]["state"], last["status"]["state"], last["final"]) == ("working", "canceled", True)
    assert await result(agent, "tasks/cancel", {"id": task_id}) == -32002


@pytest.mark.parametrize("method", ["tasks/get", "GetTask", "tasks/cancel", "CancelTask"])
async def test_a_task_that_is_not_there_is_32001(agent: Agent, method: str) -> None:
    assert await result(agent, method, {"id": "none"}) == -32001


async def test_the_slot_is_free_before_the_answer_is_read(agent: Agent) -> None:
    """A-Q-23: whoever reads an answer may send the next message at once."""
    for number in range(30):
        method = ("message/send", "message/stream")[number % 2]
        assert (await call(agent, method, message(str(number)))).status == 200
    assert [one.text for one in agent.received] == [str(number) for number in range(30)]
    assert not agent.refused


@pytest.mark.parametrize("path", ["agent-card.json", "agent.json"])
async def test_the_card_speaks_both_dialects(agent: Agent, path: str) -> None:
    card = (await request("GET", f"{agent.url}/.well-known/{path}")).json()
    assert (card["url"], card["protocolVersion"], card["preferredTransport"]) == (agent.url, "0.3.0", "JSONRPC")
    assert [(one["protocolBinding"], one["protocolVersion"]) for one in card["supportedInterfaces"]] == [
        ("JSONRPC", "1.0"),
        ("JSONRPC", "0.3"),
    ]
    assert card["capabilities"]["streaming"] is True


async def test_another_path_is_a_problem_that_says_what_there_is(agent: Agent) -> None:
    reply = await request("GET", f"{agent.url}/tasks")
    assert (reply.status, reply.headers["content-type"]) == (404, "application/problem+json")
    assert "agent-card.json" in reply.json()["detail"]


async def test_a_body_that_is_too_large_is_413(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bide_agent.server.BODY_MAX", 100)
    assert (await request("POST", agent.url, b"x" * 101)).status == 413


async def test_what_is_no_request_is_refused_and_recorded(agent: Agent) -> None:
    reply = await request("POST", agent.url, b"{", headers=HEADERS)
    assert reply.json()["error"]["code"] == -32700
    assert [(one.outcome, one.queue_id) for one in agent.refused] == [("unreadable", "q-1")]


OK = {"message": {"messageId": "m", "parts": []}}


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ([], -32600),
        ({"method": "message/send", "params": OK}, -32600),
        ({"jsonrpc": "2.0", "params": OK}, -32600),
        ({"jsonrpc": "2.0", "method": "message/sent", "params": OK}, -32601),
        ({"jsonrpc": "2.0", "method": "message/send"}, -32602),
        ({"jsonrpc": "2.0", "method": "message/send", "params": {}}, -32602),
        ({"jsonrpc": "2.0", "method": "message/send", "params": {"message": {"parts": []}}}, -32602),
        ({"jsonrpc": "2.0", "method": "message/send", "params": {"message": {"messageId": "m"}}}, -32602),
        ({"jsonrpc": "2.0", "method": "tasks/get", "params": {}}, -32602),
    ],
)
def test_a_request_is_read_strictly(request_: Any, code: int) -> None:
    """Official servers refuse what leaves out jsonrpc or messageId; Bide is to supply them."""
    with pytest.raises(CallError) as caught:
        read(json.dumps(request_).encode())
    assert caught.value.code == code


def test_every_verb_has_a_method_in_each_dialect() -> None:
    assert set(WITH_SUBSCRIBE.values()) == {(dialect, verb) for dialect in Dialect for verb in Verb}
    assert {verb for _, verb in WITH_SUBSCRIBE.values()} - {verb for _, verb in METHODS.values()} == {Verb.SUBSCRIBE}


def test_parts_of_every_make_are_read() -> None:
    parts = [{"kind": "text", "text": "a"}, {"type": "text", "text": "b"}, {"text": "c"}, {"data": {}}, None]
    params = {"message": {"message_id": "m", "context_id": "c", "parts": parts}}
    found = read(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": params}).encode())
    assert (found.text, found.message_id, found.context_id, found.at_once) == ("a\nb\nc", "m", "c", False)
