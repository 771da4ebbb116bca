"""Agents as processes of this machine: the command lines stand in the operator's file, never in a message.

A process is `pid:starttime`, in a session of its own, and outlives the liveness that started it: any replica on the
machine looks at it and ends it. Of each workspace a file in `folder` remembers the last start; a lock beside it lets
one replica at a time act. What an agent starts carries a mark in its environment, so that all of it is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import stat
import subprocess
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target
from shared.processes import Mark, end, family, is_alive, kill, mark_of, read_stat

MARK = "BIDE_AGENT_MARK"
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""Of our own environment; the rest of it is nobody's business, least of all the database's password."""
_LOCK_WAIT_S = 5.0
_LOCK_LOOK_S = 0.05
_THREADS = 16
_OUTPUT_MAX = 16 << 20
"""Bytes of output that a start goes on with; above that it is put aside, and what was aside is dropped."""
T = TypeVar("T")


class Agent(BaseModel):
    """One `[agents.<workspace_id>]` of the operator's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    command: list[str] = Field(min_length=1)
    cwd: str = "/"
    env: dict[str, str] = {}
    stop_s: float = Field(default=10.0, ge=0, le=600)
    """Between SIGTERM and SIGKILL."""


class Agents(BaseModel):
    """The operator's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    agents: dict[str, Agent] = {}


@dataclass(frozen=True, slots=True)
class _Started:
    """The last start of a workspace, as its file remembers it."""

    fence: int
    pid: int
    start_ticks: int
    machine: str
    """Boot id of the machine: pids mean nothing beyond it."""
    at: float
    """Seconds since 1970; written down, for each reading of the clocks would give another."""

    @property
    def mark(self) -> Mark:
        return Mark(self.pid, self.start_ticks)

    @property
    def container_id(self) -> str:
        return f"{self.pid}:{self.start_ticks}"


