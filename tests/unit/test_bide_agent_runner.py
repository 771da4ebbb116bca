"""Any command as an agent: what it writes, how long it may, how it ends, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bide_agent import Host
from bide_agent.runner.command import Command, Limits, Saving
from bide_agent.runner.descent import PROC
from bide_agent.runner.group import adopt_orphans, kin
from bide_agent.runner.output import Output
from bide_agent.runtime.turns import Turn
from tests.unit.runtime_kit import URI, alone, direct, events, send, task_of, text_in, text_of

KB, MB = 1024, 1024 * 1024
needs_proc = pytest.mark.skipif(not PROC.exists(), reason="who descends from whom is read from /proc")
QUICK = Limits(inactivity_s=20.0, stop_grace_s=0.3)


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-u", "-c", program, *arguments]


@asynccontextmanager
async def running(
    state_dir: Path, *command: str, limits: Limits = QUICK, max_concurrent: int = 1, **options: Any
) -> AsyncIterator[Host]:
    handler = Command(arguments=command, limits=limits, **options)
    async with alone(handler, state_dir, max_concurrent=max_concurrent) as host:
        yield host


async def said(state_dir: Path, *command: str, text: str = "hello", **options: Any) -> dict[str, Any]:
    """The Task that one message to a command comes to."""
    async with running(state_dir, *command, **options) as host:
        return task_of(await send(host, text))


def note(task: dict[str, Any]) -> str:
    return str(task["status"]["message"]["parts"][0]["text"])


@pytest.mark.parametrize("size", [80 * KB, 10 * MB])
@pytest.mark.parametrize("stream", [1, 2])
async def test_a_burst_into_a_pipe_by_a_child_that_never_reads_stdin_stops_nobody(
    tmp_path: Path, size: int, stream: int
) -> None:
    """A-A-01: the original waited for the child, and the child for somebody to read what is over 64 KB."""
    burst = f"import os; left = {size}\nwhile left: left -= os.write({stream}, b'x' * min(left, 65536))\nprint('end')"
    async with asyncio.timeout(60):
        task = await said(tmp_path, *python(burst), text="p" * 300 * KB)  # more than a pipe holds, unread
    text = task["artifacts"][0]["parts"][0]["text"]
    assert task["status"]["state"] == "completed"
    assert text.endswith("end\n")
    print(f"{size} bytes on {stream}: {len(text)} characters of answer")
    if stream == 1 and size == 80 * KB:
        assert text == "x" * size + "end\n"
    assert len(text) <= MB + 100
    assert ("left out" in text) == (stream == 1 and size == 10 * MB)


@pytest.mark.parametrize("chars_max", [0, 8, 100, 10_000])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_output_is_whole_up_to_its_bound_and_then_its_two_ends(chars_max: int, size: int) -> None:
    output, text = Output(chars_max), "".join(chr(0x4E00 + number % 5000) for number in range(9000))
    raw = text.encode()
    told = "".join(output.feed(raw[at : at + size]) for at in range(0, len(raw), size)) + output.rest()
    if chars_max >= len(text):
        assert told == text
        return
    head, mark, tail = told.split("\n")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert (len(head) + len(tail), mark) == (chars_max, f"[… {len(text) - chars_max} characters left out …]")


async def test_the_prompt_comes_by_stdin_which_is_closed(tmp_path: Path) -> None:
    task = await said(tmp_path, "cat", text="über\n")
    assert task["artifacts"][0]["parts"] == [{"kind": "text", "text": "über\n"}]


async def test_the_prompt_comes_by_argument_where_one_asks_for_it(tmp_path: Path) -> None:
    """A-Q-06: a NUL, which no argument can hold, ends nobody."""
    program = "import sys; print(sys.argv[1:], sys.stdin.read())"
    task = await said(tmp_path, *python(program, "--ask={prompt}", "{prompt}"), text="a\0b")
    assert task["artifacts"][0]["parts"][0]["text"] == "['--ask=a�b', 'a�b'] \n"


async def test_output_is_told_as_it_comes(tmp_path: Path) -> None:
    program = "import sys, time\nprint('one')\nwhile not open('go').read(): time.sleep(0.01)\nprint('two')"
    (tmp_path / "work").mkdir()
    (tmp_path / "work/go").touch()
    async with running(tmp_path, *python(program), folder=tmp_path / "work") as host:
        sent = asyncio.create_task(send(host, method="message/stream", queue_id="q-1"))
        await printed(host)
        first = await send(host, queue_id="q-1", params={"configuration": {"blocking": False}})
        assert (task_of(first)["status"]["state"], text_of(first)) == ("working", "one\n")
        (tmp_path / "work/go").write_text("go")
        said = events(await sent)
        texts = [one["artifact"]["parts"][0]["text"] for one in said if one["kind"] == "artifact-update"]
        assert text_in(said[0]) + "".join(texts) == "one\ntwo\n"
        assert said[-1]["status"]["state"] == "completed"


async def test_a_silent_command_is_stopped(tmp_path: Path) -> None:
    """A-A-02: 48 minutes without a word; here the bound is a second, by default 90."""
    limits = Limits(inactivity_s=0.5, stop_grace_s=0.2)
    task = await said(tmp_path, *python("import time; print('thinking', flush=True); time.sleep(60)"), limits=limits)
    assert (task["status"]["state"], note(task)) == ("failed", "Stopped: the command wrote nothing for 0.5 s.")
    assert text_of_task(task) == "thinking\n", "what there is of an answer is kept"
    assert Limits().inactivity_s == 90


async def test_a_command_that_talks_for_too_long_is_stopped(tmp_path: Path) -> None:
    limits = Limits(inactivity_s=0.5, wall_s=1.2, stop_grace_s=0.2)
    chatter = "import sys, time\nwhile True: print('.', flush=True, file=sys.stderr); time.sleep(0.05)"
    task = await said(tmp_path, *python(chatter), limits=limits)
    assert (task["status"]["state"], note(task)[:20]) == ("failed", "Stopped after 1.2 s,")


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
children = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) for _ in range(2)]
for child in children: child.stdout.readline()
print(os.getpid(), *(child.pid for child in children), flush=True)
time.sleep(600)
"""


