"""An agent and Bide: registration, heartbeats, tokens, directives, against a proxy that is only an edge."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bide_agent import Agent, Options, running
from bide_agent.client import Reply, post, request
from bide_agent.heart import RETRY_FIRST_S, RETRY_MAX_S, retry_s
from bide_agent.server import listen

SEND = {
    "jsonrpc": "2.0", "id": 1, "method": "message/send",
    "params": {"message": {"role": "user", "messageId": "m", "parts": [{"kind": "text", "text": "hello"}]}},
}  # fmt: skip


@dataclass
class Asked:
    """One request that the fake proxy read."""

    path: str
    token: str
    body: dict[str, Any]


@dataclass
class FakeBide:
    """Remembers what it is asked. `taken`: the tokens it takes. `broken`: what it answers first; 0 is EOF."""

    url: str = ""
    taken: set[str] = field(default_factory=lambda: {"enrol", "own-1"})
    issues: list[str] = field(default_factory=lambda: ["own-1"])
    broken: list[int] = field(default_factory=list)
    directives: list[Any] = field(default_factory=list)
    delivery: str | None = "delivery"
    asked: list[Asked] = field(default_factory=list)

    @property
    def registrations(self) -> list[Asked]:
        return [one for one in self.asked if one.path == "/registry/register"]

    @property
    def beats(self) -> list[Asked]:
        return [one for one in self.asked if one.path == "/registry/heartbeat"]

    def answer(self, asked: Asked) -> tuple[int, dict[str, Any]]:
        if self.broken:
            return self.broken.pop(0), {"detail": "broken"}
        if asked.token not in self.taken:
            return 401, {"detail": "unknown token"}
        if asked.path == "/registry/heartbeat":
            return 200, {"status": "ok", "directives": self.directives}
        told = {"auth_token": self.issues.pop(0)} if self.issues else {}
        return 200, {**told, "delivery_token": self.delivery, "incarnation": len(self.registrations)}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # An agent that stops may have connected and said nothing.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        asked = Asked(head[0].split()[1], headers.get("authorization", "").removeprefix("bearer "), body)
        self.asked.append(asked)
        status, told = self.answer(asked)
        if status:
            said = json.dumps(told).encode()
            writer.write(b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n" % (status, len(said)) + said)


@asynccontextmanager
async def serving(bide: FakeBide, port: int = 0) -> AsyncIterator[FakeBide]:
    server = await asyncio.start_server(bide.serve, "127.0.0.1", port)
    async with server:
        bide.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield bide


@pytest.fixture
def unused_port() -> int:
    with listen(0) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture
async def bide() -> AsyncIterator[FakeBide]:
    async with serving(FakeBide()) as fake:
        yield fake


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - before == {asyncio.current_task()}


def options(bide: FakeBide, **changes: Any) -> Options:
    given: dict[str, Any] = {"workspace": "w1", "bide": bide.url, "token": "enrol", "work_s": 0.0, **changes}
    return Options(**given)


async def say(agent: Agent, token: str | None = "delivery", **headers: str) -> Reply:
    authorization = {"authorization": f"Bearer {token}"} if token else {}
    return await request("POST", agent.url, json.dumps(SEND).encode(), headers={**authorization, **headers})


async def test_an_agent_registers_with_all_that_bide_must_know(bide: FakeBide) -> None:
    async with running(options(bide, max_concurrent=3, heartbeat_s=12)) as agent:
        await agent.until(lambda: agent.registered)
        asked = bide.registrations[0]
        card = asked.body.pop("agent_card")
        assert asked.token == "enrol"
        assert asked.body == {
            "id": "w1",
            "url": agent.url,
            "boot_id": agent.boot_id,
            "max_concurrent_tasks": 3,
            "heartbeat_interval_s": 12,
            "capabilities": ["control", "refuses_when_busy"],
        }
        assert card["url"] == agent.url
        assert agent.incarnation == 1


async def test_every_beat_says_everything_with_the_agents_own_token(bide: FakeBide) -> None:
    """A-A-08, A-A-09: beats between the beats had no token, or cleared what they left out."""
    async with running(options(bide, heartbeat_s=30)) as agent:
        await agent.until(lambda: agent.beats == 1)
        await say(agent)
        await agent.until(lambda: agent.beats == 2)
        first, second = bide.beats
        assert {first.token, second.token} == {"own-1"}
        assert first.body.keys() == second.body.keys()
        assert first.body | {"uptime_seconds": 0} == {
            "workspace_id": "w1",
            "active_tasks": 0,
            "boot_id": agent.boot_id,
            "max_concurrent_tasks": 1,
            "uptime_seconds": 0,
            "progress": 0,
            "acknowledged": [],
        }


async def test_an_agent_waits_for_a_proxy_that_comes_later(unused_port: int) -> None:
    """A-A-03: an outage costs a delay, not the agent."""
    late = FakeBide(url=f"http://127.0.0.1:{unused_port}")
    async with running(options(late)) as agent:
        assert not agent.registered
        async with serving(late, unused_port):
            await agent.until(lambda: agent.beats == 1)


async def test_it_beats_on_the_declared_cadence(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=0.02)) as agent:
        await agent.until(lambda: agent.beats >= 4)
        assert bide.registrations[0].body["heartbeat_interval_s"] == 0.02


async def test_a_turn_that_ends_is_told_at_once(bide: FakeBide) -> None:
    """A-A-07: an agent that works is counted, and its freed slot is not a cadence away."""
    async with running(options(bide, heartbeat_s=600, work_s=0.05)) as agent:
        await agent.until(lambda: agent.beats == 1)
        call = asyncio.create_task(say(agent))
        await agent.until(lambda: agent.active == 1)
        agent.beat_now()
        await agent.until(lambda: agent.beats == 2)
        await call
        await agent.until(lambda: agent.beats == 3)
        assert [beat.body["active_tasks"] for beat in bide.beats] == [0, 1, 0]
        assert bide.beats[2].body["progress"] >= 0.05


async def test_foreign_work_is_active_and_its_end_is_told_at_once(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=600, max_concurrent=2)) as agent:
        await agent.until(lambda: agent.beats == 1)
        agent.busy_for(600)
        agent.beat_now()
        await agent.until(lambda: agent.beats == 2)
        agent.busy_for(0)
        await agent.until(lambda: agent.beats == 3)
        assert [beat.body["active_tasks"] for beat in bide.beats] == [0, 2, 0]


async def test_only_bide_may_call_once_the_delivery_token_is_told(bide: FakeBide) -> None:
    async with running(options(bide)) as agent:
        await agent.until(lambda: agent.registered)
        assert (await say(agent, token=None)).status == 401
        assert (await say(agent, token="other")).status == 401
        assert (await say(agent)).status == 200
        agent.behave(check_token=False)
        assert (await say(agent, token=None)).status == 200
        assert [one.outcome for one in agent.refused] == ["wrong_token", "wrong_token"]


async def test_the_own_token_outlives_the_agent_for_its_owner_alone(bide: FakeBide, tmp_path: Path) -> None:
    for _ in range(2):
        async with running(options(bide, state_dir=tmp_path / "state")) as agent:
            await agent.until(lambda agent=agent: agent.beats == 1)  # type: ignore[misc]
    assert [one.token for one in bide.registrations] == ["enrol", "own-1"]
    (stored,) = (tmp_path / "state").iterdir()
    assert stored.read_text() == "own-1"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600


async def test_a_rotated_token_is_read_again_after_a_401(bide: FakeBide, tmp_path: Path) -> None:
    """A-A-10, A-L-09: a token that was rotated beside the agent costs one refused beat, no new registration."""
    async with running(options(bide, state_dir=tmp_path, heartbeat_s=600)) as agent:
        await agent.until(lambda: agent.beats == 1)
        bide.taken = {"own-2"}
        (tmp_path / "w1.token").write_text("own-2")
        agent.beat_now()
        await agent.until(lambda: agent.beats == 2)
        assert [beat.token for beat in bide.beats] == ["own-1", "own-1", "own-2"]
        assert len(bide.registrations) == 1


@pytest.mark.parametrize("on_disk", [False, True])
async def test_an_agent_whose_token_is_no_longer_known_registers_again(
    bide: FakeBide, tmp_path: Path, *, on_disk: bool
) -> None:
    async with running(options(bide, state_dir=tmp_path if on_disk else None, heartbeat_s=600)) as agent:
        await agent.until(lambda: agent.beats == 1)
        bide.taken, bide.issues = {"enrol", "own-2"}, ["own-2"]
        agent.beat_now()
        await agent.until(lambda: agent.beats == 2)
        assert [one.token for one in bide.registrations] == ["enrol", "enrol"]
        assert bide.beats[-1].token == "own-2"


async def test_no_answer_of_the_proxy_ends_an_agent(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=0.02)) as agent:
        await agent.until(lambda: agent.beats == 1)
        bide.broken = [500, 0, 404, 503, 410]
        await agent.until(lambda: not bide.broken)
        await agent.until(lambda: agent.registered)
        beats = agent.beats
        await agent.until(lambda: agent.beats > beats)


async def test_a_directive_is_acknowledged_at_once_and_heard_once(bide: FakeBide) -> None:
    directive = {"id": "d-1", "kind": "checkpoint", "reason": "ceiling", "session_id": "s", "deadline": "x"}
    bide.directives = [directive, {"id": 7}, "none", {}]
    async with running(options(bide, heartbeat_s=600)) as agent:
        await agent.until(lambda: agent.beats == 2)
        assert bide.beats[1].body["acknowledged"] == [{"id": "d-1", "result": "ended"}]
        # The second reply repeats it; that alone must not make a third beat. What is next comes from this call.
        await say(agent)
        await agent.until(lambda: agent.beats == 3)
        assert agent.directives == [directive]
        assert bide.beats[2].body["acknowledged"] == [{"id": "d-1", "result": "ended"}]


async def test_an_acknowledgement_is_said_until_bide_has_taken_it(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=0.02)) as agent:
        await agent.until(lambda: agent.beats == 1)
        bide.directives = [{"id": "d-1", "kind": "stop"}]
        await agent.until(lambda: bool(agent.directives))
        bide.directives, bide.broken = [], [500]
        await agent.until(lambda: not bide.broken and agent.beats >= 4)
        said = [bool(beat.body["acknowledged"]) for beat in bide.beats]
        assert said[said.index(True) :][:3] in ([True, True, False], [True, False, False])


def directive(kind: str, reason: str = "ceiling", session_id: str = "s-1") -> dict[str, Any]:
    return {"id": f"{kind}-1", "kind": kind, "reason": reason, "session_id": session_id, "deadline": None}


@pytest.mark.parametrize(
    ("given", "behaviour", "word", "outcome"),
    [
        (directive("checkpoint"), {"save_s": 0}, "saving", "checkpointed"),
        (directive("checkpoint", "ceiling_near"), {}, "noted", None),
        (directive("stop"), {}, "stopping", "canceled"),
        (directive("stop"), {"stop": "ignore"}, "ignored", None),
        (directive("checkpoint", session_id="s-2"), {}, "ended", None),
    ],
)
async def test_what_a_directive_in_a_reply_came_to_is_told_with_the_next_beat(
    bide: FakeBide, given: dict[str, Any], behaviour: dict[str, Any], word: str, outcome: str | None
) -> None:
    async with (
        running(options(bide, heartbeat_s=600, work_s=600, behaviour=behaviour, grace_s=0)) as agent,
        calling(agent, **{"x-bide-session": "s-1"}),
    ):
        await agent.until(lambda: agent.beats >= 1)
        bide.directives = [given]
        agent.beat_now()
        await agent.until(lambda: any(beat.body["acknowledged"] for beat in bide.beats))
        await agent.until(lambda: outcome is None or agent.active == 0)
        told = next(beat.body["acknowledged"] for beat in bide.beats if beat.body["acknowledged"])
        assert told == [{"id": given["id"], "result": word}]
        assert agent.received[0].outcome == outcome


async def test_a_directive_that_comes_both_ways_is_acted_on_once_and_acknowledged(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=600, work_s=600, grace_s=0)) as agent:
        await agent.until(lambda: agent.beats == 1)
        given = directive("checkpoint", "ceiling_near")
        async with calling(agent, **{"x-bide-session": "s-1"}):
            reply = await post(f"{agent.url}/control/checkpoint", given, token="delivery")
            assert (reply.status, reply.json()) == (200, {"result": "noted"})
            await agent.until(lambda: agent.beats == 2)
            assert bide.beats[1].body["acknowledged"] == [{"id": given["id"], "result": "noted"}]
            bide.directives = [given]
            agent.beat_now()
            await agent.until(lambda: agent.beats == 3)
            assert bide.beats[2].body["acknowledged"] == []
            assert agent.directives == [given]


async def test_only_bide_may_give_directives_over_http(bide: FakeBide) -> None:
    async with running(options(bide)) as agent:
        await agent.until(lambda: agent.registered)
        assert (await post(f"{agent.url}/control/stop", directive("stop"), token="other")).status == 401
        assert (await post(f"{agent.url}/control/stop", directive("stop"), token="delivery")).status == 409


async def test_an_agent_without_control_hears_of_directives_in_replies_only(bide: FakeBide) -> None:
    async with running(options(bide, behaviour={"control": False})) as agent:
        await agent.until(lambda: agent.registered)
        assert bide.registrations[0].body["capabilities"] == ["refuses_when_busy"]
        assert (await post(f"{agent.url}/control/stop", directive("stop"), token="delivery")).status == 404


async def test_a_deaf_agent_registers_and_says_no_more(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=0.01, behaviour={"deaf": True})) as agent:
        await agent.until(lambda: agent.registered)
        for _ in range(3):
            await say(agent)
        assert bide.beats == []
        agent.behave(deaf=False)
        await agent.until(lambda: agent.beats == 1)


async def test_always_zero_reports_no_work(bide: FakeBide) -> None:
    async with running(options(bide, heartbeat_s=600, behaviour={"always_zero": True})) as agent:
        agent.busy_for(600)
        agent.beat_now()
        await agent.until(lambda: agent.beats == 1)
        assert bide.beats[0].body["active_tasks"] == 0
        agent.behave(always_zero=False)
        await agent.until(lambda: agent.beats == 2)
        assert bide.beats[1].body["active_tasks"] == 1


async def test_a_silent_turn_makes_no_progress_and_a_working_one_does(bide: FakeBide) -> None:
    async def progress(agent: Agent, before: int) -> float:
        agent.beat_now()
        await agent.until(lambda: agent.beats > before)
        return float(bide.beats[-1].body["progress"])

    async with running(options(bide, heartbeat_s=600, work_s=60, behaviour={"silent": 1}, grace_s=0)) as agent:
        await agent.until(lambda: agent.beats == 1)
        async with calling(agent):
            assert await progress(agent, 1) == 0
            assert await progress(agent, 2) == 0
        await agent.until(lambda: agent.beats == 4)
        async with calling(agent):
            first = await progress(agent, 4)
            assert await progress(agent, 5) > first


@asynccontextmanager
async def calling(agent: Agent, **headers: str) -> AsyncIterator[None]:
    """A call that is given up at the end of the block."""
    await agent.until(lambda: agent.registered)
    begun = len(agent.received)
    call = asyncio.create_task(say(agent, **headers))
    await agent.until(lambda: len(agent.received) > begun)
    yield
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_the_end_of_the_agent_ends_its_heart_in_the_middle_of_a_beat() -> None:
    hung = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.set()
        await reader.read()  # until the agent hangs up
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running(Options(workspace="w1", bide=url)):
            await hung.wait()


@pytest.mark.parametrize(
    ("failures", "longest"), [(1, RETRY_FIRST_S), (2, 0.2), (6, 3.2), (7, RETRY_MAX_S), (10**9, 5)]
)
def test_retries_come_later_each_time(failures: int, longest: float) -> None:
    assert all(longest / 2 <= retry_s(failures, 30) <= longest for _ in range(50))


def test_retries_are_never_rarer_than_beats() -> None:
    assert retry_s(100, 0.5) <= 0.5
