"""examples/agents, run as a newcomer runs them: a handler, a command, an SDK's executor, each behind the real stack."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import until
from tests.e2e.conftest import ROOT, Caller, Ready
from tests.e2e.test_examples import AGENTS, SDK_03, SDK_10, SEED, Kind, Program, sdk_python, started

pytestmark = pytest.mark.timeout(600)  # the first run fetches two SDKs
URI = "urn:bide:queue:1"
LOUD = "tr a-z A-Z"


def command_of(agent: str, name: str, *, work_s: float = 0.1) -> Sequence[str]:
    if agent == "command.sh":
        return (str(AGENTS / agent), name, "sh", "-c", f"sleep {work_s}; {LOUD}")
    python = str(sdk_python("1.0")) if agent == "executor.py" else sys.executable
    return (python, str(AGENTS / agent), name, str(work_s))


@asynccontextmanager
async def serving(
    ring: Ready, lead: Caller, folder: Path, agent: str, **options: float
) -> AsyncIterator[tuple[str, Program]]:
    """One of the examples, once Bide knows it."""
    name = f"x-{uuid4().hex[:8]}"
    environ = {"PYTHONPATH": str(ROOT), "BIDE_AGENT_STATE": str(folder), "PYTHON": sys.executable}
    async with started(ring, *command_of(agent, name, **options), **environ) as program:
        await program.says('{"workspace"')

        async def is_known() -> bool:
            return (await lead.call("GET", f"/workspaces/{name}")).status == 200

        await until(is_known)
        yield name, program


AGENTS_OF_OURS = ("handler.py", "command.sh", "executor.py")


@pytest.mark.parametrize("agent", AGENTS_OF_OURS)
@pytest.mark.parametrize("kind", [SEED, SDK_10, SDK_03], ids=lambda kind: kind.name)
async def test_an_example_answers_callers_of_every_version(
    agent: str, kind: Kind, ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    command = kind.command()
    async with (
        serving(ring, lead, tmp_path, agent) as (name, _),
        started(ring, *command, name, "hello there") as program,
    ):
        last = await program.ends()
    assert last.split(" ", 1)[-1].rstrip().endswith("HELLO THERE"), last


@pytest.mark.parametrize("agent", AGENTS_OF_OURS)
async def test_an_example_streams(agent: str, ring: Ready, lead: Caller, tmp_path: Path) -> None:
    message = {"role": "user", "messageId": uuid4().hex, "parts": [{"kind": "text", "text": "one two"}]}
    body = {"jsonrpc": "2.0", "id": 1, "method": "message/stream", "params": {"message": message}}
    async with serving(ring, lead, tmp_path, agent) as (name, _):
        reply = await lead.call("POST", f"/workspaces/{name}/a2a", body)
    events = [json.loads(line[5:])["result"] for line in reply.body.decode().splitlines() if line.startswith("data:")]
    texts = [part["text"] for one in events if "artifact" in one for part in one["artifact"]["parts"]]
    assert "".join(texts).strip() == "ONE TWO"
    assert events[-1]["status"]["state"] == "completed"
    assert len(texts) == (2 if agent == "executor.py" else 1), "as it comes"


@pytest.mark.parametrize("agent", ["handler.py", "executor.py"])
async def test_an_example_answers_in_part_when_it_is_asked_to_save(
    agent: str, ring: Ready, lead: Caller, tmp_path: Path
) -> None:
    """An operator asks; the next step is not begun."""
    async with serving(ring, lead, tmp_path, agent, work_s=0.5) as (name, _):
        sent = asyncio.create_task(lead.send(name, " ".join(f"w{number}" for number in range(200)), prefer="wait=60"))

        async def is_asked() -> bool:
            await lead.call("POST", f"/workspaces/{name}/checkpoint", {"reason": "a trial"})
            return sent.done()

        await until(is_asked, within_s=60)
        reply = await sent
    assert reply.status == 200, reply.body
    text = "".join(part["text"] for one in reply.json["result"]["artifacts"] for part in one["parts"])
    print(f"{agent}: {text}")
    assert reply.json["result"]["metadata"][URI]["checkpointed"] is True
    assert text.split() == [f"W{number}" for number in range(len(text.split()))]
    assert 1 <= len(text.split()) < 200


async def test_the_readme_agent_is_fifteen_lines_and_runs(ring: Ready, lead: Caller, tmp_path: Path) -> None:
    """README, "An agent of your own": what stands there is what is run."""
    readme = (ROOT / "README.md").read_text()
    code = readme.partition("# my_agent.py\n")[2].partition("```")[0]
    assert 5 < len(code.splitlines()) <= 15
    name = f"x-{uuid4().hex[:8]}"
    (tmp_path / "my_agent.py").write_text(code.replace('"mine"', f'"{name}"'))
    environ = {"PYTHONPATH": str(ROOT), "BIDE_AGENT_STATE": str(tmp_path / "state")}
    async with started(ring, sys.executable, str(tmp_path / "my_agent.py"), **environ) as program:
        await program.says('{"workspace"')

        async def answers() -> bool:
            reply = await lead.send(name, "hello", prefer="wait=10")
            return reply.status == 200 and "HELLO" in reply.body.decode()

        await until(answers)


@pytest.mark.parametrize("version", ["0.3", "1.0"])
async def test_an_executor_of_either_sdk_is_a_handler(version: str) -> None:
    """Messages, artifacts, questions, failures, exceptions, a stop: as the SDK's own server would tell them."""
    trial = ROOT / "tests/e2e/sdk_trial.py"
    process = await asyncio.create_subprocess_exec(
        str(sdk_python(version)), str(trial), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    said = json.loads(out)
    print(f"a2a-sdk {version}: {said}")
    assert said == {
        "message": ["completed", "a message"],
        "fail": ["failed", "no such file"],
        "raise": [-32603, "The agent failed: ValueError."],
        "exit": [-32603, "The agent failed: RuntimeError."],
        "ask": ["input-required", "which one?"],
        "work": ["completed", "one two"],
        "stay": ["canceled", "one "],
        "canceled": [True, 0],
    }
