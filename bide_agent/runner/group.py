"""A command as a process group of its own: what it writes is drained always, and all of the group ends.

What has left the group ends with it where the command is stopped, and stays where it ended by itself (`descent.py`).
Both pipes are read in callbacks, whatever the command and its caller do meanwhile: a full pipe stops nobody. Standard
input is closed, or gets the prompt and is closed; a command that never reads it keeps nobody waiting either.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from bide_agent.runner.descent import Descent, Process

LOOK_EVERY_S = 0.02
KILLED_WITHIN_S = 5.0
"""After a SIGKILL; longer only where the kernel itself waits, for a disk or a network file."""
_PR_SET_CHILD_SUBREAPER = 36


class _Kin:
    """What this process is the parent of: its commands, and, once it adopts, what they have left behind."""

    def __init__(self) -> None:
        self.adopts = False
        self.starting = 0
        self.commands: set[int] = set()

    def reap_strays(self) -> None:
        """Take the exit codes of those that left their group, as daemons do. asyncio takes those of the commands."""
        with suppress(ChildProcessError):
            while self.adopts and not self.starting:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid in self.commands:
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)


kin = _Kin()


class Child(asyncio.SubprocessProtocol):
    """One command and all that it starts."""

    def __init__(self, on_output: Callable[[bytes], None], on_error: Callable[[bytes], None], descent: Descent) -> None:
        self._descent = descent
        self._hear = {1: on_output, 2: on_error}
        self._open = {1, 2}
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.SubprocessTransport
        self.pid = 0
        self.heard_at = self._loop.time()
        """When it last wrote something, by the loop's clock."""
        self.exited = asyncio.Event()
        self.drained = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.pid = self._transport.get_pid()
        kin.commands.add(self.pid)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self._hear[fd](data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's own signature
        self._open.discard(fd)
        if not self._open:
            self.drained.set()

    def process_exited(self) -> None:
        kin.commands.discard(self.pid)
        self.exited.set()

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it."""
        return self._transport.get_returncode()

    def write(self, text: bytes, *, and_close: bool) -> None:
        """Hand it some input; it is read when it is read."""
        pipe = self._transport.get_pipe_transport(0)
        if isinstance(pipe, asyncio.WriteTransport) and not pipe.is_closing():
            pipe.write(text)
            if and_close:
                pipe.write_eof()

    def ask(self, number: int) -> None:
        """Send a signal to the command itself: what it has started need not know it."""
        if not self.exited.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def signal(self, number: int) -> None:
        """To the whole group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """All of it, at once: the group, and what has left it."""
        self._signal_all(signal.SIGKILL)

    async def until_drained(self, within_s: float) -> None:
        """Wait for the end of its output; a grandchild may hold it open."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.drained.wait()

    async def end(self, grace_s: float) -> None:
        """End what is left of the group: SIGTERM, after `grace_s` SIGKILL; come back when nothing is."""
        if self._is_gone():
            return
        self.signal(signal.SIGTERM)
        if not await _holds_within(grace_s, self._is_gone):
            self.signal(signal.SIGKILL)
            await _holds_within(KILLED_WITHIN_S, self._is_gone)

    async def stop(self, grace_s: float) -> None:
        """End the group, and what has left it, in the same way."""
        self._signal_all(signal.SIGTERM)
        if not await _holds_within(grace_s, self._is_all_gone):
            self.kill()
            await _holds_within(KILLED_WITHIN_S, self._is_all_killed)

    def close(self) -> None:
        """Close what is left of its pipes."""
        self._transport.close()
        kin.reap_strays()

    def _signal_all(self, number: int) -> None:
        outside = self._outside(self._descent.look())  # first: what loses its parent may lose its descent
        if not self._is_gone():
            self.signal(number)
        for one in outside:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(one.pid, number)

    def _is_gone(self) -> bool:
        if not self.exited.is_set():
            return False
        self._reap()
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _is_all_gone(self) -> bool:
        return (
            self._is_gone()
            and not self._outside(self._descent.look_again())
            and not self._outside(self._descent.look())
        )

    def _is_all_killed(self) -> bool:
        if self._is_all_gone():
            return True
        self.kill()  # what was started since the last look
        return False

    def _outside(self, processes: list[Process]) -> list[Process]:
        """Those that run and have left the group. What has ended is waited for."""
        for one in processes:
            if one.has_ended and one.pid not in kin.commands and one.parent == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(one.pid, os.WNOHANG)
        return [one for one in processes if not one.has_ended and one.group != self.pid]

    def _reap(self) -> None:
        """Take the exit codes of grandchildren that became ours; the child's own was asyncio's to take."""
        with suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass


async def _holds_within(seconds: float, holds: Callable[[], bool]) -> bool:
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    while not holds():
        if loop.time() >= due:
            return False
        await asyncio.sleep(LOOK_EVERY_S)  # processes that are not ours tell nobody that they have ended
    return True


async def start(
    command: Sequence[str],
    *,
    folder: Path,
    environ: Mapping[str, str],
    stdin: bool,
    on_output: Callable[[bytes], None],
    on_error: Callable[[bytes], None],
    mark: str,
) -> Child:
    """Start a command in a session of its own; the variable `mark` of `environ` is like no other command's.

    Raises:
        OSError: it cannot be started.
    """
    kin.starting += 1
    try:
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: Child(on_output, on_error, Descent(f"{mark}={environ[mark]}")),
            *command,
            cwd=folder,
            env=environ,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        kin.starting -= 1
    return child


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, and so able to wait for them. Linux; elsewhere init is."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            kin.adopts = ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
