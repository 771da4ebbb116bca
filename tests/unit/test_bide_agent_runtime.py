"""A handler behind the runtime: what its callers read, and what becomes of a message that comes again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bide_agent import Answer, Checkpoint, Failed, Host, Message, Session, hosted
from bide_agent.client import Reply, request
from bide_agent.runtime import parts
from bide_agent.runtime.folders import Folders
from bide_agent.runtime.store import Store
from tests.unit.runtime_kit import (
    TICK,
    URI,
    Steps,
    alone,
    ask,
    behind,
    direct,
    events,
    fake_bide,
    send,
    task_of,
    text_in,
    text_of,
)  # fmt: skip

ROOT = Path(__file__).parents[2]


async def echo(message: Message, session: Session) -> str:
    return f"{message.text} in {session.id}"


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - before == {asyncio.current_task()}


@pytest.mark.parametrize(("method", "state"), [("message/send", "completed"), ("SendMessage", "TASK_STATE_COMPLETED")])
async def test_a_handler_answers_callers_of_both_versions(tmp_path: Path, method: str, state: str) -> None:
    async with alone(echo, tmp_path) as host:
        result = task_of(await send(host, method=method, context_id="c-1"))
        task = result if method == "message/send" else result["task"]
        assert (task["status"]["state"], task["contextId"], text_in(task)) == (state, "c-1", "hello in c-1")
        shown = (await ask(host, "tasks/get" if method == "message/send" else "GetTask", task["id"]))["result"]
        assert shown == task


async def test_the_same_message_delivered_three_times_runs_once_and_answers_three_times(tmp_path: Path) -> None:
    """A-Q-19: a redelivery joins the turn that still runs; one that comes later, or to another process, its answer."""
    steps = Steps()

    async def handle(message: Message, _: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return f"run {steps.runs}: {message.text}"

    async with alone(handle, tmp_path) as host:
        first = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        second = asyncio.create_task(send(host, queue_id="q-1", x_bide_session="q-1:2"))
        await host.until(lambda: len(host._work.turns.running[0].session_ids) == 2)
        steps.go_on.set()
        replies = [await first, await second, await send(host, queue_id="q-1", method="message/send")]
        assert (await send(host, queue_id="q-2")).status == 200
    async with alone(handle, tmp_path) as host:
        replies.append(await send(host, queue_id="q-1"))
        shown = (await ask(host, "tasks/get", task_of(replies[0])["id"]))["result"]
    print(f"delivered {len(replies)} times, ran once: {[text_of(reply) for reply in replies]}")
    assert {reply.body for reply in replies} == {replies[0].body}
    assert text_of(replies[0]) == "run 1: hello"
    assert shown == task_of(replies[0])
    assert (steps.runs, steps.active_max) == (2, 1)


async def test_a_stream_of_a_message_that_has_its_answer_is_that_answer(tmp_path: Path) -> None:
    async with alone(echo, tmp_path) as host:
        whole = await send(host, queue_id="q-1")
        for method, wrapped in (("message/stream", ""), ("SendStreamingMessage", "task")):
            said = events(await send(host, queue_id="q-1", method=method))
            task = said[0][wrapped] if wrapped else said[0]
            assert text_in(task) == text_of(whole)
            assert len(said) == 2, "and how it ended"


async def test_a_busy_agent_says_so_and_a_redelivery_of_what_runs_is_not_refused(tmp_path: Path) -> None:
    """A-A-06: a second message is no hint to the turn that runs, and gets no answer that is none."""
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return "done"

    async with alone(handle, tmp_path, retry_after_s=7) as host:
        first = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        refused = await send(host, queue_id="q-2")
        assert (refused.status, refused.headers["retry-after"]) == (503, "7")
        error = refused.json()["error"]
        assert (error["code"], error["data"]) == (-32603, {"code": "busy"})
        again = asyncio.create_task(send(host, queue_id="q-1"))
        await host.until(lambda: host._work.turns.running[0].followers == 2)
        steps.go_on.set()
        assert (await first).body == (await again).body
        assert text_of(await send(host, queue_id="q-2")) == "done", "a busy answer is not kept"
    assert steps.runs == 2


def is_said(answer: Any) -> Callable[[], Any]:
    return lambda: answer


def has_failed() -> None:
    raise Failed("said so", {"data": {1}})


NO_ANSWERS: dict[str, Callable[[], Any]] = {
    "set": is_said({"data": {1, 2}}),
    "nan": is_said([{"data": {"x": float("nan")}}]),
    "number": is_said({"text": 5}),
    "metadata": lambda: Answer("x", metadata={"at": object()}),
    "partial": has_failed,
}


@pytest.mark.parametrize("what", NO_ANSWERS)
async def test_an_answer_that_is_no_json_is_the_agents_error_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    async def handle(_message: Message, _session: Session) -> Any:
        return NO_ANSWERS[what]()

    async with alone(handle, tmp_path) as host:
        reply = await send(host, queue_id="q-1")
        if what == "partial":
            assert task_of(reply)["status"]["state"] == "failed"
        else:
            assert reply.json()["error"]["message"] == "The agent failed: TypeError."
        assert (host.active, host._work._tasks) == (0, {})


async def test_an_empty_name_of_a_message_is_none(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
        return message.text

    async with alone(handle, tmp_path, max_concurrent=2) as host:
        both = [asyncio.create_task(send(host, text, x_queue_id="")) for text in ("one", "two")]
        await host.until(lambda: host.active == 2)
        steps.go_on.set()
        assert [text_of(await one) for one in both] == ["one", "two"]


@pytest.mark.parametrize("end", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()])
async def test_a_handler_that_would_end_its_process_ends_its_turn(tmp_path: Path, end: BaseException) -> None:
    """A library that calls `sys.exit` took the agent along, with all that it had in hand."""

    async def handle(message: Message, _session: Session) -> str:
        if message.text == "end":
            raise end
        return message.text

    async with alone(handle, tmp_path) as host:
        error = (await send(host, "end", queue_id="q-1")).json()["error"]
        assert (error["code"], error["message"].split(":")[0]) == (-32603, "The agent failed")
        assert text_of(await send(host, "next", queue_id="q-2")) == "next"


async def test_what_failed_runs_again(tmp_path: Path) -> None:
    """A-A-04: one bad message is logged and answered, and the next one finds the agent as it was."""
    runs = 0

    async def handle(_message: Message, _session: Session) -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("a prompt perhaps")
        if runs == 2:
            raise Failed("There is no such file.", "looked everywhere")
        return "found"

    async with alone(handle, tmp_path) as host:
        error = (await send(host, queue_id="q-1")).json()["error"]
        assert (error["code"], error["message"]) == (-32603, "The agent failed: ValueError.")
        failed = task_of(await send(host, queue_id="q-1"))
        assert (failed["status"]["state"], text_in(failed)) == ("failed", "looked everywhere")
        assert failed["status"]["message"]["parts"] == [{"kind": "text", "text": "There is no such file."}]
        assert text_of(await send(host, queue_id="q-1")) == "found"
        assert text_of(await send(host, queue_id="q-1")) == "found"
        assert host.active == 0
    assert runs == 3


async def test_a_checkpoint_reaches_a_handler_between_two_tool_calls_and_its_partial_work_is_in_the_answer(
    tmp_path: Path,
) -> None:
    steps = Steps()
    seen: list[Any] = []

    async def handle(_message: Message, session: Session) -> str:
        notes = []
        async with steps.turn():
            for tool in ("read", "write", "test"):
                notes.append(tool)
                if tool == "write":
                    steps.began.set()
                    await steps.go_on.wait()
                try:
                    await session.checkpoint(", ".join(notes))
                except Checkpoint as checkpoint:
                    seen.append(checkpoint.asked)
                    raise
        return "all of it"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await host.until(lambda: host.active == 1)
        await steps.began.wait()
        assert await direct(host, "checkpoint", "ceiling", deadline="2126-11-29T12:00:00Z") == (200, "asked")
        steps.go_on.set()
        reply = await sent
        again = await send(host, queue_id="q-1")
    print(f"asked for {seen[0].reason}, {seen[0].left_s:.0f} s left; answered {text_of(reply)!r}")
    assert (text_of(reply), task_of(reply)["status"]["state"]) == ("read, write", "completed")
    assert task_of(reply)["metadata"] == {URI: {"checkpointed": True, "reason": "ceiling"}}
    assert seen[0].left_s > 3600
    assert again.body == reply.body, "a partial answer is the last word on its message"


async def test_a_turn_that_made_room_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    """A preempted answer is not kept; also another process of the agent's finds what was saved."""
    steps = Steps()

    async def handle(_message: Message, session: Session) -> str:
        done = session.saved or []
        async with steps.turn():
            for tool in ("read", "write", "test")[len(done) :]:
                done.append(tool)
                session.save(done)
                if tool == "write":
                    await session.until_asked()
                await session.checkpoint()
        return f"{', '.join(done)} in {steps.runs} runs, delivery {session.delivery}"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1", x_bide_delivery="1"))
        await steps.began.wait()
        assert await direct(host, "checkpoint", "critical_waiting") == (200, "asked")
        assert (await sent).json()["error"]["data"] == {"code": "preempted"}
    async with alone(handle, tmp_path) as host:
        reply = await send(host, queue_id="q-1", x_bide_delivery="2")
        assert text_of(reply) == "read, write, test in 2 runs, delivery 2"
        assert host._work.store.saved("q-1") is None, "what has its answer needs no state"


