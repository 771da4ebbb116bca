"""What was started on this machine: a file for each workspace, a lock beside it, and a mark in each environment.

The file remembers the last start; the lock lets one replica at a time act; by the mark all that an agent started is
found, and a start whose replica died before it could write it down.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import DriverError
from shared.processes import Mark, family, is_alive, mark_of, read_stat

MARK = "BIDE_AGENT_MARK"
_LOCK_WAIT_S = 5.0
_LOCK_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Started:
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

    @property
    def is_of_this_boot(self) -> bool:
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        return self.is_of_this_boot and is_alive(self.mark)

    def observe(self) -> Observation:
        at = datetime.fromtimestamp(self.at, UTC)
        try:
            said = read_stat(self.pid)
        except OSError:
            said = None
        if said is None or said.start_ticks != self.start_ticks or said.state in "ZX":
            return Observation(Seen.STOPPED, self.container_id, at, "the process has ended")
        if said.state in "Tt":
            return Observation(Seen.TRANSITION, self.container_id, at, "the process is paused")
        return Observation(Seen.RUNNING, self.container_id, at, "the process runs")


class Starts:
    """The starts that `folder` remembers; replicas of one machine share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def last(self, workspace_id: str) -> Started | None:
        """The last start; found by its mark where whoever started it died before it could write that down."""
        self._check_folder()
        try:
            said = json.loads((self.folder / f"{workspace_id}.json").read_text(encoding="utf-8"))
            started = Started(**said)
        except FileNotFoundError:
            started = None
        except (ValueError, TypeError) as error:
            raise DriverError(f"{self.folder}/{workspace_id}.json cannot be read: {error}") from error
        if started is not None and started.is_alive:
            return started
        found = max(self._roots(workspace_id), key=lambda each: each.fence, default=None)
        return found if found is not None and (started is None or found.fence > started.fence) else started

    def remember(self, workspace_id: str, *, fence: int, pid: int) -> Started:
        """Write down a start that has just been made."""
        started = Started(fence, pid, read_stat(pid).start_ticks, _machine(), time.time())
        new = self.folder / f"{workspace_id}.json.new"
        new.write_text(json.dumps(asdict(started)), encoding="utf-8")
        new.replace(self.folder / f"{workspace_id}.json")
        return started

    def carried(self, workspace_id: str, fence: int | None = None) -> str:
        """What the environment of a start carries; without a fence, what that begins with."""
        return f"{self.folder.resolve()}|{workspace_id}|{'' if fence is None else fence}"

    def left_by(self, workspace_id: str) -> Sequence[Mark]:
        """Everything that an agent of this workspace started and that still runs."""
        marks = (mark_of(pid) for pid, _ in _marked(self.carried(workspace_id)))
        return family([mark for mark in marks if mark is not None])

    @contextlib.contextmanager
    def locked(self, workspace_id: str) -> Iterator[None]:
        """Hold the workspace against other replicas.

        Raises:
            DriverError: one of them is at it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_folder()
        deadline = time.monotonic() + _LOCK_WAIT_S
        with (self.folder / f"{workspace_id}.lock").open("a") as held:
            while True:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DriverError(f"another replica is at {workspace_id}") from None
                    time.sleep(_LOCK_LOOK_S)
            yield

    def _check_folder(self) -> None:
        """Refuse a folder that others may write to: what stands in it is signalled, and its files are written to."""
        with contextlib.suppress(FileNotFoundError):
            path, folder = self.folder.lstat(), self.folder.stat()
            owners = {path.st_uid, folder.st_uid}
            if not owners <= {0, os.geteuid()} or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise DriverError(f"{self.folder} is not ours alone to write to: chown it, chmod 700")

    def _roots(self, workspace_id: str) -> Iterator[Started]:
        """Session leaders that carry this workspace's mark: starts of ours."""
        for pid, fence in _marked(self.carried(workspace_id)):
            with contextlib.suppress(OSError):
                said = read_stat(pid)
                if said.session == pid and said.state not in "ZX":
                    yield Started(fence, pid, said.start_ticks, _machine(), _moment(said.start_ticks))


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
