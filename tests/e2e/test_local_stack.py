"""The local stack as a person uses it: real servers, real services, real signals.

Each test has its own data folder; BIDE_LOCAL_DURABLE=0 leaves out the disk's confirmation only.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy.local.ledger import read_record
from shared.processes import Mark, is_alive, wait_gone

REPOSITORY = Path(__file__).parents[2]
READY_LIMIT_S = 180.0
AGAIN_LIMIT_S = 120.0


class Up:
    """One `up --json`, its answer and what it says meanwhile."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.data_dir = data_dir
        self._lines: queue.Queue[str] = queue.Queue()
        self.said: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "up", "--json", "--no-demo", "--data-dir", str(data_dir), *options],
            cwd=REPOSITORY,
            env=stack_environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_stderr)
        self._reader.start()

    def ready(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # `up` has limits of its own and ends without a line when it fails.
        assert line, "\n".join(self.finish_reading())
        answer: dict[str, Any] = json.loads(line)
        assert answer["ready"] is True
        return answer

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if text in line:
                return

    def end(self, signum: int) -> int:
        self._process.send_signal(signum)
        code = self._process.wait(READY_LIMIT_S)
        self.finish_reading()
        return code

    def finish_reading(self) -> list[str]:
        self._reader.join(READY_LIMIT_S)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()
        return self.said

    def clean_up(self) -> None:
        self.end(signal.SIGKILL)
        down(self.data_dir)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line.rstrip())
            self._lines.put(line)


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Up] = []

    def start_one(name: str = "stack", *options: str) -> Up:
        running.append(Up(tmp_path / name, *options))
        return running[-1]

    yield start_one
    for up in running:
        up.clean_up()


def stack_environ() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name.startswith("BIDE_LOCAL_")}
    rest = {name: value for name, value in os.environ.items() if not name.startswith("BIDE_")}
    return {**rest, **own, "BIDE_LOCAL_DURABLE": "0"}


def down(data_dir: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.local", "down", "--data-dir", str(data_dir)],
        cwd=REPOSITORY,
        env=stack_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def marks(data_dir: Path) -> dict[str, Mark]:
    return {entry.name: entry.mark for entry in read_record(data_dir).entries}


def status(url: str) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def wait_until_ready(urls: list[str]) -> None:
    deadline = time.monotonic() + AGAIN_LIMIT_S
    while any(status(f"{url}/readyz") != 200 for url in urls):
        assert time.monotonic() < deadline, [(url, status(f"{url}/readyz")) for url in urls]
        time.sleep(0.1)


def service_urls(answer: dict[str, Any]) -> list[str]:
    return [url.removesuffix("/metrics") for urls in answer["metrics"].values() for url in urls]


def test_ctrl_c_leaves_nothing_running_and_the_next_start_is_where_the_last_one_was(start: Start) -> None:
    first = start()
    answer = first.ready()
    assert all(status(f"{url}/readyz") == 200 for url in service_urls(answer))
    assert all(status(url) == 200 for urls in answer["metrics"].values() for url in urls)
    running = marks(first.data_dir)
    assert set(running) == {
        "postgres",
        "epmd",
        "rabbitmq",
        "proxy-1",
        "queue-1",
        "scheduler-1",
        "liveness-1",
    }
    assert first.end(signal.SIGINT) == 0
    assert not [name for name, mark in running.items() if is_alive(mark)]
    assert "nothing runs" in down(first.data_dir)

    again = start()
    told = again.ready()
    again_the_same = ("proxy", "proxies", "admin_token", "metrics", "database_url", "amqp_url")
    assert {key: told[key] for key in again_the_same} == {key: answer[key] for key in again_the_same}
    assert again.end(signal.SIGTERM) == 0


def test_two_stacks_live_side_by_side_and_down_clears_only_the_crashed_one(start: Start) -> None:
    stays, crashes = start("stays"), start("crashes", "--replicas", "proxy=2")
    kept, lost = stays.ready(), crashes.ready()
    assert len(lost["proxies"]) == len(lost["pids"]["proxy"]) == 2
    assert not set(service_urls(kept)) & set(service_urls(lost))

    refused = start("stays")
    assert refused.end(0) == 1
    assert "--data-dir" in refused.said[-1]
    assert str(read_record(stays.data_dir).supervisor.pid) in refused.said[-1]  # type: ignore[union-attr]

    crashes.end(signal.SIGKILL)
    left = marks(crashes.data_dir)
    assert all(is_alive(mark) for mark in left.values())
    said = down(crashes.data_dir)
    assert all(name in said for name in left)
    assert not [name for name, mark in left.items() if is_alive(mark)]
    assert all(status(f"{url}/readyz") == 200 for url in service_urls(kept))


def test_the_next_start_clears_what_a_crashed_one_left(start: Start) -> None:
    crashed = start()
    crashed.wait_for("ready")  # The first server: the crash comes in the middle of the start.
    crashed.end(signal.SIGKILL)
    left = marks(crashed.data_dir)
    assert left
    start().ready()
    assert not [name for name, mark in left.items() if is_alive(mark)]


def test_whatever_dies_comes_back(start: Start) -> None:
    stack = start()
    urls = service_urls(stack.ready())
    for name in ("queue-1", "postgres", "rabbitmq"):
        mark = marks(stack.data_dir)[name]
        os.kill(mark.pid, signal.SIGKILL)
        stack.wait_for(f"{name} (pid {mark.pid}) was ended by SIGKILL")
        stack.wait_for(f"{name} started again")
        wait_until_ready(urls)
        assert marks(stack.data_dir)[name] != mark
    before = list(marks(stack.data_dir).values())
    assert stack.end(signal.SIGINT) == 0
    assert wait_gone(before, limit_s=0) == []
