"""What a directive does to the turn of its session, and what the caller of that turn reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest

from bide_agent import Agent, Options, running
from bide_agent.behaviour import WORDS
from bide_agent.client import Reply, request
from bide_agent.decide import Result, decide, gives_back
from bide_agent.directives import ACKNOWLEDGED_MAX, REMEMBERED, Directives
from bide_agent.state import State
from tests.integration.calendar_kit import free

URI = "urn:bide:queue:1"
SESSION = "q-1:1"
FOREIGN = "foreign:w1:1:1"
REASONS = ("ceiling_near", "tick_waiting", "critical_waiting", "ceiling", "operator", "restart")


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    behaviour = {"save_s": 0}
    async with running(Options(workspace="w1", work_s=600, max_concurrent=2, grace_s=0, behaviour=behaviour)) as one:
        yield one


async def call(agent: Agent, method: str, params: Any, session_id: str = SESSION) -> Reply:
    body = json.dumps({"jsonrpc": "2.0", "id": "r-1", "method": method, "params": params}).encode()
    return await request("POST", agent.url, body, headers={"x-bide-session": session_id})


async def send(agent: Agent, method: str = "message/send", session_id: str = SESSION, **more: Any) -> Reply:
    message = {"role": "user", "messageId": "m-1", "parts": [{"text": "hello"}]}
    return await call(agent, method, {"message": message, **more}, session_id)


@asynccontextmanager
async def sending(
    agent: Agent, method: str = "message/send", session_id: str = SESSION
) -> AsyncIterator[asyncio.Task[Reply]]:
    """A message whose turn has begun. What is still open at the end of the block is given up."""
    sent = asyncio.create_task(send(agent, method, session_id))
    await agent.until(lambda: session_id in agent.sessions)
    yield sent
    sent.cancel()
    await asyncio.gather(sent, return_exceptions=True)


async def direct(
    agent: Agent, kind: str, reason: str = "ceiling", *, session_id: str = SESSION, directive_id: str | None = None
) -> tuple[int, str | None]:
    """Give a directive over HTTP; return the status, and the word for it."""
    given = {"id": directive_id or f"{kind}-{reason}", "kind": kind, "reason": reason, "session_id": session_id}
    reply = await request("POST", f"{agent.url}/control/{kind}", json.dumps(given).encode())
    return reply.status, reply.json().get("result")


def events(reply: Reply) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: "))["result"] for line in reply.body.decode().split("\n\n") if line]


@pytest.mark.parametrize(
    ("reason", "obey", "ceiling_only"),
    [
        ("ceiling_near", "noted", "noted"),
        ("tick_waiting", "saving", "noted"),
        ("critical_waiting", "saving", "noted"),
        ("ceiling", "saving", "saving"),
        ("operator", "saving", "saving"),
        ("restart", "saving", "saving"),
        ("full_moon", "noted", "noted"),
        (None, "noted", "noted"),
    ],
)
def test_the_reason_of_a_checkpoint_decides_whether_work_ends_for_it(
    reason: str | None, obey: str, ceiling_only: str
) -> None:
    def word(checkpoint: str, *, hears: bool = True) -> str:
        return decide("checkpoint", reason, checkpoint=checkpoint, stop="obey", runs=True, hears=hears).value

    assert (word("obey"), word("ceiling_only"), word("ignore")) == (obey, ceiling_only, "ignored")
    assert word("obey", hears=False) == "ignored"


@pytest.mark.parametrize(
    ("stop", "hears", "word"),
    [("obey", True, "stopping"), ("obey", False, "ignored"), ("ignore", True, "ignored"), ("ignore", False, "ignored")],
)
@pytest.mark.parametrize("reason", [*REASONS, None])
def test_a_stop_needs_no_reason(stop: str, word: str, reason: str | None, *, hears: bool) -> None:
    assert decide("stop", reason, checkpoint="ignore", stop=stop, runs=True, hears=hears).value == word


def test_where_nothing_runs_every_directive_is_told_that_it_ended() -> None:
    for kind, checkpoint, stop in product(("checkpoint", "stop", "dance", None), WORDS["checkpoint"], WORDS["stop"]):
        assert decide(kind, "ceiling", checkpoint=checkpoint, stop=stop, runs=False, hears=False) is Result.ENDED


@pytest.mark.parametrize("kind", ["dance", None])
def test_a_kind_that_is_not_known_yet_is_noted(kind: str | None) -> None:
    assert decide(kind, "ceiling", checkpoint="obey", stop="obey", runs=True, hears=True) is Result.NOTED


def test_only_a_waiting_critical_message_makes_work_be_given_back() -> None:
    assert [reason for reason in REASONS if gives_back(reason)] == ["critical_waiting"]


async def test_a_checkpoint_ends_the_turn_with_a_partial_answer(agent: Agent) -> None:
    async with sending(agent) as sent:
        assert await direct(agent, "checkpoint") == (200, "saving")
        said = (await sent).json()["result"]
    assert (said["kind"], said["parts"]) == ("message", [{"kind": "text", "text": "hello"}])
    assert said["metadata"][URI] == {"queue_id": None, "delivery": None, "checkpointed": True, "reason": "ceiling"}
    assert (agent.received[0].outcome, agent.active, agent.sessions) == ("checkpointed", 0, [])


@pytest.mark.parametrize("method", ["message/send", "SendMessage"])
async def test_a_task_that_is_saved_is_completed(agent: Agent, method: str) -> None:
    agent.behave(answer="task")
    async with sending(agent, method) as sent:
        await direct(agent, "checkpoint", "tick_waiting")
        said = (await sent).json()["result"]
    said = said.get("task", said)
    assert said["status"]["state"] in {"completed", "TASK_STATE_COMPLETED"}
    assert said["metadata"][URI]["checkpointed"] is True
    assert said["artifacts"]


async def test_a_stream_that_is_saved_ends_as_streams_do(agent: Agent) -> None:
    async with sending(agent, "message/stream") as sent:
        await direct(agent, "checkpoint", "operator")
        _, artifact, last = events(await sent)
    assert artifact["kind"] == "artifact-update"
    assert (last["status"]["state"], last["metadata"][URI]["reason"]) == ("completed", "operator")


@pytest.mark.parametrize("method", ["message/send", "SendMessage"])
@pytest.mark.parametrize("answer", ["message", "task"])
async def test_work_is_given_back_for_a_critical_message(agent: Agent, method: str, answer: str) -> None:
    agent.behave(answer=answer)
    async with sending(agent, method) as sent:
        assert await direct(agent, "checkpoint", "critical_waiting") == (200, "saving")
        error = (await sent).json()["error"]
    assert (error["code"], error["data"]) == (-32603, {"code": "preempted"})
    assert agent.received[0].outcome == "preempted"


async def test_a_stream_that_is_given_back_says_so_in_its_last_event(agent: Agent) -> None:
    """Its Task was told of, so that it has to end; Bide knows both by the mark."""
    async with sending(agent, "message/stream") as sent:
        await direct(agent, "checkpoint", "critical_waiting")
        _, last = events(await sent)
    assert (last["status"]["state"], last["final"]) == ("canceled", True)
    assert last["metadata"][URI] == {
        "queue_id": None, "delivery": None, "preempted": True, "reason": "critical_waiting",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "reason", "state", "mark"),
    [
        ("checkpoint", "ceiling", "completed", "checkpointed"),
        ("checkpoint", "critical_waiting", "canceled", "preempted"),
        ("stop", "ceiling", "canceled", None),
    ],
)
async def test_a_task_that_is_followed_ends_as_its_turn_does(
    agent: Agent, kind: str, reason: str, state: str, mark: str | None
) -> None:
    task = (await send(agent, configuration={"blocking": False})).json()["result"]
    assert (task["status"]["state"], agent.sessions) == ("working", [SESSION])
    await direct(agent, kind, reason)
    await agent.until(lambda: agent.active == 0)
    last = (await call(agent, "tasks/get", {"id": task["id"]})).json()["result"]
    assert last["status"]["state"] == state
    assert {"checkpointed", "preempted"} & last["metadata"][URI].keys() == ({mark} if mark else set())


async def test_a_turn_that_is_done_before_it_is_saved_answers_as_ever(agent: Agent) -> None:
    agent.behave(save_s=600, work_s=1)
    async with sending(agent) as sent:
        assert await direct(agent, "checkpoint") == (200, "saving")
        said = (await sent).json()["result"]
    assert "checkpointed" not in said["metadata"][URI]
    assert agent.received[0].outcome == "answered"


async def test_the_first_checkpoint_that_a_turn_obeys_decides_how_it_ends(agent: Agent) -> None:
    agent.behave(save_s=0.1)
    async with sending(agent) as sent:
        assert await direct(agent, "checkpoint", "tick_waiting") == (200, "saving")
        assert await direct(agent, "checkpoint", "critical_waiting") == (200, "saving")
        assert (await sent).json()["result"]["metadata"][URI]["reason"] == "tick_waiting"


async def test_a_stop_outruns_a_save(agent: Agent) -> None:
    agent.behave(save_s=600)
    async with sending(agent) as sent:
        await direct(agent, "checkpoint")
        assert await direct(agent, "stop") == (200, "stopping")
        assert (await sent).json()["result"]["status"]["state"] == "canceled"


@pytest.mark.parametrize(
    ("behaviour", "kind", "reason", "word"),
    [
        ({}, "checkpoint", "ceiling_near", "noted"),
        ({"checkpoint": "ceiling_only"}, "checkpoint", "tick_waiting", "noted"),
        ({"checkpoint": "ignore"}, "checkpoint", "ceiling", "ignored"),
        ({"stop": "ignore"}, "stop", "ceiling", "ignored"),
    ],
)
async def test_a_turn_whose_agent_does_not_obey_goes_on(
    agent: Agent, behaviour: dict[str, Any], kind: str, reason: str, word: str
) -> None:
    agent.behave(**behaviour, work_s=600)
    async with sending(agent) as sent:
        assert await direct(agent, kind, reason) == (200, word)
        free(agent)
        assert (await sent).json()["result"]["metadata"] == {URI: {"queue_id": None, "delivery": None}}
    assert agent.received[0].outcome == "answered"


@pytest.mark.parametrize("kind", ["checkpoint", "stop"])
async def test_a_turn_that_hangs_hears_nothing(agent: Agent, kind: str) -> None:
    agent.behave(silent=1)
    async with sending(agent) as sent:
        assert await direct(agent, kind) == (200, "ignored")
        assert agent.active == 1
        assert not sent.done()


@pytest.mark.parametrize(("method", "answer"), [("message/send", "message"), ("SendMessage", "task")])
async def test_a_blocking_call_whose_turn_is_stopped_gets_a_canceled_task(
    agent: Agent, method: str, answer: str
) -> None:
    agent.behave(answer=answer, huge=1000)
    async with sending(agent, method) as sent:
        assert await direct(agent, "stop") == (200, "stopping")
        task = (await sent).json()["result"]
    task = task.get("task", task)
    assert task["status"]["state"] in {"canceled", "TASK_STATE_CANCELED"}
    assert "artifacts" not in task
    assert (await call(agent, "GetTask", {"id": task["id"]})).json()["result"]["id"] == task["id"]


async def test_an_agent_that_ignores_stops_does_not_cancel_its_tasks_either(agent: Agent) -> None:
    agent.behave(stop="ignore")
    task = (await send(agent, configuration={"blocking": False})).json()["result"]
    assert (await call(agent, "tasks/cancel", {"id": task["id"]})).json()["error"]["code"] == -32002
    assert agent.sessions == [SESSION]
    agent.behave(stop="obey")
    canceled = (await call(agent, "tasks/cancel", {"id": task["id"]})).json()["result"]
    assert canceled["status"]["state"] == "canceled"


async def test_a_directive_is_about_its_own_session_alone(agent: Agent) -> None:
    async with sending(agent) as first, sending(agent, session_id="q-2:1") as second:
        assert agent.sessions == [SESSION, "q-2:1"]
        await direct(agent, "stop", session_id="q-2:1")
        await second
        assert (agent.sessions, first.done()) == ([SESSION], False)
        assert await direct(agent, "checkpoint", session_id=FOREIGN) == (409, None)


@pytest.mark.parametrize(
    ("behaviour", "kind", "word", "left"),
    [
        ({}, "checkpoint", "saving", 0),
        ({}, "stop", "stopping", 0),
        ({"checkpoint": "ignore"}, "checkpoint", "ignored", 2),
        ({"stop": "ignore"}, "stop", "ignored", 2),
    ],
)
async def test_a_foreign_session_is_the_agents_own_work(
    agent: Agent, behaviour: dict[str, Any], kind: str, word: str, left: int
) -> None:
    agent.behave(**behaviour)
    agent.busy_for(600)
    assert await direct(agent, kind, session_id=FOREIGN) == (200, word)
    await agent.until(lambda: agent.active == left)


async def test_before_a_restart_all_that_runs_is_saved(agent: Agent) -> None:
    """A-L-19: no session is meant, for the whole process ends."""
    agent.behave(save_s=0.01)
    async with sending(agent):
        agent.busy_for(600, 1)
        assert agent.active == 2
        assert await direct(agent, "checkpoint", reason="restart", session_id="restart:w1:3:8") == (200, "saving")
        await agent.until(lambda: agent.active == 0)


async def test_a_save_of_earlier_foreign_work_leaves_later_work_alone(agent: Agent) -> None:
    agent.behave(save_s=0.01)
    agent.busy_for(600)
    await direct(agent, "checkpoint", session_id=FOREIGN)
    earlier = agent._state.turns._foreign[-1]
    agent.busy_for(600)
    await earlier._asked.wait()
    assert agent.active == 2


async def test_an_id_is_acted_on_once(agent: Agent) -> None:
    async with sending(agent):
        assert await direct(agent, "checkpoint", "ceiling_near", directive_id="d") == (200, "noted")
        assert await direct(agent, "checkpoint", "ceiling", directive_id="d") == (200, "noted")
        assert await direct(agent, "stop", directive_id="d") == (200, "noted")
        assert (agent.active, len(agent.directives)) == (1, 1)


async def test_a_directive_before_its_message_is_told_so_and_obeyed_later(agent: Agent) -> None:
    assert await direct(agent, "stop") == (409, None)
    async with sending(agent) as sent:
        assert await direct(agent, "stop") == (200, "stopping")
        await sent
    assert await direct(agent, "stop") == (200, "stopping")
    assert len(agent.directives) == 1


@pytest.mark.parametrize("wrong", [b"{", b"[]", b"{}", b'{"id": 7}', b'{"id": "d", "kind": "checkpoint"}'])
async def test_what_is_no_directive_is_refused(agent: Agent, wrong: bytes) -> None:
    reply = await request("POST", f"{agent.url}/control/stop", wrong)
    assert (reply.status, reply.headers["content-type"]) == (422, "application/problem+json")
    assert not agent.directives


async def test_odd_members_of_a_directive_make_nobody_fall_over(agent: Agent) -> None:
    async with sending(agent):
        odd = {"id": "d", "reason": ["ceiling"], "session_id": SESSION, "deadline": 7}
        reply = await request("POST", f"{agent.url}/control/checkpoint", json.dumps(odd).encode())
        assert (reply.status, reply.json()) == (200, {"result": "noted"})


@pytest.fixture
def state() -> State:
    return State(Options(workspace="w1"), url="http://a")


@pytest.fixture
def directives(state: State) -> Directives:
    return Directives(state)


def test_a_beat_acknowledges_as_many_as_bide_reads_and_the_next_one_the_rest(directives: Directives) -> None:
    for number in range(ACKNOWLEDGED_MAX + 1):
        directives.hear({"id": str(number)})
    first = directives.unsaid()
    directives.said(first)
    assert (len(first), directives.unsaid()) == (ACKNOWLEDGED_MAX, {str(ACKNOWLEDGED_MAX): Result.ENDED})


def test_a_word_that_changed_while_its_beat_was_under_way_is_said_again(directives: Directives, state: State) -> None:
    directives.hear({"id": "d", "kind": "stop", "session_id": "s"})
    under_way = directives.unsaid()
    with state.turns.begin(session_id="s"):
        directives.hear({"id": "d", "kind": "stop", "session_id": "s"})
    directives.said(under_way)
    assert directives.unsaid() == {"d": Result.STOPPING}


def test_the_newest_thousand_are_remembered(directives: Directives) -> None:
    for number in range(REMEMBERED + 5):
        directives.hear({"id": str(number)})
    assert len(directives.heard) == len(directives._results) == len(directives._unsaid) == REMEMBERED
