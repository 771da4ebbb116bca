"""The end of sessions at the door: directives and their ways, stops of live forwards, the gate, what operators say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from shared.facts import (
    FLEET,
    EvidenceKind,
    Fact,
    LivenessQuery,
    ProxyBeat,
    QueryAnswered,
    ScheduleQuery,
    SessionDirective,
    SessionStop,
    WorkspaceBacklog,
    WorkspaceEvidence,
    WorkspaceStatus,
)
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica
from tests.integration.proxy_kit import ADMIN, Proxy, empty, fresh, nothing_left, proxy
from tests.integration.queue_kit import agent
from tests.integration.stand_in_kit import stand_in

_QUEUES = ("liveness.workspace.evidence", "liveness.proxy.beat", "scheduler.schedule.query", "liveness.liveness.query")


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def queue(stack: Stack) -> AsyncIterator[None]:
    """A queue service that keeps nothing: what it says of backlogs the tests say themselves."""
    await empty(stack)
    await purge(stack)
    async with stand_in(stack):
        yield
    await purge(stack)


async def purge(stack: Stack) -> None:
    async with await aio_pika.connect(stack.amqp_url) as connection:
        for name in _QUEUES:
            channel = await connection.channel()
            with suppress(aio_pika.exceptions.ChannelNotFoundEntity):
                await (await channel.get_queue(name)).purge()


@pytest.fixture
async def front(stack: Stack, queue: None) -> AsyncIterator[Proxy]:  # noqa: ARG001 - it must be there first
    async with proxy(stack, query_timeout_s=20.0, cancel_timeout_s=0.3, control_timeout_s=2.0) as opened:
        await opened.ready()
        yield opened


def directive(name: str, kind: str = "checkpoint", **more: Any) -> SessionDirective:
    values: dict[str, Any] = {
        "workspace_id": name, "rev": 1, "directive_id": uuid7(), "session_id": "s", "incarnation": 1,
        "kind": kind, "reason": "ceiling", "deadline": datetime.now(UTC) + timedelta(seconds=60),
    }  # fmt: skip
    return SessionDirective(**{**values, **more})


async def until_told(front: Proxy, name: str, incarnation: int = 1) -> None:
    async def is_told() -> bool:
        return bool(front.copies.directives.of(name, incarnation, datetime.now(UTC).timestamp()))

    await until(is_told)


# ── directives ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_directive_reaches_the_agent_at_any_replica_and_ends_with_its_acknowledgement(
    stack: Stack, front: Proxy
) -> None:
    """Said again by the scheduler, it is told by nobody any more."""
    name = fresh()
    async with (
        proxy(stack) as other,
        agent(name, bide=front.url, token=ADMIN, heartbeat_s=30.0, behaviour={"control": False}) as worker,
    ):
        await worker.until(lambda: worker.beats > 0)
        worker.busy_for(60.0)
        asked = directive(name, session_id=f"foreign:{name}:1:1")
        await front.service.publisher.publish(asked)
        await until_told(front, name)
        await until_told(other, name)
        worker.beat_now()
        await worker.until(lambda: len(worker.directives) == 1)
        [told] = worker.directives
        assert told == {
            "id": str(asked.directive_id),
            "kind": "checkpoint",
            "reason": "ceiling",
            "session_id": asked.session_id,
            "deadline": asked.deadline.isoformat() if asked.deadline else None,
        }

        async def is_acknowledged() -> bool:
            now = datetime.now(UTC).timestamp()
            return not any(each.copies.directives.of(name, 1, now) for each in (front, other))

        await until(is_acknowledged)
        await front.service.publisher.publish(asked.model_copy(update={"fact_id": uuid7()}))
        later = directive(name, "stop")
        await front.service.publisher.publish(later)
        await until_told(other, name)
        now = datetime.now(UTC).timestamp()
        assert [each.directive_id for each in other.copies.directives.of(name, 1, now)] == [later.directive_id]


async def test_a_directive_of_another_life_is_not_told(front: Proxy) -> None:
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/", boot_id="b1"))["auth_token"]
    await front.service.publisher.publish(directive(name))
    await until_told(front, name)
    reply = await front.beat(name, token, boot_id="b2")
    assert reply.json() == {"status": "ok", "directives": []}


# ── the call ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Calls:
    """An agent of a few lines: remembers what it is sent, and answers by path."""

    url: str = ""
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    answers: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    """By path; one that is missing gets no answer."""
    stream: bytes = b""
    """First event of `message/stream`; the rest comes with `go_on`."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def of(self, path: str) -> list[Any]:
        return [body for said, _, body in self.seen if said == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").strip().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                path = first.split(" ")[1]
                said = json.loads(body) if body else None
                self.seen.append((path, headers, said))
                if isinstance(said, dict) and said.get("method") == "message/stream":
                    await self._stream(writer)
                elif path in self.answers and not (isinstance(said, dict) and said.get("method") == "tasks/cancel"):
                    status, answer = self.answers[path]
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status)
                    writer.write(b"content-length: %d\r\n\r\n%s" % (len(answer), answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + self.stream)
        await writer.drain()
        await self.go_on.wait()
        writer.write(event({"kind": "status-update", "taskId": "t1", "final": True, "status": {"state": "canceled"}}))
        await writer.drain()
        writer.close()


def event(result: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode() + b"\n\n"


@asynccontextmanager
async def called(answers: Mapping[str, tuple[int, bytes]], stream: bytes = b"") -> AsyncIterator[Calls]:
    calls = Calls(answers=answers, stream=stream)
    async with nothing_left(), await asyncio.start_server(calls.serve, "127.0.0.1", 0) as server:
        calls.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/agent/"
        yield calls
        calls.go_on.set()
        for writer in calls.writers:
            writer.close()


CALLS = [
    ("taken", (200, b'{"result": "saving"}'), False),
    ("not_now", (409, b"{}"), True),
    ("refused", (404, b"{}"), True),
]


@pytest.mark.parametrize(("outcome", "answer", "is_told"), CALLS, ids=[row[0] for row in CALLS])
async def test_who_declares_control_is_called_once_and_who_takes_it_is_not_told_again(
    stack: Stack, front: Proxy, outcome: str, answer: tuple[int, bytes], is_told: bool
) -> None:
    """One of the replicas calls; all of them tell it until it is taken."""
    name = fresh()
    before = counted("bide_proxy_control_calls_total", outcome=outcome)
    async with called({"/agent/control/stop": answer}) as calls, proxy(stack):
        said = await front.register(name, calls.url, capabilities=["control"])
        asked = directive(name, "stop")
        await front.service.publisher.publish(asked)

        async def is_counted() -> bool:
            return counted("bide_proxy_control_calls_total", outcome=outcome) == before + 1

        await until(is_counted)
        [(path, headers, body)] = calls.seen
        assert path == "/agent/control/stop"
        assert headers["authorization"] == f"Bearer {said['delivery_token']}"
        assert (body["id"], body["kind"], body["session_id"]) == (str(asked.directive_id), "stop", "s")
        if is_told:
            await until_told(front, name)


async def test_an_agent_that_does_not_answer_is_left_and_others_are_called_meanwhile(front: Proxy) -> None:
    """One call at a time to each agent; its second directive waits for the first one's bound."""
    hung, well = fresh(), fresh()
    unreachable = counted("bide_proxy_control_calls_total", outcome="unreachable")
    async with called({}) as deaf, called({"/agent/control/checkpoint": (200, b"{}")}) as good:
        await front.register(hung, deaf.url, capabilities=["control"])
        await front.register(well, good.url, capabilities=["control"])
        for fact in (directive(hung), directive(hung, reason="tick_waiting"), directive(well)):
            await front.service.publisher.publish(fact)

        async def is_called() -> bool:
            return len(good.seen) == 1

        await until(is_called)
        assert len(deaf.seen) == 1

        async def is_left() -> bool:
            return counted("bide_proxy_control_calls_total", outcome="unreachable") == unreachable + 2

        await until(is_left)
        assert len(deaf.seen) == 2


async def test_who_does_not_declare_control_is_not_called(front: Proxy) -> None:
    name = fresh()
    skipped = counted("bide_proxy_control_calls_total", outcome="skipped")
    async with called({"/agent/control/checkpoint": (200, b"{}")}) as calls:
        await front.register(name, calls.url)
        await front.service.publisher.publish(directive(name))

        async def is_skipped() -> bool:
            return counted("bide_proxy_control_calls_total", outcome="skipped") == skipped + 1

        await until(is_skipped)
        assert calls.seen == []


# ── stops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def streaming(front: Proxy, name: str) -> tuple[asyncio.Task[Any], str]:
    """A live stream to this agent whose Task is known: the call, and the session's id."""
    call = asyncio.create_task(front.say(name, method="message/stream"))

    async def is_known() -> bool:
        return any(each.task_id for each in front.copies.uses.of(name).own.values())

    await until(is_known)
    [session_id] = front.copies.uses.of(name).own
    return call, session_id


def stop(name: str, session_id: str) -> SessionStop:
    return SessionStop(workspace_id=name, rev=1, session_id=session_id, incarnation=1, reason="ceiling")


async def test_a_stop_cancels_the_task_of_a_live_stream_and_its_caller_gets_the_end(front: Proxy) -> None:
    name = fresh()
    async with agent(name, work_s=30.0) as worker:
        await front.register(name, worker.url)
        call, session_id = await streaming(front, name)
        assert worker.received[0].session == session_id, "what beats name is what the agent was told"
        await front.service.publisher.publish(stop(name, session_id))
        reply = await asyncio.wait_for(call, 60)
        assert reply.events()[-1]["result"]["status"]["state"] == "canceled"
        assert worker.received[0].outcome == "canceled"


async def test_a_cancel_that_is_never_answered_is_left_and_the_stream_goes_on(front: Proxy) -> None:
    """C-K11: some SDKs wait for the end of the Task in their cancel, without bound."""
    name = fresh()
    before = counted("bide_proxy_session_cancels_total", outcome="unreachable")
    first = event({"kind": "task", "id": "t1", "contextId": "c", "status": {"state": "working"}})
    async with called({}, first) as calls:
        await front.register(name, calls.url)
        call, session_id = await streaming(front, name)
        assert calls.seen[0][1]["x-bide-session"] == session_id
        for _ in range(2):
            await front.service.publisher.publish(stop(name, session_id))

        async def is_left() -> bool:
            return counted("bide_proxy_session_cancels_total", outcome="unreachable") == before + 1

        await until(is_left)
        canceled = [body["params"] for body in calls.of("/agent/") if body["method"] == "tasks/cancel"]
        assert canceled == [{"id": "t1"}], "once"
        assert not call.done()
        calls.go_on.set()
        assert len((await asyncio.wait_for(call, 60)).events()) == 2


@pytest.mark.parametrize(
    "last_words",
    [
        b"HTTP/1.1 503 X\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n",
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 76\r\n\r\n"
            b'{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"data":{"code":"preempted"}}}'
        ),
        b"",
    ],
    ids=["busy", "preempted", "nothing: it was killed"],
)
async def test_a_live_forward_that_was_stopped_is_not_kept_and_its_caller_hears_why(
    front: Proxy, last_words: bytes
) -> None:
    """Policies §2: what our own stop or kill ended is not sent again."""
    name = fresh()
    async with called({}) as calls:
        await front.register(name, calls.url)
        call = asyncio.create_task(front.say(name))

        async def is_live() -> bool:
            return bool(calls.seen) and bool(front.copies.uses.of(name).own)

        await until(is_live)
        [(session_id, forward)] = front.copies.uses.of(name).own.items()
        await front.service.publisher.publish(stop(name, session_id))

        async def is_stopped() -> bool:
            return forward.stop_reason is not None

        await until(is_stopped)
        calls.writers[0].write(last_words)
        await calls.writers[0].drain()
        calls.writers[0].close()
        reply = await asyncio.wait_for(call, 60)
        assert reply.status == 502, reply.body
        error = reply.json()["error"]
        assert (error["data"]["code"], error["data"]["class"]) == ("session_stopped", "unknown")
        assert "told to stop (ceiling)" in error["message"]


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_closed_gate_is_told_at_once_and_keeps_what_comes_until_it_opens(stack: Stack, front: Proxy) -> None:
    """C-K6."""
    name = fresh()
    told: list[ProxyBeat] = []

    async def hear(facts: Sequence[ProxyBeat]) -> None:
        told.extend(fact for fact in facts if fact.proxy_id == front.copies.replica_id)

    async with agent(name) as worker, replica(stack, "liveness") as side:
        side.reader.hear(ProxyBeat, hear)
        await side.reader.start()
        await front.register(name, worker.url)
        gate_until = datetime.now(UTC) + timedelta(seconds=60)
        closing = WorkspaceBacklog(
            workspace_id=name, rev=7, waiting=0, in_use=0, gate_generation=3, gate_until=gate_until
        )  # fmt: skip
        await front.service.publisher.publish(closing)

        async def is_told() -> bool:
            return any(beat.workspace_id == name for beat in told)

        await until(is_told)
        [beat] = [beat for beat in told if beat.workspace_id == name]
        assert (beat.gate_generation, beat.gate_until, list(beat.forwards)) == (3, gate_until, [])
        kept = await front.say(name)
        assert kept.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"] == "gate_closed"
        assert (await front.call("GET", f"/workspaces/{name}")).json()["gate_until"] is not None
        assert not worker.received

        async def lives() -> bool:
            return any(beat.workspace_id == FLEET for beat in told)

        await until(lives)


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_live_forwards_tell_of_each_failure_and_now_and_then_of_answers(stack: Stack, front: Proxy) -> None:
    name = fresh()
    told: list[WorkspaceEvidence] = []

    async def hear(facts: Sequence[WorkspaceEvidence]) -> None:
        told.extend(fact for fact in facts if fact.workspace_id == name)

    async with agent(name) as worker, replica(stack, "liveness") as side:
        side.reader.hear(WorkspaceEvidence, hear)
        await side.reader.start()
        await front.register(name, worker.url)
        for _ in range(5):
            assert (await front.say(name)).status == 200
        worker.behave(cut=1)
        await front.say(name)
        assert (await front.say(name)).status == 200

        async def are_three() -> bool:
            return len(told) >= 3

        await until(are_three)
        assert [each.kind for each in told] == [EvidenceKind.ANSWERED, EvidenceKind.RESET, EvidenceKind.ANSWERED]
        assert {each.incarnation for each in told} == {1}


# ── what owners and operators say ────────────────────────────────────────────────────────────────────────────────────

Said = tuple[int, Mapping[str, Any]]


@dataclass(slots=True)
class Answering:
    """A service that answers questions as told."""

    side: Replica
    says: dict[str, Callable[[Any], Said]] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)

    async def hear(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            assert isinstance(fact, ScheduleQuery | LivenessQuery)
            self.asked.append(fact)
            status, body = self.says[fact.verb](fact)
            answer = QueryAnswered(
                workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id, status=status,
                body=json.dumps(body).encode(),
            )  # fmt: skip
            self.side.publisher.post(answer, to=fact.reply_to)


@asynccontextmanager
async def answering(stack: Stack, service: str, kind: type[Fact]) -> AsyncIterator[Answering]:
    async with nothing_left(), replica(stack, service) as side:
        there = Answering(side)
        side.reader.hear(kind, there.hear)
        await side.reader.start()
        yield there


SESSION = {"session_id": "s", "kind": "delivery", "running_s": 21_600.0, "state": "running"}
BOUNCED = [{"schedule_id": str(uuid7()), "name": "report", "bounces": 12, "next_fire_at": None}]


async def test_what_runs_and_what_bounces_is_shown(stack: Stack, front: Proxy) -> None:
    """B-01, C-V2: "running for 6 h in one session; schedule report has bounced 12 times"."""
    name, idle = fresh(), fresh()
    await front.register(name)
    await front.register(idle)
    alone = (await front.call("GET", f"/workspaces/{name}")).json()
    assert [alone[word] for word in ("session", "sessions", "schedules")] == [None] * 3
    assert alone["sessions_known"] is False
    async with answering(stack, "scheduler", ScheduleQuery) as scheduler:
        asked: list[list[str]] = []

        def sessions(query: ScheduleQuery) -> Said:
            if query.workspace_id == FLEET:
                asked.append(json.loads(query.body)["workspaces"])
                return 200, {"workspaces": {name: {"session": SESSION, "schedules": BOUNCED}}}
            return 200, {"session": SESSION, "sessions": [SESSION], "schedules": BOUNCED}

        scheduler.says["sessions"] = sessions
        shown: dict[str, Any] = {}

        async def is_known() -> bool:
            shown.update((await front.call("GET", f"/workspaces/{name}")).json())
            return bool(shown["sessions_known"])

        await until(is_known)
        assert (shown["session"], shown["sessions"], shown["schedules"]) == (SESSION, [SESSION], BOUNCED)
        listed = {each["workspace_id"]: each for each in (await front.call("GET", "/workspaces")).json()["items"]}
        assert (listed[name]["session"], listed[name]["schedules"]) == (SESSION, BOUNCED)
        assert (listed[idle]["session"], listed[idle]["sessions"], listed[idle]["sessions_known"]) == (None, [], True)
        assert asked == [sorted(listed)]
        await front.call("GET", "/workspaces?limit=1")
        assert asked[1:] == [sorted(listed)[:1]], "what nobody sees is not asked for"


@pytest.mark.parametrize("verb", ["stop", "checkpoint"])
async def test_owners_and_operators_end_what_runs_and_it_is_recorded(stack: Stack, front: Proxy, verb: str) -> None:
    name, other = fresh(), fresh()
    await front.register(name)
    stranger = (await front.register(other))["auth_token"]
    path = f"/workspaces/{name}/{verb}"
    async with answering(stack, "scheduler", ScheduleQuery) as scheduler:
        scheduler.says[verb] = lambda _: (200, {"sessions": [SESSION]})
        done = await front.call("POST", path, {"reason": "deploy"})
        assert (done.status, done.json()) == (200, {"sessions": [SESSION]})
        [query] = scheduler.asked
        assert (query.verb, query.workspace_id, query.by, json.loads(query.body)) == (
            verb, name, "admin", {"reason": "deploy"},
        )  # fmt: skip
        scheduler.says[verb] = lambda _: (409, {"code": "no_session", "detail": "Nothing runs there."})
        again = await front.call("POST", path)
        assert (again.status, again.json()["code"]) == (409, "no_session")
        assert (await front.call("POST", path, token=stranger)).status == 404
        assert (await front.call("POST", path, {"reasons": "x"})).status == 422
        rows = await front.service.pool.fetch("SELECT detail FROM audit WHERE action = $1", verb)
        assert [json.loads(row["detail"]) for row in rows] == [{"reason": "deploy"}, {"reason": None}]


async def test_nobody_waits_long_for_a_scheduler_or_a_liveness_that_is_away(stack: Stack) -> None:
    await empty(stack)
    async with proxy(stack, query_timeout_s=0.3) as front:
        name = fresh()
        await front.register(name)
        for method, path, code in (
            ("POST", "stop", "scheduler_away"),
            ("POST", "restart", "liveness_away"),
            ("GET", "life", "liveness_away"),
        ):
            reply = await front.call(method, f"/workspaces/{name}/{path}")
            assert (reply.status, reply.json()["code"]) == (503, code)
    await purge(stack)


async def test_a_restart_is_an_operator_s_word_to_liveness(stack: Stack, front: Proxy) -> None:
    name = fresh()
    token = (await front.register(name))["auth_token"]
    async with answering(stack, "liveness", LivenessQuery) as liveness:
        liveness.says["restart"] = lambda _: (202, {"status": "restarting"})
        liveness.says["history"] = lambda query: (200, {"items": [], "limit": query.limit})
        done = await front.call("POST", f"/workspaces/{name}/restart", {"reason": "stuck"})
        assert (done.status, done.json()) == (202, {"status": "restarting"})
        assert (await front.call("GET", f"/workspaces/{name}/life?limit=7")).json()["limit"] == 7
        assert [(each.verb, each.note) for each in liveness.asked] == [("restart", "stuck"), ("history", "")]
        assert (await front.call("POST", f"/workspaces/{name}/restart", token=token)).status == 403
        assert (await front.call("GET", f"/workspaces/{fresh()}/life")).status == 404


async def test_what_liveness_says_of_a_workspace_is_shown(front: Proxy) -> None:
    name = fresh()
    await front.register(name)
    await front.service.publisher.publish(
        WorkspaceStatus(workspace_id=name, rev=1, incarnation=1, status="wedged", reason="silent for 4 minutes")
    )

    async def is_shown() -> bool:
        shown = (await front.call("GET", f"/workspaces/{name}")).json()
        return (shown["status"], shown["status_reason"]) == ("wedged", "silent for 4 minutes")

    await until(is_shown)