class ProcessDriver:
    """Starts and ends the agents of `agents_file`; keeps what it must remember, and their output, in `folder`."""

    def __init__(self, agents_file: Path | None, folder: Path) -> None:
        self._agents_file = agents_file
        self._folder = folder
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="process-driver")
        self._children: set[int] = set()
        self._watched: dict[tuple[str, Mark], int] = {}
        self._exits: asyncio.Queue[Exit] = asyncio.Queue()

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        return {target.workspace_id: await self.inspect(target) for target in targets}

    async def inspect(self, target: Target) -> Observation:
        try:
            observation = await self._in_thread(lambda: self._look(target.workspace_id))
        except (OSError, DriverError) as error:
            return Observation(Seen.UNKNOWN, why=str(error))
        self._watch(target.workspace_id, observation)
        return observation

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        observation = await self._act(lambda: self._restart(target.workspace_id, expected, fence))
        self._watch(target.workspace_id, observation)
        return observation

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        return await self._act(lambda: self._kill(target.workspace_id, expected, fence))

    async def exits(self) -> AsyncIterator[Exit]:
        while True:
            yield await self._exits.get()

    async def close(self) -> None:
        for descriptor in self._watched.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()
        self._threads.shutdown(wait=False)

    async def _act(self, work: Callable[[], T]) -> T:
        try:
            return await self._in_thread(work)
        except OSError as error:
            raise DriverError(str(error)) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ── in a thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, workspace_id: str) -> Observation:
        self._reap()
        started = self._last_start(workspace_id)
        if started is None:
            if self._agent(workspace_id) is None:
                return Observation(Seen.UNKNOWN, why=f"{workspace_id} is not in the operator's file")
            return Observation(Seen.NOT_FOUND, why="it was never started on this machine")
        if started.machine != _machine():
            return Observation(Seen.NOT_FOUND, why="the machine has been started anew")
        return _observe(started)

    def _restart(self, workspace_id: str, expected: str | None, fence: int) -> Observation:
        with self._locked(workspace_id):
            started = self._last_start(workspace_id)
            here = started is not None and started.machine == _machine()
            if started is not None and started.fence >= fence:
                if started.fence > fence:
                    raise FencedError(f"start {started.fence} of {workspace_id} came after {fence}")
                return _observe(started)
            if started is not None and here and is_alive(started.mark) and started.container_id != expected:
                if expected is None:
                    return _observe(started)
                raise FencedError(f"{started.container_id} runs in {workspace_id}, not {expected}")
            agent = self._agent(workspace_id)
            if agent is None:
                raise CannotRunError(f"{workspace_id} is not in the operator's file")
            self._end(workspace_id, started if here else None, agent.stop_s)
            return _observe(self._spawn(workspace_id, agent, fence))

    def _kill(self, workspace_id: str, expected: str | None, fence: int) -> Killed:
        with self._locked(workspace_id):
            started = self._last_start(workspace_id)
            if started is not None and started.fence > fence:
                raise FencedError(f"start {started.fence} of {workspace_id} came after {fence}")
            if started is None or started.machine != _machine() or not is_alive(started.mark):
                kill(self._left_by(workspace_id))
                return Killed.GONE
            if started.container_id != expected:
                return Killed.REPLACED
            agent = self._agent(workspace_id)
            self._end(workspace_id, started, agent.stop_s if agent is not None else 0.0)
            return Killed.APPLIED

    def _end(self, workspace_id: str, started: _Started | None, stop_s: float) -> None:
        """SIGTERM to the agent, SIGKILL to whatever is left of it and of all it started."""
        if started is not None and is_alive(started.mark):
            end({started.mark: signal.SIGTERM}, limit_s=stop_s)
        kill(self._left_by(workspace_id))
        self._reap()
        if started is not None and is_alive(started.mark):
            raise DriverError(f"{started.container_id} of {workspace_id} does not end, not even by SIGKILL")

    def _spawn(self, workspace_id: str, agent: Agent, fence: int) -> _Started:
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env = passed_on | agent.env | {MARK: f"{self._mark_of(workspace_id)}{fence}"}
        log = self._folder / f"{workspace_id}.log"
        if log.exists() and log.stat().st_size > _OUTPUT_MAX:
            log.replace(self._folder / f"{workspace_id}.log.1")
        with log.open("ab") as output:
            child = subprocess.Popen(  # noqa: S603 - the operator's own command line, and no shell reads it
                agent.command,
                env=env,
                cwd=agent.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child.returncode = 0  # from here on it is ours to reap; Popen would complain of one that outlives us
        self._children.add(child.pid)
        started = _Started(fence, child.pid, read_stat(child.pid).start_ticks, _machine(), time.time())
        self._remember(workspace_id, started)
        return started

    def _reap(self) -> None:
        for pid in tuple(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            self._children.discard(pid)

    def _agent(self, workspace_id: str) -> Agent | None:
        """Read the file anew each time: an operator's edit counts at once."""
        if self._agents_file is None:
            return None
        try:
            written = tomllib.loads(self._agents_file.read_text(encoding="utf-8"))
            return Agents.model_validate(written).agents.get(workspace_id)
        except FileNotFoundError:
            return None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DriverError(f"{self._agents_file} cannot be used: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]  # its place and no value: an `env` holds secrets, and this goes into the history
            place = ".".join(str(each) for each in first["loc"])
            raise DriverError(f"{self._agents_file} cannot be used: {place}: {first['msg']}") from error

    def _last_start(self, workspace_id: str) -> _Started | None:
        """The last start; found by its mark where whoever started it died before it could write that down."""
        self._check_folder()
        try:
            said = json.loads((self._folder / f"{workspace_id}.json").read_text(encoding="utf-8"))
            started = _Started(**said)
        except FileNotFoundError:
            started = None
        except (ValueError, TypeError) as error:
            raise DriverError(f"{self._folder}/{workspace_id}.json cannot be read: {error}") from error
        if started is not None and started.machine == _machine() and is_alive(started.mark):
            return started
        found = max(self._roots(workspace_id), key=lambda each: each.fence, default=None)
        return found if found is not None and (started is None or found.fence > started.fence) else started

    def _check_folder(self) -> None:
        """Refuse a folder that others may write to: what stands in it is signalled, and its files are written to."""
        with contextlib.suppress(FileNotFoundError):
            path, folder = self._folder.lstat(), self._folder.stat()
            owners = {path.st_uid, folder.st_uid}
            if not owners <= {0, os.geteuid()} or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise DriverError(f"{self._folder} is not ours alone to write to: chown it, chmod 700")

    def _remember(self, workspace_id: str, started: _Started) -> None:
        new = self._folder / f"{workspace_id}.json.new"
        new.write_text(json.dumps(asdict(started)), encoding="utf-8")
        new.replace(self._folder / f"{workspace_id}.json")

    def _mark_of(self, workspace_id: str) -> str:
        return f"{self._folder.resolve()}|{workspace_id}|"

    def _roots(self, workspace_id: str) -> Iterator[_Started]:
        """Session leaders that carry this workspace's mark: starts of ours."""
        for pid, fence in _marked(self._mark_of(workspace_id)):
            with contextlib.suppress(OSError):
                said = read_stat(pid)
                if said.session == pid and said.state not in "ZX":
                    yield _Started(fence, pid, said.start_ticks, _machine(), _moment(said.start_ticks))

    def _left_by(self, workspace_id: str) -> Sequence[Mark]:
        """Everything that an agent of this workspace started and that still runs."""
        marks = (mark_of(pid) for pid, _ in _marked(self._mark_of(workspace_id)))
        return family([mark for mark in marks if mark is not None])

    @contextlib.contextmanager
    def _locked(self, workspace_id: str) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_folder()
        deadline = time.monotonic() + _LOCK_WAIT_S
        with (self._folder / f"{workspace_id}.lock").open("a") as held:
            while True:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DriverError(f"another replica is at {workspace_id}") from None
                    time.sleep(_LOCK_LOOK_S)
            yield

    # ── in the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self, workspace_id: str, observation: Observation) -> None:
        """Hear of the end of what runs, whoever started it."""
        if observation.seen is not Seen.RUNNING or observation.container_id is None:
            return
        pid, _, ticks = observation.container_id.partition(":")
        mark = Mark(int(pid), int(ticks))
        if (workspace_id, mark) in self._watched:
            return
        try:
            descriptor = os.pidfd_open(mark.pid)
        except OSError:
            return  # gone already: the next look says so
        if not is_alive(mark):
            os.close(descriptor)
            return
        self._watched[workspace_id, mark] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, workspace_id, mark)

    def _ended(self, workspace_id: str, mark: Mark) -> None:
        descriptor = self._watched.pop((workspace_id, mark))
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._reap()
        self._exits.put_nowait(Exit(workspace_id, f"{mark.pid}:{mark.start_ticks}"))


def _observe(started: _Started) -> Observation:
    at = datetime.fromtimestamp(started.at, UTC)
    try:
        said = read_stat(started.pid)
    except OSError:
        said = None
    if said is None or said.start_ticks != started.start_ticks or said.state in "ZX":
        return Observation(Seen.STOPPED, started.container_id, at, "the process has ended")
    if said.state in "Tt":
        return Observation(Seen.TRANSITION, started.container_id, at, "the process is paused")
    return Observation(Seen.RUNNING, started.container_id, at, "the process runs")


def _marked(mark: str) -> Iterator[tuple[int, int]]:
    """(pid, fence) of each process whose environment carries `mark`."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for variable in Path(f"/proc/{entry.name}/environ").read_bytes().split(b"\0"):
                    fence = variable.removeprefix(wanted)
                    if variable.startswith(wanted) and fence.isdigit():
                        yield int(entry.name), int(fence)


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _moment(start_ticks: int) -> float:
    ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    return round(time.time() - ago_s, 1)
