"""Agents of the runtime behind the whole stack: restarts, a lost network, a critical message, a ceiling."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from bide_agent import Host, Message, Session, hosted
from bide_agent.runner.command import Command, Limits, Saving
from bide_agent.runtime.words import Handler
from bide_agent.server import listen
from tests.chaos.kit.link import Link, link
from tests.conftest import until
from tests.e2e.conftest import ROOT, Caller, Ready, up
from tests.e2e.test_sessions import QUICK

OUTAGE_S = 60.0 if os.environ.get("BIDE_TEST_LONG") else 3.0
URI = "urn:bide:queue:1"


@pytest.fixture(scope="module")
def ring() -> Iterator[Ready]:
    with up(**QUICK) as ready:
        yield ready


@dataclass
class Job:
    """A handler that does a message's words one by one, each when the test lets it, and saves what it has done."""

    runs: list[tuple[str, str | None, Any]] = field(default_factory=list)
    """Text, queue id and what was saved, of each run."""
    done: dict[str, list[str]] = field(default_factory=dict)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, message: Message, session: Session) -> str:
        words = list(session.saved or [])
        self.runs.append((message.text, session.queue_id, session.saved))
        for word in message.text.split()[len(words) :]:
            words.append(word)
            self.done.setdefault(message.text, []).append(word)
            session.save(words)
            await session.checkpoint(" ".join(words))
            if word == "wait":
                asked = asyncio.create_task(session.until_asked())
                released = asyncio.create_task(self.goes_on.wait())
                await asyncio.wait({asked, released}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                released.cancel()
                await session.checkpoint(" ".join(words))
        return " ".join(words)


@pytest.fixture
async def started(ring: Ready, tmp_path: Path) -> AsyncIterator[Any]:
    """What starts agents of the runtime: a handler, and options."""
    async with AsyncExitStack() as exits:

        async def start(handle: Handler, **options: Any) -> Host:
            return await exits.enter_async_context(behind(ring, handle, tmp_path, **options))

        yield start


@asynccontextmanager
async def behind(ring: Ready, handle: Handler, folder: Path, **options: Any) -> AsyncIterator[Host]:
    given = {
        "workspace": f"r-{uuid4().hex[:8]}", "bide": ring.proxy, "token": ring.admin_token, "state_dir": folder,
        "heartbeat_s": 0.5, "grace_s": 1.0, "stop_grace_s": 2.0, **options,
    }  # fmt: skip
    async with hosted(handle, **given) as host:
        await host.until(lambda: host.registered and host.beats >= 1)
        yield host


def text_in(answer: Any) -> str:
    found = json.loads(answer) if isinstance(answer, str) else answer
    return "".join(part["text"] for one in found["result"].get("artifacts", []) for part in one["parts"])


async def kept(lead: Caller, workspace: str, text: str, priority: str = "TASK") -> str:
    """Send for later; return the item's id."""
    reply = await lead.send(workspace, text, prefer="wait=0", x_bide_priority=priority)
    assert reply.status == 202, reply.body
    return str(reply.json["queue_id"])


async def test_an_agent_that_starts_again_with_a_void_token_enrols_and_gets_its_messages(
    ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    """A-A-10, A-L-09: rotated while it was down; and, the second time, beside it while it ran."""
    name, job = f"r-{uuid4().hex[:8]}", Job()
    async with behind(ring, job, tmp_path, workspace=name) as host:
        first = (tmp_path / name / f"{name}.token").read_text()
        boot_id = host.boot_id
    queue_id = await kept(lead, name, "after the restart")
    told = await lead.call("POST", "/registry/register", {"id": name, "url": host.url})
    assert told.json["auth_token"] != first
    async with behind(ring, job, tmp_path, workspace=name) as host:
        assert host.boot_id != boot_id
        assert (await lead.ended(queue_id))["status"] == "completed"
        own = tmp_path / name / f"{name}.token"
        assert own.read_text() not in {first, told.json["auth_token"]}
        # Another registration makes the token void; whoever did it puts the new one where the agent looks.
        again = await lead.call("POST", "/registry/register", {"id": name, "url": host.url, "boot_id": host.boot_id})
        own.write_text(again.json["auth_token"])
        beats = host.beats
        await host.until(lambda: host.beats >= beats + 3)
        assert own.read_text() == again.json["auth_token"], "it had no reason to enrol again"
        queue_id = await kept(lead, name, "after the rotation")
        assert (await lead.ended(queue_id))["status"] == "completed"
    assert [text for text, _, _ in job.runs] == ["after the restart", "after the rotation"]


async def test_a_task_that_makes_room_for_a_critical_message_goes_on_from_what_it_saved(
    lead: Caller, started: Any
) -> None:
    """C-K1: preempted costs no attempt and no place; the same message comes again, and so does its state."""
    job = Job()
    host: Host = await started(job)
    name = host.workspace
    assert (await lead.call("PATCH", f"/workspaces/{name}", {"critical_preempt_after_s": 1})).status == 200
    task = await kept(lead, name, "read write wait test")
    await host.until(lambda: bool(job.runs) and job.done["read write wait test"][-1] == "wait")
    alarm = await kept(lead, name, "alarm", "CRITICAL")
    urgent = await lead.ended(alarm)
    job.goes_on.set()
    ended = await lead.ended(task)
    print(f"{name}: {[(text, saved) for text, _, saved in job.runs]}; {ended['status']}, {ended['attempts']} attempts")
    assert [text for text, _, _ in job.runs] == ["read write wait test", "alarm", "read write wait test"]
    assert job.runs[0][1] == job.runs[2][1] == task
    assert job.runs[2][2] == ["read", "write", "wait"]
    assert job.done["read write wait test"] == ["read", "write", "wait", "test"], "nothing was done twice"
    assert (urgent["status"], ended["status"], ended["attempts"]) == ("completed", "completed", 0)
    assert text_in(ended["answer"]) == "read write wait test"
    reasons = [each["reason"] for each in host.directives]
    assert reasons == ["critical_waiting"]


async def test_at_its_ceiling_a_turn_saves_and_its_partial_work_is_the_answer(lead: Caller, started: Any) -> None:
    """A-S-14: nothing is stopped where the handler stands at a tool boundary."""
    job = Job()
    host: Host = await started(job)
    name = host.workspace
    # It is asked twice, a quarter of the ceiling apart: longer than this machine stands still.
    rules = {"session_ceiling_s": 12, "checkpoint_grace_s": 20, "stop_grace_s": 5}
    assert (await lead.call("PATCH", f"/workspaces/{name}", rules)).status == 200
    reply = await lead.send(name, "read wait never", prefer="wait=40")
    assert reply.status == 200, reply.body
    assert text_in(reply.json) == "read wait"
    mark = reply.json["result"]["metadata"][URI]
    assert (mark["checkpointed"], mark["reason"]) == (True, "ceiling")
    assert [each["reason"] for each in host.directives if each["kind"] == "checkpoint"] == ["ceiling_near", "ceiling"]
    assert not [each for each in host.directives if each["kind"] == "stop"]


async def test_a_command_that_ignores_its_ceiling_is_stopped_and_the_next_message_runs(
    lead: Caller, started: Any
) -> None:
    """C-K2: stop cancels the handler, and with it the whole process group."""
    program = "if [ $(cat) = stay ]; then trap '' TERM; echo staying; sleep 600 & wait; sleep 600; else echo went; fi"
    command = Command(arguments=["sh", "-c", program], limits=Limits(stop_grace_s=0.5), saving=Saving(file="save"))
    host: Host = await started(command)
    name = host.workspace
    rules = {"session_ceiling_s": 3, "checkpoint_grace_s": 1, "stop_grace_s": 20}
    assert (await lead.call("PATCH", f"/workspaces/{name}", rules)).status == 200
    first = await kept(lead, name, "stay")
    await host.until(lambda: host.active == 1)
    second = await kept(lead, name, "go")
    assert (await lead.ended(second))["status"] == "completed"
    ended = await lead.ended(first)
    print(f"{name}: {ended['status']} ({ended['reason']}) after {[each['kind'] for each in host.directives]}")
    assert (ended["status"], ended["reason"]) == ("failed", "ceiling")
    assert "stop" in [each["kind"] for each in host.directives]


async def test_an_agent_that_loses_its_network_goes_on_and_nothing_runs_twice(
    ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    """A-A-03, A-Q-19: black holes both ways, then every old connection is reset; the answer is fetched again."""
    job, port, way_in, way_out = Job(), *(free_port() for _ in range(3))
    proxy = urlsplit(ring.proxy)
    async with (
        link(str(proxy.hostname), proxy.port or 80, listen_on=way_out) as to_bide,
        link("127.0.0.1", port, listen_on=way_in) as to_agent,
        behind(
            ring, job, tmp_path, bide=f"http://127.0.0.1:{way_out}", url=f"http://127.0.0.1:{way_in}", port=port
        ) as host,
    ):
        name = host.workspace
        queue_id = await kept(lead, name, "one wait two")
        await host.until(lambda: bool(job.runs) and job.done["one wait two"][-1] == "wait")
        beats, before = host.beats, (await lead.call("GET", f"/workspaces/{name}")).json
        await outage(to_bide, to_agent, job)
        await host.until(lambda: host.beats > beats, within_s=30)
        ended = await lead.ended(queue_id, within_s=60)
        after = (await lead.call("GET", f"/workspaces/{name}")).json
        print(f"{name}: {OUTAGE_S:g} s without network, {ended['status']}, {ended['delivery_no']} deliveries")
        assert (ended["status"], text_in(ended["answer"])) == ("completed", "one wait two")
        assert len(job.runs) == 1, "the redelivery got the answer of the turn that ran"
        assert ended["delivery_no"] >= 2
        assert (after["incarnation"], after["status"]) == (before["incarnation"], "online")


async def outage(to_bide: Link, to_agent: Link, job: Job) -> None:
    for wire in (to_bide, to_agent):
        wire.hold()
    await asyncio.sleep(OUTAGE_S)  # how long it lasts is the case
    job.goes_on.set()  # the turn ends while nobody can hear of it
    for wire in (to_bide, to_agent):
        wire.reset()
        wire.release()


def free_port() -> int:
    with listen(0) as taken:
        return int(taken.getsockname()[1])


async def test_the_runner_is_a_program_of_its_own_and_gives_back_what_it_has_not_finished(
    ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    """A-Q-18: told to end in the middle of a turn; another one goes on in the same folder."""
    name = f"r-{uuid4().hex[:8]}"
    program = "if [ $BIDE_RESUMED = 1 ]; then echo again: $(cat notes); else cat > notes; echo begun; sleep 600; fi"
    async with runner(ring, name, tmp_path, "sh", "-c", program) as first:

        async def is_known() -> bool:
            return (await lead.call("GET", f"/workspaces/{name}")).status == 200

        await until(is_known)
        queue_id = await kept(lead, name, "remember me")

        async def has_begun() -> bool:
            return any(notes.read_text() for notes in tmp_path.rglob("notes"))  # noqa: ASYNC240 - a small folder

        await until(has_begun)
        first.terminate()
        await first.communicate()
    async with runner(ring, name, tmp_path, "sh", "-c", program):
        ended = await lead.ended(queue_id)
    assert (ended["status"], ended["attempts"]) == ("completed", 0)
    assert text_in(ended["answer"]) == "again: remember me\n"


@asynccontextmanager
async def runner(ring: Ready, name: str, folder: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    options = ("--workspace", name, "--bide", ring.proxy, "--state-dir", str(folder))
    quick = ("--heartbeat-s", "0.5", "--grace-s", "0.2", "--stop-grace-s", "1")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bide_agent", "run", *options, *quick, "--", *command,
        cwd=ROOT, env={**os.environ, "BIDE_TOKEN": ring.admin_token}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["workspace"] == name
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()
