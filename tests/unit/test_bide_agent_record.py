"""The record of what an agent received, and the agent as a process of its own."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bide_agent import Agent, Options, running
from bide_agent.client import Reply, UnreachableError, request

ROOT = Path(__file__).parents[2]
ODD = b"""{ "jsonrpc":"2.0", "id": 12345678901234567890, "method":"message/send",
  "params": {"message": {"messageId":"m-\\u0000", "parts":[{"kind":"text","text":"\\u0000 \\ud800"}], "n": 1e3}}}"""
HEADERS = {"x-queue-id": "q-1", "x-bide-delivery": "1", "x-bide-session": "q-1/1", "x-bide-hops": "2"}


def body(text: str) -> bytes:
    params = {"message": {"role": "user", "messageId": "m-1", "parts": [{"kind": "text", "text": text}]}}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": params}).encode()


async def send(agent: Agent, text: str, **headers: str) -> Reply:
    return await request("POST", agent.url, body(text), headers=headers)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def overlap_max(events: list[dict[str, Any]]) -> int:
    """The most turns that ran at once, as whoever reads a record computes it."""
    ends = [(one["ended_at"], -1) for one in events if one["event"] == "end"]
    begins = [(one["started_at"], 1) for one in events if one["event"] == "begin"]
    at_once = most = 0
    for _, step in sorted(ends + begins):
        at_once += step
        most = max(most, at_once)
    return most


async def test_a_message_is_recorded_byte_exact_with_what_bide_said_of_it(tmp_path: Path) -> None:
    """A-Q-06: a NUL, a lone surrogate and a 20-digit id are echoed and recorded as they came."""
    path = tmp_path / "record"
    async with running(Options(workspace="w1", work_s=0, record=path)) as agent:
        reply = await request("POST", agent.url, ODD, headers=HEADERS)
    assert reply.json()["id"] == 12345678901234567890
    assert reply.json()["result"]["parts"] == [{"kind": "text", "text": "\0 \ud800"}]
    begin, end = lines(path)
    assert begin["at"]["monotonic"] >= begin["started_at"]
    assert datetime.fromisoformat(begin.pop("at")["wall"]).tzinfo is not None
    assert base64.b64decode(begin.pop("body_b64")) == ODD
    started_at = begin.pop("started_at")
    assert begin == {
        "event": "begin",
        "workspace": "w1",
        "message_id": "m-\0",
        "queue_id": "q-1",
        "delivery": 1,
        "session": "q-1/1",
        "hops": 2,
        "text": "\0 \ud800",
        "body_sha256": hashlib.sha256(ODD).hexdigest(),
        "ended_at": None,
        "active": 1,
        "outcome": None,
    }
    assert (end["event"], end["outcome"], end["active"], end["started_at"]) == ("end", "answered", 0, started_at)
    assert end["ended_at"] >= started_at
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("length", "kept"), [(65_535, True), (65_536, True), (65_537, False)])
async def test_a_body_over_64_kib_is_recorded_by_its_hash(tmp_path: Path, length: int, *, kept: bool) -> None:
    path, sent = tmp_path / "record", body("x" * (length - len(body(""))))
    async with running(Options(workspace="w1", work_s=0, record=path)) as agent:
        await request("POST", agent.url, sent)
    assert (lines(path)[0]["body_b64"] is not None) is kept
    assert lines(path)[0]["body_sha256"] == hashlib.sha256(sent).hexdigest()


async def test_order_and_overlap_can_be_computed(tmp_path: Path) -> None:
    path = tmp_path / "record"
    async with running(Options(workspace="w1", work_s=0.5, max_concurrent=2, record=path)) as agent:
        for pair in ("ab", "cd"):
            await asyncio.gather(*(send(agent, text) for text in pair))
    events = lines(path)
    assert [one["event"] for one in events] == ["begin", "begin", "end", "end"] * 2
    assert overlap_max(events) == 2
    assert max(one["ended_at"] or 0 for one in events[:4]) < min(one["started_at"] for one in events[4:])


async def test_one_after_the_other_never_overlaps(tmp_path: Path) -> None:
    path = tmp_path / "record"
    async with running(Options(workspace="w1", work_s=0, record=path)) as agent:
        for number in range(20):
            await send(agent, str(number))
    assert overlap_max(lines(path)) == 1


async def test_the_same_message_twice_is_recorded_twice(tmp_path: Path) -> None:
    """A-Q-19: duplicates show; deduping them is not this agent's job."""
    path = tmp_path / "record"
    async with running(Options(workspace="w1", work_s=0, record=path)) as agent:
        await send(agent, "a", **{"x-queue-id": "q-1", "x-bide-delivery": "1"})
        await send(agent, "a", **{"x-queue-id": "q-1", "x-bide-delivery": "2"})
        assert [(one.queue_id, one.delivery) for one in agent.received] == [("q-1", 1), ("q-1", 2)]
    assert len(lines(path)) == 4


