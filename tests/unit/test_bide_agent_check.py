"""The conformance checker: what it says of agents that keep the protocol, and of those that do not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bide_agent import Message, Options, Session, hosted, running
from bide_agent.check.checks import CHECKS
from bide_agent.check.program import Wanted, check
from bide_agent.check.trial import Verdict
from bide_agent.server import listen

ROOT = Path(__file__).parents[2]
TOKEN = "enrol"
TURN_S = 0.8


@pytest.fixture(autouse=True)
def shorter_turns_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("turns", "orders"):
        monkeypatch.setattr(f"bide_agent.check.{room}.LONG_ENOUGH_S", 0.5)


async def careful(message: Message, session: Session) -> str:
    """A turn of less than a second, with a tool boundary every few hundredths."""
    loop = asyncio.get_running_loop()
    until = loop.time() + TURN_S
    while loop.time() < until:
        await session.checkpoint("as far as I came")
        await asyncio.sleep(0.02)
    return f"done {message.text[:4]}"


def free_port() -> int:
    with listen(0) as taken:
        return int(taken.getsockname()[1])


async def findings(agent: Any) -> dict[str, tuple[Verdict, str]]:
    """Start an agent at a port, and check it."""
    port = free_port()
    told: list[str] = []
    async with agent(f"http://127.0.0.1:{port}"):
        found = await check(Wanted(port=port, token=TOKEN), told.append)
    for line in told:
        print(line)
    return {one.name: (one.verdict, one.reason) for one in found}


async def test_an_agent_of_the_runtime_passes_every_check(tmp_path: Path) -> None:
    def agent(bide: str) -> Any:
        return hosted(
            careful, workspace="w1", bide=bide, token=TOKEN, state_dir=tmp_path, heartbeat_s=0.2, max_concurrent=2
        )

    found = await findings(agent)
    assert list(found) == list(CHECKS)
    assert {name: reason for name, (verdict, reason) in found.items() if verdict is not Verdict.PASS} == {}
    assert "checkpointed" in found["checkpoint"][1]


async def test_an_agent_that_breaks_the_protocol_is_told_where() -> None:
    """The small agent dedupes nothing; the rest it was asked for."""

    def agent(bide: str) -> Any:
        behaviour = {"check_token": False, "always_zero": True, "stop": "ignore", "checkpoint": "ignore"}
        return running(
            Options(workspace="w1", bide=bide, token=TOKEN, heartbeat_s=0.2, work_s=TURN_S, behaviour=behaviour)
        )

    found = await findings(agent)
    wrong = {name for name, (verdict, _) in found.items() if verdict is Verdict.FAIL}
    assert wrong == {"callers", "active_tasks", "dedupe, answered", "stop", "cancel"}
    assert "ran again" in found["dedupe, answered"][1]
    assert found["checkpoint"][0] is Verdict.SKIP
    assert "ignored" in found["checkpoint"][1]


@pytest.mark.parametrize("always_zero", [False, True])
async def test_a_second_turn_for_one_message_is_seen_where_there_is_room_for_it(*, always_zero: bool) -> None:
    def agent(bide: str) -> Any:
        behaviour = {"always_zero": always_zero}
        return running(
            Options(
                workspace="w1", bide=bide, token=TOKEN, heartbeat_s=0.2, work_s=TURN_S, max_concurrent=2,
                behaviour=behaviour,
            )
        )  # fmt: skip

    verdict, reason = (await findings(agent))["dedupe, running"]
    assert (verdict, "ran twice" in reason) == (Verdict.FAIL, True), reason


async def test_a_deaf_agent_with_bare_refusals_is_told_so() -> None:
    def agent(bide: str) -> Any:
        behaviour = {"deaf": True, "failing_rpc": True}
        return running(
            Options(workspace="w1", bide=bide, token=TOKEN, heartbeat_s=0.1, work_s=0.0, behaviour=behaviour)
        )

    found = await findings(agent)
    assert found["heartbeat cadence"][0] is found["answer"][0] is Verdict.FAIL
    assert {found[name][0] for name in ("busy answer", "checkpoint", "stop")} == {Verdict.SKIP}


@pytest.mark.parametrize(("command", "code"), [((), 2), (("sh", "-c", "exit 0"), 2), (("no-such-program",), 2)])
def test_without_an_agent_there_is_nothing_to_say(command: tuple[str, ...], code: int) -> None:
    words = ["check", "--register-s", "0.2", *(("--", *command) if command else ())]
    done = subprocess.run(
        [sys.executable, "-m", "bide_agent", *words], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done
    if not command:
        assert "BIDE_URL=http://127.0.0.1:" in done.stdout


def test_a_command_is_started_and_checked(tmp_path: Path) -> None:
    words = ["check", "--", sys.executable, "-m", "bide_agent", "run", "--workspace", "w1", "--heartbeat-s", "0.2"]
    script = ["--checkpoint-signal", "TERM", "--", "sh", "-c", "cat > /dev/null; sleep 1.2; echo done"]
    environ = {**os.environ, "BIDE_AGENT_STATE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "bide_agent", *words, *script],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environ,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