def lives(pid: int) -> bool:
    """Also as a zombie: nobody has waited for it."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.usefixtures("adopting")
async def test_a_stop_ends_a_child_that_ignores_sigterm_and_its_grandchildren(tmp_path: Path) -> None:
    async with running(tmp_path, *python(STUBBORN)) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1", method="message/stream"))
        pids = [int(word) for word in (await printed(host)).split()]
        assert await direct(host, "stop") == (200, "stopping")
        last = events(await sent)[-1]
    assert last["status"]["state"] == "canceled"
    assert len(pids) == 3
    print(f"stopped {pids}, left: {[pid for pid in pids if lives(pid)]}")
    assert not [pid for pid in pids if lives(pid)]


RUNAWAY = """
import os, signal, subprocess, sys, time
deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
gone = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)]
fork = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
gone += [subprocess.Popen([sys.executable, "-c", fork, deaf], stdout=subprocess.PIPE, start_new_session=True)]
print(os.getpid(), *(int(one.stdout.readline()) for one in gone), flush=True)
if sys.stdin.read() == "stays": signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1:] != ["ends"]: time.sleep(600)
"""
"""It starts one process that leaves its group, and one that leaves its parents too. Prints its pid and theirs."""


@needs_proc
@pytest.mark.usefixtures("adopting")
@pytest.mark.parametrize("text", ["goes", "stays"])
async def test_a_stop_ends_what_left_the_group_and_leaves_other_turns_alone(tmp_path: Path, text: str) -> None:
    """A daemon of a stopped turn went on for ever."""
    async with running(tmp_path, *python(RUNAWAY), max_concurrent=2) as host:
        stopped = asyncio.create_task(send(host, text, queue_id="q-1"))
        other = asyncio.create_task(send(host, text, queue_id="q-2", x_bide_session="q-2:1"))
        pids = {name: [int(word) for word in (await printed(host, name)).split()] for name in ("q-1", "q-2")}
        assert await direct(host, "stop") == (200, "stopping")
        assert task_of(await stopped)["status"]["state"] == "canceled"
        left = {name: [pid for pid in some if lives(pid)] for name, some in pids.items()}
        print(f"of {pids} are left {left}")
        assert left == {"q-1": [], "q-2": pids["q-2"]}
        assert [len(some) for some in pids.values()] == [3, 3]
        other.cancel()
    assert not [pid for pid in pids["q-2"] if lives(pid)], "the agent's end is a stop too"


@needs_proc
@pytest.mark.usefixtures("adopting")
async def test_what_a_command_has_put_into_a_session_of_its_own_stays_when_it_ends_by_itself(tmp_path: Path) -> None:
    """A server that the next turn wants. No later turn's stop is about it."""
    async with running(tmp_path, *python(RUNAWAY, "ends")) as host:
        pids = [int(word) for word in text_of(await send(host)).split()]
    assert [lives(pid) for pid in pids] == [False, True, True]
    for pid in pids[1:]:
        os.kill(pid, 9)
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it has been killed


