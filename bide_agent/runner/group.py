"""A command as a process group of its own: what it writes is drained always, and all of the group ends.

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
    """One command and all that it starts in its group."""

    def __init__(self, on_output: Callable[[bytes], None], on_error: Callable[[bytes], None]) -> None:
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

    async def until_drained(self, within_s: float) -> None:
        """Wait for the end of its output; a grandchild may hold it open."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.drained.wait()

    async def stop(self, grace_s: float) -> None:
        """End what is left of the group: SIGTERM, after `grace_s` SIGKILL; come back when nothing is."""
        if self._is_gone():
            return
        self.signal(signal.SIGTERM)
        if not await self._gone_within(grace_s):
            self.signal(signal.SIGKILL)
            await self._gone_within(KILLED_WITHIN_S)

    def close(self) -> None:
        """Close what is left of its pipes."""
        self._transport.close()
        kin.reap_strays()

    async def _gone_within(self, seconds: float) -> bool:
        due = self._loop.time() + seconds
        while not self._is_gone():
            if self._loop.time() >= due:
                return False
            await asyncio.sleep(LOOK_EVERY_S)  # a group tells nobody that it is empty
        return True

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

    def _reap(self) -> None:
        """Take the exit codes of grandchildren that became ours; the child's own was asyncio's to take."""
        with suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass


async def start(
    command: Sequence[str],
    *,
    folder: Path,
    environ: Mapping[str, str],
    stdin: bool,
    on_output: Callable[[bytes], None],
    on_error: Callable[[bytes], None],
) -> Child:
    """Start a command in a session of its own. Raises `OSError`: it cannot be started."""
    kin.starting += 1
    try:
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: Child(on_output, on_error),
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