@pytest.mark.parametrize("is_answered", [True, False])
async def test_an_edited_schedule_does_not_make_a_fire_run_twice(tmp_path: Path, *, is_answered: bool) -> None:
    """A redelivered tick has the newest prompt: what has its answer has had its turn, what made room runs with it."""

    async def handle(message: Message, session: Session) -> str:
        said = f"{message.text} at rev {message.tick['rev'] if message.tick else None}, saved {session.saved}"
        session.save(message.text)
        if not is_answered and session.delivery == 1:
            await session.until_asked()
            await session.checkpoint()
        return said

    async def deliver(host: Host, prompt: str, rev: int) -> Reply:
        return await send(host, prompt, queue_id="q-1", x_bide_delivery=str(rev), metadata={URI: {**TICK, "rev": rev}})

    async with alone(handle, tmp_path) as host:
        first = asyncio.create_task(deliver(host, "old prompt", 1))
        if not is_answered:
            await host.until(lambda: host.active == 1)
            await direct(host, "checkpoint", "critical_waiting")
        first_reply, again = await first, await deliver(host, "new prompt", 2)
    if is_answered:
        assert text_of(first_reply) == "old prompt at rev 1, saved None"
        assert again.body == first_reply.body
    else:
        assert first_reply.json()["error"]["data"] == {"code": "preempted"}
        assert text_of(again) == "new prompt at rev 2, saved old prompt"


