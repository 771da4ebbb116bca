"""Agents as processes of this machine: the command lines stand in the operator's file, never in a message.

A process is `pid:starttime`, in a session of its own, and outlives the liveness that started it: any replica on the
machine looks at it and ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target
from services.liveness.drivers.process.agents_file import Agent, read_agent
from services.liveness.drivers.process.starts import MARK, Started, Starts
from shared.processes import Mark, end, is_alive, kill

_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""Of our own environment; the rest of it is nobody's business, least of all the database's password."""
_THREADS = 16
_OUTPUT_MAX = 16 << 20
"""Bytes of output that a start goes on with; above that it is put aside, and what was aside is dropped."""
T = TypeVar("T")


class ProcessDriver:
    """Starts and ends the agents of `agents_file`; keeps what it must remember, and their output, in `folder`."""

    def __init__(self, agents_file: Path | None, folder: Path) -> None:
        self._agents_file = agents_file
        self._starts = Starts(folder)
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
        started = self._starts.last(workspace_id)
        if started is None:
            if read_agent(self._agents_file, workspace_id) is None:
                return Observation(Seen.UNKNOWN, why=f"{workspace_id} is not in the operator's file")
            return Observation(Seen.NOT_FOUND, why="it was never started on this machine")
        if not started.is_of_this_boot:
            return Observation(Seen.NOT_FOUND, why="the machine has been started anew")
        return started.observe()

    def _restart(self, workspace_id: str, expected: str | None, fence: int) -> Observation:
        with self._starts.locked(workspace_id):
            started = self._starts.last(workspace_id)
            if started is not None and started.fence >= fence:
                if started.fence > fence:
                    raise FencedError(f"start {started.fence} of {workspace_id} came after {fence}")
                return started.observe()
            if started is not None and started.is_alive and started.container_id != expected:
                if expected is None:
                    return started.observe()
                raise FencedError(f"{started.container_id} runs in {workspace_id}, not {expected}")
            agent = read_agent(self._agents_file, workspace_id)
            if agent is None:
                raise CannotRunError(f"{workspace_id} is not in the operator's file")
            self._end(workspace_id, started, agent.stop_s)
            return self._spawn(workspace_id, agent, fence).observe()

    def _kill(self, workspace_id: str, expected: str | None, fence: int) -> Killed:
        with self._starts.locked(workspace_id):
            started = self._starts.last(workspace_id)
            if started is not None and started.fence > fence:
                raise FencedError(f"start {started.fence} of {workspace_id} came after {fence}")
            if started is None or not started.is_alive:
                kill(self._starts.left_by(workspace_id))
                return Killed.GONE
            if started.container_id != expected:
                return Killed.REPLACED
            agent = read_agent(self._agents_file, workspace_id)
            self._end(workspace_id, started, agent.stop_s if agent is not None else 0.0)
            return Killed.APPLIED

    def _end(self, workspace_id: str, started: Started | None, stop_s: float) -> None:
        """SIGTERM to the agent, SIGKILL to whatever is left of it and of all it started."""
        if started is not None and started.is_alive:
            end({started.mark: signal.SIGTERM}, limit_s=stop_s)
        kill(self._starts.left_by(workspace_id))
        self._reap()
        if started is not None and started.is_alive:
            raise DriverError(f"{started.container_id} of {workspace_id} does not end, not even by SIGKILL")

    def _spawn(self, workspace_id: str, agent: Agent, fence: int) -> Started:
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env = passed_on | agent.env | {MARK: self._starts.carried(workspace_id, fence)}
        log = self._starts.folder / f"{workspace_id}.log"
        if log.exists() and log.stat().st_size > _OUTPUT_MAX:
            log.replace(log.with_name(f"{workspace_id}.log.1"))
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
        return self._starts.remember(workspace_id, fence=fence, pid=child.pid)

    def _reap(self) -> None:
        for pid in tuple(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            self._children.discard(pid)

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
