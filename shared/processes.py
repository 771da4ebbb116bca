"""Processes of this machine: known by pid and start time, signalled beyond mistake, ended with all they started.

Owns signals and waiting (on pidfds, never by polling). Refuses to signal a pid whose start time is not the one it
was told: pids are reused, and nobody here may end a stranger.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

KILL_LIMIT_S = 5.0
"""How long a process may take to vanish after SIGKILL (only one that hangs inside the kernel takes longer)."""


@dataclass(frozen=True)
class Mark:
    """One process beyond mistake: within one boot no two processes share pid and start time."""

    pid: int
    start_ticks: int


def mark_of(pid: int) -> Mark | None:
    """Return the mark of a live process; None if there is none (a zombie has ended)."""
    try:
        stat = read_stat(pid)
    except OSError:
        return None
    return None if stat.state in "ZX" else Mark(pid, stat.start_ticks)


def is_alive(mark: Mark) -> bool:
    """Tell whether this very process still runs."""
    return mark_of(mark.pid) == mark


def is_stopped(mark: Mark) -> bool:
    """Tell whether all threads of this process stand still, or it has ended: a signal to stop takes each one's time."""
    try:
        threads = list(Path(f"/proc/{mark.pid}/task").iterdir())
        states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads]
    except OSError:
        return not is_alive(mark)
    return all(state in "TtZX" for state in states)


def family(roots: Iterable[Mark]) -> list[Mark]:
    """Return these processes, their descendants and the members of their sessions, parents first.

    Both, because PostgreSQL's backends open sessions of their own and a dead parent breaks the line of descent.
    """
    stats = {stat.pid: stat for stat in _all_stats()}
    found = {mark.pid: mark for mark in roots if mark.pid in stats and stats[mark.pid].start_ticks == mark.start_ticks}
    sessions = set(found)
    grown = True
    while grown:
        fresh = {
            stat.pid: Mark(stat.pid, stat.start_ticks)
            for stat in stats.values()
            if stat.pid not in found and (stat.parent in found or stat.session in sessions)
        }
        grown = bool(fresh)
        found.update(fresh)
    return list(found.values())


def send(mark: Mark, signum: int) -> bool:
    """Signal exactly this process; False when it is gone. PermissionError when it is another user's."""
    try:
        pidfd = os.pidfd_open(mark.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(mark):  # Checked after the pidfd is open: from here on the pid cannot be reused under us.
            return False
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    else:
        return True
    finally:
        os.close(pidfd)


def wait_gone(marks: Iterable[Mark], *, limit_s: float) -> list[Mark]:
    """Wait until all have ended; return those which had not within `limit_s`."""
    deadline = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for mark in marks:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(mark.pid)
                stack.callback(os.close, pidfd)
                # Not is_alive: the first thread of a killed program is a zombie while the others still end.
                if _is_same(mark):
                    selector.register(pidfd, selectors.EVENT_READ, mark)
        while selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            for key, _ in selector.select(left_s):
                selector.unregister(key.fileobj)
        return [key.data for key in selector.get_map().values()]


def end(stops: Mapping[Mark, int], *, limit_s: float) -> None:
    """Send each process its stop signal, wait, then SIGKILL whatever is left of it and of all it started."""
    everyone = family(stops)
    for mark, signum in stops.items():
        if send(mark, signum):
            send(mark, signal.SIGCONT)  # A paused process would otherwise never read its stop signal.
    wait_gone(stops, limit_s=limit_s)
    kill([*everyone, *family(stops)])


def kill(marks: Collection[Mark]) -> None:
    """SIGKILL these processes and all they started, and wait until they are gone."""
    doomed = family(marks)
    seen = set(doomed)
    doomed += [mark for mark in marks if mark not in seen]
    wait_gone([mark for mark in doomed if send(mark, signal.SIGKILL)], limit_s=KILL_LIMIT_S)


@dataclass(frozen=True)
class Stat:
    """What we read of /proc/<pid>/stat."""

    pid: int
    state: str
    parent: int
    session: int
    start_ticks: int


def parse_stat(text: str) -> Stat:
    """Read one line of /proc/<pid>/stat; the name in it may itself contain spaces and parentheses."""
    pid, _, rest = text.partition(" ")
    fields = rest[rest.rindex(")") + 2 :].split()
    # proc(5) counts from 1 and the first of these is field 3: the start time, field 22, is at 19.
    return Stat(int(pid), fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def read_stat(pid: int) -> Stat:
    return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))


def _is_same(mark: Mark) -> bool:
    try:
        return read_stat(mark.pid).start_ticks == mark.start_ticks
    except OSError:
        return False


def _all_stats() -> Iterator[Stat]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield read_stat(int(entry.name))
