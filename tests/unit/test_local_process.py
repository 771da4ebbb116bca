"""Processes are known by pid and start time, and end with all they started."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local.process import Child, Command
from shared.processes import Mark, end, family, is_alive, kill, mark_of, parse_stat, send, wait_gone

STAT_TAIL = "1 77 70 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 123456 1000 200"
PARENT = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
print(child.pid, flush=True)
signal.pause()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"


def command(tmp_path: Path, code: str) -> Command:
    argv = [sys.executable, "-c", code]
    return Command(name="one", argv=argv, env=os.environ, cwd=tmp_path, log=tmp_path / "log")


def first_line(child: Child) -> str:
    while not (text := child.command.log.read_text()).endswith("\n"):
        assert child.exit_code() is None
    return text.strip()


@pytest.mark.parametrize("name", ["sh", "a b", "x) R 1 (", "(sd-pam)"])
def test_a_stat_line_is_read_whatever_the_name(name: str) -> None:
    stat = parse_stat(f"42 ({name}) S {STAT_TAIL}")
    assert (stat.pid, stat.state, stat.parent, stat.session, stat.start_ticks) == (42, "S", 1, 70, 123456)


def test_our_own_mark_is_alive_and_one_with_another_start_time_is_not() -> None:
    mark = mark_of(os.getpid())
    assert mark is not None
    assert is_alive(mark)
    assert not is_alive(replace(mark, start_ticks=mark.start_ticks + 1))


def test_a_stranger_with_a_reused_pid_is_not_signalled() -> None:
    mark = mark_of(os.getpid())
    assert mark is not None
    assert send(replace(mark, start_ticks=mark.start_ticks - 1), signal.SIGKILL) is False


def test_a_pid_that_never_was_has_ended() -> None:
    assert mark_of(2**22 + 1) is None
    assert wait_gone([Mark(2**22 + 1, 1)], limit_s=0) == []


def test_a_child_ends_with_what_it_started_even_in_another_session(tmp_path: Path) -> None:
    child = Child(command(tmp_path, PARENT))
    grandchild = mark_of(int(first_line(child)))
    assert grandchild is not None
    assert family([child.mark]) == [child.mark, grandchild]
    end({child.mark: signal.SIGTERM}, limit_s=5)
    assert child.exit_code() == -signal.SIGTERM
    assert not is_alive(grandchild)
    child.close()


def test_one_that_does_not_hear_its_stop_signal_is_killed_after_the_limit(tmp_path: Path) -> None:
    child = Child(command(tmp_path, DEAF))
    assert first_line(child) == "deaf"
    end({child.mark: signal.SIGTERM}, limit_s=0.1)
    assert child.exit_code() == -signal.SIGKILL
    child.close()


def test_a_frozen_one_still_ends_in_good_order(tmp_path: Path) -> None:
    child = Child(command(tmp_path, "print('up', flush=True); import signal; signal.pause()"))
    first_line(child)
    send(child.mark, signal.SIGSTOP)
    end({child.mark: signal.SIGTERM}, limit_s=5)
    assert child.exit_code() == -signal.SIGTERM
    child.close()


def test_to_kill_what_is_gone_is_harmless(tmp_path: Path) -> None:
    child = Child(command(tmp_path, ""))
    assert wait_gone([child.mark], limit_s=10) == []
    assert child.exit_code() == 0
    kill([child.mark])
    child.close()