async def printed(host: Host, queue_id: str | None = None) -> str:
    """What a running command has said, once that is a line: python -u writes word by word."""
    await host.until(lambda: bool(_of(host, queue_id)))
    (turn,) = _of(host, queue_id)
    while not (turn.parts and turn.parts[0]["text"].endswith("\n")) and not turn.ended.is_set():
        await turn.more_than(len(turn.chunks))
    return str(turn.parts[0]["text"])


def _of(host: Host, queue_id: str | None) -> list[Turn]:
    return [turn for turn in host._work.turns.running if queue_id in {None, turn.queue_id}]


@pytest.fixture
def adopting() -> Iterator[None]:
    """Reaped by this process, as by the runner's; other tests have children of their own."""
    adopt_orphans()
    yield
    kin.adopts = False


@pytest.mark.usefixtures("adopting")
async def test_a_grandchild_that_left_the_group_is_no_zombie_when_it_ends(tmp_path: Path) -> None:
    """It was one for as long as the agent lived, one more with each turn."""
    leaves = "import os, subprocess\nleft = subprocess.Popen(['sleep', '0.2'], start_new_session=True, stdout=2)"
    async with running(tmp_path, *python(f"{leaves}\nprint(left.pid)")) as host:
        pid = int(text_of(await send(host)))
        async with asyncio.timeout(20):
            while lives(pid):
                await send(host)


@pytest.mark.usefixtures("adopting")
async def test_what_a_child_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """A grandchild that holds the output open would be waited for for ever."""
    leaves = (
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\nprint(left.pid)"
    )
    async with asyncio.timeout(30):
        task = await said(tmp_path, *python(leaves))
    assert task["status"]["state"] == "completed"
    assert not lives(int(text_of_task(task)))


def text_of_task(task: dict[str, Any]) -> str:
    return "".join(part["text"] for artifact in task["artifacts"] for part in artifact["parts"])


@pytest.mark.parametrize(
    ("code", "state"), [(0, "completed"), (1, "failed"), (3, "input-required"), (4, "completed"), (127, "failed")]
)
async def test_an_exit_code_is_a_state(tmp_path: Path, code: int, state: str) -> None:
    program = f"import sys; print('which file?'); print('because', file=sys.stderr); sys.exit({code})"
    task = await said(tmp_path, *python(program), exits={3: "input-required", 4: "completed"})
    assert task["status"]["state"] == state
    assert text_of_task(task) == "which file?\n"
    if state == "failed":
        assert note(task) == f"The command ended with exit code {code}.\nbecause"


async def test_a_command_may_ask_to_be_tried_again(tmp_path: Path) -> None:
    async with running(tmp_path, *python("import sys; sys.exit(75)")) as host:
        error = (await send(host)).json()["error"]
    assert (error["code"], "data" in error) == (-32603, False)


