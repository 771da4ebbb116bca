"""The command line of `bide-agent`, which `python -m bide_agent run` and `check` are too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bide_agent import cli
from bide_agent.client import request
from bide_agent.runner.group import Child, start
from bide_agent.runtime.options import Options

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--workspace", "w1"], "no command"),
        (["run", "--workspace", "w1", "--", "no-such-program"], "there is no program no-such-program"),
        (["run", "--workspace", "w1", "--checkpoint-signal", "LUNCH", "--", "cat"], "there is no signal LUNCH"),
        (["run", "--workspace", "w1", "--exit", "3=tired", "--", "cat"], "'3=tired' is no CODE=STATE"),
        (
            ["run", "--workspace", "w1", "--max-concurrent", "2", "--checkpoint-file", "save", "--", "cat"],
            "as in save-{task}.json",
        ),
        (["run", "--", "cat"], "--workspace"),
        ([], "verb"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_console_script_is_this_command_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"bide-agent": f"{cli.__name__}:{cli.main.__name__}"}


def test_state_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BIDE_AGENT_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Options(workspace="w1").folder == tmp_path / "bide-agent/w1"
    monkeypatch.setenv("BIDE_AGENT_STATE", str(tmp_path / "own"))
    assert Options(workspace="w1").folder == tmp_path / "own/w1"
    assert Options(workspace="w1", state_dir=tmp_path).folder == tmp_path / "w1"


def test_a_program_named_by_a_relative_path_is_found_from_its_working_directory_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(cli, "serve", lambda handle, **_: served.append(handle.arguments))
    monkeypatch.setattr(cli, "adopt_orphans", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.sh").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "mine.sh").chmod(0o755)
    for command in (["./mine.sh", "./word"], ["cat", "-"]):
        assert cli.main(["run", "--workspace", "w1", "--", *command]) == 0
    assert served == [[str(tmp_path / "mine.sh"), "./word"], ["cat", "-"]]


def test_a_command_sees_the_token_under_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """README has it in TOKEN; a command may be a model that looks around."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(cli, "serve", lambda *_, **__: seen.update(os.environ))
    monkeypatch.setattr(cli, "adopt_orphans", lambda: None)
    for name, said in (("TOKEN", "secret"), ("BIDE_TOKEN", "secret"), ("OTHER", "kept")):
        monkeypatch.setenv(name, said)
    assert cli.main(["run", "--workspace", "w1", "--", "cat"]) == 0
    assert (seen["OTHER"], "secret" in seen.values()) == ("kept", False)


@asynccontextmanager
async def program(folder: Path, *words: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`python -m bide_agent run`, and where it serves."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bide_agent", "run", "--workspace", "w1", "--state-dir", str(folder), *words,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, json.loads(await process.stdout.readline())["url"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_command_is_an_agent_until_it_is_told_to_end(tmp_path: Path) -> None:
    part = {"kind": "text", "text": "tac"}
    message = {"role": "user", "messageId": "m", "parts": [part]}
    body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
    async with program(tmp_path, "--", "rev") as (process, url):
        reply = await request("POST", url, json.dumps(body).encode())
        assert reply.json()["result"]["artifacts"][0]["parts"][0]["text"].strip() == "cat"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_taken_port_is_said_and_not_traced(tmp_path: Path) -> None:
    async with program(tmp_path, "--", "cat") as (_, url):
        port = url.rpartition(":")[2]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bide_agent", "run", "--workspace", "w2", "--port", port, "--", "cat",
            cwd=ROOT, stderr=asyncio.subprocess.PIPE, env={**os.environ, "BIDE_AGENT_STATE": str(tmp_path)},
        )  # fmt: skip
        _, said = await process.communicate()
    assert (process.returncode, said.decode()[:11]) == (1, "bide-agent:")


async def test_a_group_that_is_gone_is_not_stopped_again(tmp_path: Path) -> None:
    def ignore(_: bytes) -> None: ...

    child: Child = await start(
        ["true"], folder=tmp_path, environ={"OF": "it"}, stdin=False, on_output=ignore, on_error=ignore, mark="OF"
    )
    await child.exited.wait()
    await child.stop(0)
    assert child.code == 0
    child.close()
