"""examples/, run as a newcomer runs them: each a program of its own, against the real stack."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from bide_agent import client
from tests.e2e.conftest import ROOT, Caller, Fleet, Ready, busy, free

pytestmark = pytest.mark.timeout(600)  # the first run fetches two SDKs

CALLERS = ROOT / "examples/callers"
AGENTS = ROOT / "examples/agents"
PLAIN = AGENTS / "plain.py"


@dataclass(frozen=True, slots=True)
class Kind:
    """One example of a caller, and the words it prints."""

    name: str
    method: str
    answered: str
    kept: str
    completed: str
    sdk: str | None = None

    def command(self) -> Sequence[str]:
        if self.name == "curl":
            need_curl()
            return (str(CALLERS / "curl.sh"), "send")
        python = str(sdk_python(self.sdk)) if self.sdk else sys.executable
        return (python, str(CALLERS / f"{self.name}.py"))


SEED = Kind("seed", "message/send", "answered: ", "kept: ", "completed: ")
CURL = Kind("curl", "message/send", "200 ", "202 ", "200 ")
SDK_10 = Kind(
    "sdk_1_0", "SendMessage", "TASK_STATE_COMPLETED: ", "TASK_STATE_SUBMITTED: ", "TASK_STATE_COMPLETED: ", sdk="1.0"
)
SDK_03 = Kind("sdk_0_3", "message/send", "completed: ", "submitted: ", "completed: ", sdk="0.3")
KINDS = (SEED, CURL, SDK_10, SDK_03)


def need_curl() -> None:
    """The one program that a new Debian with Python does not have. Where CI runs it is installed, and must be."""
    if shutil.which("curl") is None:
        if os.environ.get("CI"):
            pytest.fail("examples/callers/curl.sh needs curl: .ci/run installs it")
        pytest.skip("curl is not installed: apt-get install curl")


def sdk_python(version: str) -> Path:
    """The Python of an environment with this SDK and our runtime, made once per lock file; one per version."""
    locks = (CALLERS / f"sdk-{version}.lock", AGENTS / "runtime.lock")
    folder = ROOT / ".bide" / f"sdk-{version}"
    python, stamp = folder / "bin/python", folder / "installed"
    wanted = f"{sys.version} {hashlib.sha256(b''.join(lock.read_bytes() for lock in locks)).hexdigest()}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".making").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)  # other test processes want it too
        if not stamp.exists() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
            files = [word for lock in locks for word in ("-r", str(lock))]
            subprocess.run([*pip, "install", "--no-deps", "--require-hashes", *files], check=True)
            stamp.write_text(wanted)
    return python


@dataclass(slots=True)
class Program:
    """A running example."""

    process: asyncio.subprocess.Process
    lines: list[str]

    async def says(self, words: str) -> str:
        """The next line that begins so."""
        async with asyncio.timeout(60):
            while line := await self._line():
                if line.startswith(words):
                    return line.rstrip()
        raise AssertionError(f"it never said {words!r}: {self.lines}")

    async def ends(self) -> str:
        """Its last line, once it has ended well."""
        async with asyncio.timeout(60):
            while await self._line():
                pass
            assert await self.process.wait() == 0, self.lines
        return self.lines[-1]

    async def _line(self) -> str:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        if line:
            self.lines.append(line.rstrip())
        return line


@asynccontextmanager
async def started(ready: Ready, *command: str, **environ: str) -> AsyncIterator[Program]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, "BIDE": ready.proxy, "TOKEN": ready.admin_token, "PYTHONUNBUFFERED": "1", **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Program(process, [])
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def caller(request: pytest.FixtureRequest) -> tuple[Kind, Sequence[str]]:
    """Every example of a caller, with its command; made before an agent runs, for it may have to be fetched."""
    kind: Kind = request.param
    return kind, kind.command()


def queue_id_in(line: str) -> str:
    """The id that a caller prints when its message is kept."""
    if line.startswith("202 "):
        return str(json.loads(line.removeprefix("202 "))["queue_id"])
    return line.split()[1].rstrip(",")


async def test_an_idle_agent_answers_a_caller_of_every_kind(
    caller: tuple[Kind, Sequence[str]], open_ring: Ready, fleet: Fleet
) -> None:
    kind, command = caller
    agent = await fleet.start()
    async with started(open_ring, *command, agent.workspace, 'say "hello"') as program:
        last = await program.ends()
    assert last.startswith(kind.answered)
    assert "hello" in last
    assert [each.text for each in agent.received] == ['say "hello"']
    sent = json.loads(agent.received[0].body)
    assert (sent["jsonrpc"], sent["method"]) == ("2.0", kind.method)


async def test_a_busy_agent_gets_the_message_of_a_caller_of_every_kind_later(
    caller: tuple[Kind, Sequence[str]], ring: Ready, fleet: Fleet
) -> None:
    """A-P-10: 202, poll, the final result; also by the official SDKs of both versions; nobody does the work itself."""
    kind, command = caller
    agent = await fleet.start()
    await busy(agent)
    async with started(ring, *command, agent.workspace, 'say "hello"') as program:
        queue_id = queue_id_in(await program.says(kind.kept))
        assert not agent.received
        free(agent)
        last = await program.ends()
    assert last.startswith(kind.completed)
    assert queue_id in last or kind is SEED
    assert "hello" in last
    assert [(each.text, each.queue_id) for each in agent.received] == [('say "hello"', queue_id)]
    assert json.loads(agent.received[0].body)["method"] == kind.method


async def test_what_curl_cancels_never_reaches_the_agent(ring: Ready, fleet: Fleet, lead: Caller) -> None:
    need_curl()
    agent = await fleet.start()
    await busy(agent)
    async with started(ring, *CURL.command(), agent.workspace, "never mind") as sender:
        queue_id = queue_id_in(await sender.says(CURL.kept))
        async with started(ring, str(CALLERS / "curl.sh"), "cancel", queue_id) as program:
            assert '"status": "canceled"' in await program.ends()
        assert '"status": "canceled"' in await sender.ends()
    async with started(ring, str(CALLERS / "curl.sh"), "poll", queue_id) as program:
        assert '"status": "canceled"' in await program.ends()
    free(agent)
    reply = await lead.send(agent.workspace, "after", prefer="wait=10")
    assert reply.status == 200
    assert [each.text for each in agent.received] == ["after"]


@pytest.mark.parametrize("kind", [SEED, SDK_10, SDK_03], ids=lambda kind: kind.name)
async def test_the_plain_agent_answers_callers_of_both_versions(kind: Kind, open_ring: Ready) -> None:
    """It speaks 0.3 alone, and its card through Bide says so: the SDK of 1.0 then speaks 0.3 to it."""
    name, command = f"plain-{uuid4().hex[:8]}", kind.command()
    async with started(open_ring, sys.executable, str(PLAIN), name, "0.1") as agent:
        await agent.says("registered")
        async with started(open_ring, *command, name, "hello") as program:
            assert await program.ends() == "answered: you said: hello"
        assert (await agent.says("working on")).endswith(": hello")


async def test_the_plain_agent_refuses_when_busy_and_bide_keeps_what_it_refused(
    open_ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    name = f"plain-{uuid4().hex[:8]}"
    # It says that it takes two at a time and takes one, and so Bide does not keep the second by itself.
    program = tmp_path / "plain.py"
    program.write_text(PLAIN.read_text().replace('"max_concurrent_tasks": 1', '"max_concurrent_tasks": 2'))
    async with started(open_ring, sys.executable, str(program), name, "15") as agent:
        url = (await agent.says("registered")).split()[-1]
        told = await lead.call("POST", "/registry/register", {"id": name, "url": url, "max_concurrent_tasks": 2})
        async with started(open_ring, *SEED.command(), name, "one") as one:
            await agent.says("working on")
            async with started(open_ring, *SEED.command(), name, "two") as two:
                queue_id = queue_id_in(await two.says(SEED.kept))
                assert await agent.says("refused") == f"refused {queue_id}: busy"
                busy_reply = await shown(url, told.json["delivery_token"], "three", queue_id="q3")
                assert await one.ends() == "answered: you said: one"
                assert await two.ends() == "completed: you said: two"
        assert await agent.says("working on") == f"working on {queue_id}: two"
        assert busy_reply.status == 503
        assert busy_reply.headers["retry-after"] == "1"
        assert busy_reply.json()["error"]["data"] == {"code": "busy"}


async def test_the_plain_agent_knows_its_callers_and_what_it_has_answered(ring: Ready, lead: Caller) -> None:
    name = f"plain-{uuid4().hex[:8]}"
    async with started(ring, sys.executable, str(PLAIN), name, "0") as agent:
        url = (await agent.says("registered")).split()[-1]
        told = await lead.call("POST", "/registry/register", {"id": name, "url": url})
        token = told.json["delivery_token"]
        stranger = await shown(url, "guessed", "hello", queue_id="q1")
        first, again = [await shown(url, token, "hello", queue_id="q1") for _ in range(2)]
        assert (stranger.status, first.status) == (401, 200)
        assert first.json()["result"] == again.json()["result"]
        await agent.says("registered")  # its own token was void since the second registration
        assert sum(line.startswith("working on") for line in agent.lines) == 1


async def shown(url: str, token: str, text: str, *, queue_id: str) -> client.Reply:
    """A message for an agent, delivered as Bide would."""
    message = {"role": "user", "messageId": str(uuid4()), "parts": [{"kind": "text", "text": text}]}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}).encode()
    return await client.request("POST", url, body, headers={"authorization": f"Bearer {token}", "x-queue-id": queue_id})