async def test_a_command_that_a_signal_ends_has_failed(tmp_path: Path) -> None:
    task = await said(tmp_path, *python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert (task["status"]["state"], note(task)) == ("failed", "The command ended with signal SIGKILL.")


async def test_a_signal_without_a_name_is_a_failure_like_another(tmp_path: Path) -> None:
    task = await said(tmp_path, *python("import os; os.kill(os.getpid(), 40)"))
    assert note(task) == "The command ended with signal 40."


async def test_a_prompt_too_long_for_an_argument_fails_with_a_sentence(tmp_path: Path) -> None:
    task = await said(tmp_path, "echo", "{prompt}", text="x" * MB)
    assert (task["status"]["state"], "by stdin" in note(task)) == ("failed", True)


async def test_each_conversation_has_a_working_directory_of_its_own(tmp_path: Path) -> None:
    """A new contextId is a new session: it finds nothing of the last one."""
    async with running(tmp_path, "sh", "-c", "ls; touch seen; echo $BIDE_WORKSPACE $BIDE_RESUMED") as host:
        texts = [text_of(await send(host, context_id=context)) for context in ("c-1", "c-1", "c-2", "../../c-3")]
    assert texts == ["w1 0\n", "seen\nw1 0\n", "w1 0\n", "w1 0\n"]
    assert len(list((tmp_path / "w1/sessions").iterdir())) == 3


async def test_a_command_does_not_see_the_runners_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIDE_TOKEN", "secret")
    assert "secret" not in text_of_task(await said(tmp_path, "env"))


SAVES = {
    "signal": (
        "import signal, sys, time\ndef save(*_): print('half', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGUSR1, save); print('begun', flush=True); time.sleep(600)"
    ),
    "file": (
        "import json, os, time\nprint('begun', flush=True)\nname = os.environ['BIDE_CHECKPOINT_FILE']\n"
        "while not os.path.exists(name) or not open(name).read(): time.sleep(0.01)\n"
        "assert json.load(open(name))['reason']; os.remove(name); print('half')"
    ),
    "stdin": "print('begun', flush=True)\nassert input() == 'hello' and input() == 'save'; print('half')",
}
WAYS = {"signal": Saving(signal=10), "file": Saving(file="save.json"), "stdin": Saving(stdin="save")}


@pytest.mark.parametrize("way", SAVES)
async def test_a_command_that_is_asked_to_save_and_end_answers_in_part(tmp_path: Path, way: str) -> None:
    async with running(tmp_path, *python(SAVES[way]), saving=WAYS[way]) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await printed(host)
        assert await direct(host, "checkpoint", "ceiling", deadline="2026-11-29T12:00:00Z") == (200, "asked")
        reply = await sent
    assert text_of(reply) == "begun\nhalf\n"
    assert task_of(reply)["metadata"][URI] == {"checkpointed": True, "reason": "ceiling"}


async def test_turns_that_share_a_directory_are_asked_to_save_each_for_itself(tmp_path: Path) -> None:
    """One file for both asked whoever looked first, and was removed by whoever began next."""
    program = "import os; print(os.environ['BIDE_CHECKPOINT_FILE'], flush=True)\n" + SAVES["file"]
    saving = Saving(file="save-{task}.json")
    async with running(tmp_path, *python(program), saving=saving, folder=tmp_path / "work", max_concurrent=2) as host:
        first = asyncio.create_task(send(host, queue_id="q-1"))
        second = asyncio.create_task(send(host, queue_id="q-2", x_bide_session="q-2:1"))
        names = {(await printed(host, queue_id)).split()[0] for queue_id in ("q-1", "q-2")}
        await direct(host, "checkpoint", "ceiling", session_id="q-2:1")
        assert text_of(await second).endswith("half\n")
        assert (len(names), host.active) == (2, 1), "the other one was not asked"
        await direct(host, "checkpoint", "ceiling", id="another")
        assert text_of(await first).endswith("half\n")


@pytest.mark.parametrize("shared", [False, True])
async def test_a_file_that_asked_one_turn_to_save_asks_not_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    """Nor where the state directory or `--workdir` is a relative one."""
    monkeypatch.chdir(tmp_path)
    program = (
        "echo begun; if [ -e $BIDE_CHECKPOINT_FILE ]; then echo asked at once; exit; fi\n"
        "[ $BIDE_DELIVERY = 2 ] && exit; until [ -s $BIDE_CHECKPOINT_FILE ]; do sleep 0.02; done"
    )
    folder = Path("work") if shared else None
    async with running(Path("state"), "sh", "-c", program, saving=WAYS["file"], folder=folder) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1", context_id="c-1"))
        await printed(host)
        await direct(host, "checkpoint", "critical_waiting")
        assert (await sent).json()["error"]["data"] == {"code": "preempted"}
        again = await send(host, queue_id="q-1", context_id="c-1", x_bide_session="q-1:2", x_bide_delivery="2")
    assert text_of(again) == "begun\n"


@pytest.mark.parametrize(("is_kept", "said"), [(True, "so far\n"), (False, "begun\n")])
async def test_a_command_that_made_room_is_run_again_where_it_was(tmp_path: Path, said: str, *, is_kept: bool) -> None:
    """A tick's second delivery may have another contextId, and is the same message. Old directories are removed."""
    program = "if [ $BIDE_RESUMED = 1 ]; then cat notes; else trap 'echo so far > notes; exit 0' USR1; echo begun; "
    program += "[ $BIDE_DELIVERY = 2 ] && exit; while :; do sleep 0.02; done; fi"
    async with running(tmp_path, "sh", "-c", program, saving=WAYS["signal"]) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1", context_id="c-1"))
        await printed(host)
        await direct(host, "checkpoint", "critical_waiting")
        assert (await sent).json()["error"]["data"] == {"code": "preempted"}
        if not is_kept:
            shutil.rmtree(tmp_path / "w1/sessions")
        again = await send(host, queue_id="q-1", context_id="c-2", x_bide_session="q-1:2", x_bide_delivery="2")
    assert text_of(again) == said