async def test_a_near_ceiling_is_told_and_ends_nothing(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(_message: Message, session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            await session.checkpoint("half")
            assert session.asked
            return f"all, although {session.asked.reason}"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        assert await direct(host, "checkpoint", "ceiling_near") == (200, "noted")
        steps.go_on.set()
        assert text_of(await sent) == "all, although ceiling_near"


async def test_before_a_restart_all_that_runs_is_saved(tmp_path: Path) -> None:
    """A-L-19: its session names no delivery, and the runtime took it for somebody else's."""

    async def handle(message: Message, session: Session) -> str:
        await session.until_asked()
        await session.checkpoint(f"half of {message.text}")
        return "never"

    async with alone(handle, tmp_path, max_concurrent=2) as host:
        sent = [asyncio.create_task(send(host, name, queue_id=name, x_bide_session=f"{name}:1")) for name in "ab"]
        await host.until(lambda: host.active == 2)
        assert await direct(host, "checkpoint", "restart", session_id="restart:w1:3:8") == (200, "asked")
        assert [text_of(await one) for one in sent] == ["half of a", "half of b"]


async def test_what_must_end_outranks_what_was_asked_as_a_favour(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(_message: Message, session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            await session.checkpoint("half")
            return "all"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        for reason in ("critical_waiting", "ceiling", "tick_waiting"):
            await direct(host, "checkpoint", reason)
        steps.go_on.set()
        assert task_of(await sent)["metadata"][URI] == {"checkpointed": True, "reason": "ceiling"}


async def test_a_stop_cancels_the_handler_which_may_tidy_up(tmp_path: Path) -> None:
    steps, tidied = Steps(), []

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            try:
                await steps.go_on.wait()
            finally:
                await asyncio.sleep(0)
                tidied.append(True)
        return "never"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        assert await direct(host, "stop") == (200, "stopping")
        assert task_of(await sent)["status"]["state"] == "canceled"
        assert (host.active, tidied) == (0, [True])
        assert await direct(host, "stop", "again") == (409, None)
        steps.go_on.set()
        assert text_of(await send(host, queue_id="q-1")) == "never", "a canceled answer is not kept"


async def test_a_handler_that_swallows_its_cancelation_is_told_again_and_loses_what_it_started(tmp_path: Path) -> None:
    steps, stopped = Steps(), []

    async def handle(_message: Message, session: Session) -> str:
        session.stop_with(lambda: stopped.append(True))
        async with steps.turn():
            try:
                await steps.go_on.wait()
            except asyncio.CancelledError:
                await steps.go_on.wait()
        return "never"

    async with alone(handle, tmp_path, stop_grace_s=0.05) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        await direct(host, "stop")
        assert task_of(await sent)["status"]["state"] == "canceled"
        assert stopped == [True]


async def test_a_real_answer_after_a_stop_is_an_answer(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            try:
                await steps.go_on.wait()
            except asyncio.CancelledError:
                return "just in time"
        return "never"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        await direct(host, "stop")
        assert text_of(await sent) == "just in time"


async def test_a_caller_that_hangs_up_ends_no_turn_and_the_next_delivery_finds_it(tmp_path: Path) -> None:
    """A-A-05, A-P-05: nothing is done before its answer is out.

    The owner of a delivery died; its message comes again under another session's id.
    """
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return "done"

    async with alone(handle, tmp_path) as host:
        lost = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        turn = host._work.turns.running[0]
        await host.until(lambda: turn.is_orphan)
        assert host._work.turns.of_session("foreign:w1:1:1") == [turn]
        again = asyncio.create_task(send(host, queue_id="q-1", x_bide_session="q-1:2"))
        await host.until(lambda: "q-1:2" in turn.session_ids)
        steps.go_on.set()
        assert text_of(await again) == "done"
    assert steps.runs == 1


@pytest.mark.parametrize("method", ["message/stream", "SendStreamingMessage"])
async def test_chunks_are_told_as_they_come(tmp_path: Path, method: str) -> None:
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> AsyncIterator[str]:
        yield "one "
        steps.began.set()
        await steps.go_on.wait()
        yield "two "
        yield "three"

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, method=method, queue_id="q-1"))
        await steps.began.wait()
        turn = host._work.turns.running[0]
        joined = asyncio.create_task(ask_stream(host, turn.task_id, method))
        await host.until(lambda: turn.followers == 2)
        steps.go_on.set()
        said, rest = events(await sent), await joined
        whole = await send(host, queue_id="q-1")
    is_03 = method == "message/stream"
    updates = [one if is_03 else one.get("artifactUpdate", {}) for one in said]
    texts = [one["artifact"]["parts"][0]["text"] for one in updates if "artifact" in one]
    assert "".join(texts) == text_of(whole) == "one two three"
    assert [one["append"] for one in updates if "artifact" in one] == [False, True, True]
    last = said[-1] if is_03 else said[-1]["statusUpdate"]
    assert last["status"]["state"] == ("completed" if is_03 else "TASK_STATE_COMPLETED")
    assert last.get("final") is (True if is_03 else None)
    assert text_in(rest[0] if is_03 else rest[0]["task"]) == "one ", "who joins later is told what has been said"


async def ask_stream(host: Host, task_id: str, method: str) -> list[dict[str, Any]]:
    name = "tasks/resubscribe" if method == "message/stream" else "SubscribeToTask"
    body = {"jsonrpc": "2.0", "id": 1, "method": name, "params": {"id": task_id}}
    return events(await request("POST", host.url, json.dumps(body).encode(), timeout_s=60))


async def test_a_stream_that_gives_its_message_back_says_so_in_its_last_event(tmp_path: Path) -> None:
    async def handle(_message: Message, session: Session) -> AsyncIterator[str]:
        yield "half"
        await session.until_asked()
        await session.checkpoint()

    async with alone(handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1", method="message/stream"))
        await host.until(lambda: host.active == 1)
        await direct(host, "checkpoint", "critical_waiting")
        last = events(await sent)[-1]
    assert last["status"]["state"] == "canceled"
    assert last["metadata"] == {URI: {"preempted": True, "reason": "critical_waiting"}}


async def test_a_caller_who_does_not_wait_is_answered_at_once_and_may_ask_and_cancel(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return "done"

    async with alone(handle, tmp_path) as host:
        task = task_of(await send(host, params={"configuration": {"blocking": False}}))
        assert task["status"]["state"] == "working"
        canceled = (await ask(host, "tasks/cancel", task["id"]))["result"]
        assert canceled["status"]["state"] == "canceled"
        assert (await ask(host, "tasks/cancel", task["id"]))["error"]["code"] == -32002
        assert (await ask(host, "tasks/get", "unknown"))["error"]["code"] == -32001
        assert (await ask(host, "tasks/list", "any"))["error"]["code"] == -32601


async def test_a_turn_that_is_only_asked_for_hears_what_its_new_session_is_told(tmp_path: Path) -> None:
    """The replica that followed its Task died; the next one delivers nothing, it asks for the Task."""
    steps = Steps()

    async def handle(_message: Message, session: Session) -> str:
        async with steps.turn():
            await session.until_asked()
            await session.checkpoint("half")
        return "whole"

    async with alone(handle, tmp_path) as host:
        task_id = task_of(await send(host, queue_id="q-1", params={"configuration": {"blocking": False}}))["id"]
        assert await direct(host, "checkpoint", id="early", session_id="q-1:2") == (409, None)
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"id": task_id}}).encode()
        for queue_id, session_id in (("q-2", "q-2:1"), ("q-1", "q-1:2")):
            headers = {"x-queue-id": queue_id, "x-bide-session": session_id}
            assert (await request("POST", host.url, body, headers=headers)).json()["result"]["id"] == task_id
        assert await direct(host, "checkpoint", id="a stranger's", session_id="q-2:1") == (409, None)
        assert await direct(host, "checkpoint", session_id="q-1:2") == (200, "asked")
        assert text_of(await send(host, queue_id="q-1")) == "half"
    assert steps.runs == 1


async def test_a_question_back_is_a_state_of_the_answer(tmp_path: Path) -> None:
    async def handle(_message: Message, _session: Session) -> Answer:
        return Answer(["Which ", {"text": "one?"}], "input-required")

    async with alone(handle, tmp_path) as host:
        task = task_of(await send(host, method="SendMessage"))["task"]
    assert (task["status"]["state"], text_in(task)) == ("TASK_STATE_INPUT_REQUIRED", "Which one?")
    with pytest.raises(ValueError, match="input-required"):
        Answer("x", "tired")


async def test_a_new_context_is_a_new_session(tmp_path: Path) -> None:
    async def handle(message: Message, session: Session) -> str:
        found = session.folder / "notes"
        before = found.read_text() if found.exists() else ""
        found.write_text(message.text)
        return f"{before}|{session.saved}|{message.tick}"

    async with alone(handle, tmp_path) as host:
        texts = [
            text_of(await send(host, text, queue_id=f"q-{text}", context_id=context))
            for text, context in (("a", "c-1"), ("b", "c-1"), ("c", "c-2"))
        ]
    assert texts == ["|None|None", "a|None|None", "|None|None"]


async def test_parts_of_every_kind_pass_in_both_versions(tmp_path: Path) -> None:
    heard: list[Any] = []

    async def handle(message: Message, _session: Session) -> Any:
        heard.extend(message.parts)
        return [*message.parts, "and text"]

    given = {
        "message/send": [
            {"kind": "data", "data": {"a": 1}},
            {"kind": "file", "file": {"uri": "http://x/y", "mimeType": "text/plain", "name": "y"}},
            {"kind": "file", "file": {"bytes": "eA=="}},
        ],
        "SendMessage": [
            {"data": {"a": 1}}, {"url": "http://x/y", "mediaType": "text/plain", "filename": "y"}, {"raw": "eA=="},
        ],
    }  # fmt: skip
    async with alone(handle, tmp_path) as host:
        for method, sent in given.items():
            message = {"role": "user", "messageId": "m", "parts": sent}
            result = task_of(await send(host, method=method, params={"message": message}))
            said = result.get("task", result)["artifacts"][0]["parts"]
            assert said[:3] == sent
    assert heard[:3] == heard[3:] == given["SendMessage"]
    with pytest.raises(TypeError, match="bytes"):
        parts.made(b"x")


async def test_an_agent_that_ends_gives_back_what_it_has_not_finished(tmp_path: Path) -> None:
    """A-Q-18: the message is not lost, and costs no attempt."""
    steps = Steps()

    async def polite(_message: Message, session: Session) -> str:
        session.save("half")
        steps.began.set()
        await session.until_asked()
        await session.checkpoint()
        return "never"

    async def deaf(_message: Message, _session: Session) -> str:
        steps.began.set()
        await steps.go_on.wait()
        return "never"

    for handle, grace_s in ((polite, 5.0), (deaf, 0.0)):
        steps.began.clear()
        async with alone(handle, tmp_path, grace_s=grace_s) as host:
            sent = asyncio.create_task(send(host, queue_id="q-1"))
            await steps.began.wait()
        assert (await sent).json()["error"]["data"] == {"code": "preempted"}
    with Store(tmp_path / "w1/items.sqlite") as store:
        assert store.saved("q-1") == "half"


async def test_what_outlives_its_cancelation_is_given_back_when_the_agent_ends(tmp_path: Path) -> None:
    """Its caller read a 500 of the server's: a failed attempt, one of five."""
    release = asyncio.Event()

    async def handle(_message: Message, _session: Session) -> str:
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        return "too late"

    async with alone(handle, tmp_path, stop_grace_s=0.1) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await host.until(lambda: host.active == 1)
    assert (await sent).json()["error"]["data"] == {"code": "preempted"}
    release.set()


DEAF = """
import asyncio, sys, time
from pathlib import Path
from bide_agent import serve
from bide_agent.runtime import host

async def handle(message, session):
    print("begun", flush=True)
    if message.text == "thread":
        await asyncio.to_thread(time.sleep, 600)
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

host.LEAVE_S = 0.3
serve(handle, workspace="w1", state_dir=Path(sys.argv[1]), grace_s=0.1, stop_grace_s=0.1)
"""


@pytest.mark.parametrize("text", ["thread", "coroutine"])
async def test_sigterm_ends_the_process_whatever_its_handler_does(tmp_path: Path, text: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEAF, str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = json.loads(await process.stdout.readline())["url"]
        message = {"role": "user", "messageId": "m-1", "parts": [{"kind": "text", "text": text}]}
        body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
        sent = asyncio.create_task(request("POST", url, json.dumps(body).encode(), timeout_s=30))
        assert await process.stdout.readline() == b"begun\n"
        process.terminate()
        assert (await sent).json()["error"]["data"] == {"code": "preempted"}
        async with asyncio.timeout(20):
            assert await process.wait() == 1
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_an_agent_lets_nobody_in_before_it_knows_bide_and_then_bide_alone(tmp_path: Path) -> None:
    async with fake_bide(broken=[500] * 5) as bide:
        given = {"workspace": "w1", "bide": bide.url, "token": "enrol", "state_dir": tmp_path}
        async with hosted(echo, **given) as host:
            early = await send(host)
            assert (early.status, early.json()["error"]["data"]) == (503, {"code": "busy"})
            await host.until(lambda: host.registered)
            assert (await send(host, authorization="Bearer guessed")).status == 401
            assert (await send(host)).status == 200
            assert (await direct(host, "stop"))[0] == 409


async def test_a_bide_without_a_secret_is_let_in_too(tmp_path: Path) -> None:
    """It was refused as unknown for ever, and told that the agent is busy."""
    async with fake_bide(delivery=None) as bide, behind(bide, echo, tmp_path) as host:
        assert (await send(host, authorization="")).status == 200


async def test_folders_beyond_a_number_are_removed_but_never_one_in_use(tmp_path: Path) -> None:
    folders = Folders(tmp_path, lambda: ["c-0"], kept=2)
    made = []
    for number in range(4):
        made.append(folders.of(f"c-{number}"))
        os.utime(made[-1], (number, number))
    assert [folder.exists() for folder in made] == [True, False, True, True]


async def test_registration_declares_all_and_beats_tell_all(tmp_path: Path) -> None:
    """A-A-07, A-A-08, A-A-09."""
    steps = Steps()

    async def handle(_message: Message, session: Session) -> str:
        async with steps.turn():
            session.progress(5)
            await steps.go_on.wait()
            return "done"

    async with fake_bide() as bide, behind(bide, handle, tmp_path, max_concurrent=2) as host:
        asked = bide.registrations[0].body
        card = asked.pop("agent_card")
        assert asked == {
            "id": "w1", "url": host.url, "boot_id": host.boot_id, "max_concurrent_tasks": 2,
            "heartbeat_interval_s": 600.0, "capabilities": ["control", "refuses_when_busy"],
        }  # fmt: skip
        assert (card["url"], card["capabilities"]["streaming"]) == (host.url, True)
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        with host.working():
            host.beat_now()
            await host.until(lambda: host.beats == 2)
        await host.until(lambda: host.beats == 3)
        steps.go_on.set()
        await sent
        await host.until(lambda: host.beats == 4)
        assert [beat.body["active_tasks"] for beat in bide.beats] == [0, 2, 1, 0]
        assert {beat.token for beat in bide.beats} == {"own-1"}
        assert len({tuple(beat.body) for beat in bide.beats}) == 1
        assert bide.beats[-1].body["progress"] >= 5


async def test_tasks_whose_answers_are_kept_on_disk_are_not_kept_in_memory_too(tmp_path: Path) -> None:
    async with alone(echo, tmp_path) as host:
        task = task_of(await send(host, queue_id="q-1"))
        other = task_of(await send(host))
        assert (list(host._work._tasks), list(host._work._past)) == ([], [other["id"]])
        for one in (task, other):
            assert (await ask(host, "tasks/get", one["id"]))["result"] == one