async def test_a_refused_message_is_recorded_as_refused(tmp_path: Path) -> None:
    path = tmp_path / "record"
    async with running(Options(workspace="w1", record=path, behaviour={"busy_s": 600})) as agent:
        await send(agent, "a")
        assert not agent.received
    assert [(one["event"], one["outcome"], one["started_at"]) for one in lines(path)] == [("refused", "busy", None)]


async def test_a_directive_is_recorded_once_for_each_word_that_it_came_to(tmp_path: Path) -> None:
    path = tmp_path / "record"
    given = {"id": "d-1", "reason": "operator", "session_id": "s-1", "deadline": "2030-01-01T00:00:00Z"}
    async with running(Options(workspace="w1", work_s=600, record=path)) as agent:

        async def stop() -> int:
            return (await request("POST", f"{agent.url}/control/stop", json.dumps(given).encode())).status

        assert [await stop(), await stop()] == [409, 409]
        call = asyncio.create_task(send(agent, "a", **{"x-bide-session": "s-1"}))
        await agent.until(lambda: agent.active == 1)
        assert [await stop(), await stop()] == [200, 200]
        await call
    told = [one for one in lines(path) if one["event"] == "directive"]
    assert [one["result"] for one in told] == ["ended", "stopping"]
    assert told[1].pop("at").keys() == {"monotonic", "wall"}
    assert told[1] == {
        "event": "directive",
        "workspace": "w1",
        "directive": "d-1",
        "kind": "stop",
        "reason": "operator",
        "session_id": "s-1",
        "deadline": "2030-01-01T00:00:00Z",
        "result": "stopping",
    }


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The agent as a process, and its URL."""
    command = [sys.executable, "-W", "error", "-m", "bide_agent", "--workspace", "w1", *arguments]
    pipe = asyncio.subprocess.PIPE
    running_ = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        assert running_.stdout is not None
        told = json.loads(await running_.stdout.readline() or "{}")
        yield running_, told.get("url", "")
    finally:
        if running_.returncode is None:
            running_.kill()
        await running_.communicate()


async def test_sigterm_ends_the_process_cleanly() -> None:
    async with process("--work-s", "600", "--grace-s", "0") as (agent, url):
        calls = {asyncio.create_task(request("POST", url, body(text), timeout_s=30)) for text in "ab"}
        (refused,), (held,) = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result().status == 503
        agent.send_signal(signal.SIGTERM)
        with pytest.raises(UnreachableError):
            await held
        async with asyncio.timeout(10):
            _, errors = await agent.communicate()
        assert (agent.returncode, errors) == (0, b"")


async def test_a_process_that_ignores_sigterm_goes_on_until_sigkill() -> None:
    async with process("--work-s", "0", "--behaviour", "sigterm=ignore") as (agent, url):
        agent.send_signal(signal.SIGTERM)
        assert agent.stderr is not None
        while b"sigterm_ignored" not in await agent.stderr.readline():
            assert not agent.stderr.at_eof()
        assert (await request("POST", url, body("live"))).status == 200
        assert agent.returncode is None
        agent.kill()
        async with asyncio.timeout(10):
            assert await agent.wait() == -signal.SIGKILL


async def test_an_agent_that_is_told_to_die_leaves_a_begin_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "record"
    async with process("--record", str(path), "--work-s", "0", "--behaviour", "dies") as (agent, url):
        assert (await request("POST", url, body("live"))).status == 200
        with pytest.raises(UnreachableError):
            await request("POST", url, body("die"))
        async with asyncio.timeout(10):
            assert await agent.wait() == 70
    assert [(one["event"], one["text"]) for one in lines(path)] == [
        ("begin", "live"),
        ("end", "live"),
        ("begin", "die"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--behaviour", "shy=1"], 2, b"no behaviour is called shy"),
        (["--record", "/"], 1, b"Is a directory"),
    ],
)
async def test_a_wrong_command_line_is_told_in_one_line(arguments: list[str], code: int, said: bytes) -> None:
    async with process(*arguments) as (agent, _):
        _, errors = await agent.communicate()
        assert agent.returncode == code
        assert said in errors
        assert b"Traceback" not in errors
