"""Who descends from a command, in its process group or not: read from /proc, where there is one.

The runner adopts orphans, so whatever its commands start stays below it. Whose turn a process is of, its environment
says (`mark`), or a parent that is of that turn. Who was once seen is remembered: a parent that ends takes its
children's descent along. Not seen is what wiped its environment and then lost its parents.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STATE, PARENT, GROUP, STARTED = 0, 1, 2, 19
"""Places in /proc/<pid>/stat behind the name, which may hold anything."""


@dataclass(frozen=True, slots=True)
class Process:
    """One that runs; pid and start together are never given twice."""

    pid: int
    started: str
    parent: int
    group: int
    has_ended: bool
    """Nobody has waited for it yet."""


class Descent:
    """What a command has started. `mark` stands in the environment that it was given, as `NAME=value`."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._seen: dict[int, str] = {}

    def look(self) -> list[Process]:
        """All that are there, the command too, and zombies that were seen alive; none where there is no /proc."""
        below = _below(os.getpid())
        ours = {one.pid for one in below if self._seen.get(one.pid) == one.started or self._is_marked(one.pid)}
        for one in below:  # parents come first
            if one.parent in ours:
                ours.add(one.pid)
        found = [one for one in below if one.pid in ours]
        self._seen = {one.pid: one.started for one in found}
        return found

    def look_again(self) -> list[Process]:
        """Those of the last look that are still there: a look at all the machine's processes is dear."""
        again = (_read(str(pid)) for pid in self._seen)
        return [one for one in again if one and self._seen[one.pid] == one.started]

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            return False


def _below(pid: int) -> list[Process]:
    """What descends from a process, parents first."""
    children: dict[int, list[Process]] = defaultdict(list)
    for one in map(_read, _pids()):
        if one:
            children[one.parent].append(one)
    found = [*children[pid]]
    for one in found:
        found += children[one.pid]
    return found


def _pids() -> list[str]:
    with suppress(OSError):
        return [entry.name for entry in PROC.iterdir() if entry.name.isdigit()]
    return []


def _read(pid: str) -> Process | None:
    try:
        with open(f"{PROC}/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - half the time of a Path's
            said = file.read(1024).rpartition(b")")[2].decode().split()
    except OSError:
        return None
    return Process(int(pid), said[STARTED], int(said[PARENT]), int(said[GROUP]), has_ended=said[STATE] in "ZX")
