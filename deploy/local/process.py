"""One process: started in its own session, known by pid and start time, ended together with all it started.

Owns signals and waiting (on pidfds, never by polling). Refuses to signal a pid whose start time is not the one it
was told: pids are reused, and a local stack must never end a stranger.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KILL_LIMIT_S = 5.0
"""How long a process may take to vanish after SIGKILL (only one that hangs inside the kernel takes longer)."""


@dataclass(frozen=True)
class Mark:
    """One process beyond mistake: within one boot no two processes share pid and start time."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run, and how it wants to be stopped. Lower `stop_order` ends first."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    stop_signal: int = signal.SIGTERM
    stop_limit_s: float = 30.0
    stop_order: int = 0


class Child:
    """A running command of ours, with the pidfd that says when it ended."""

    def __init__(self, command: Command) -> None:
        with command.log.open("ab") as log:
            self.log_from = log.tell()
            # Its own session: Ctrl-C at the terminal reaches only the supervisor, which ends things in order.
            self._popen = subprocess.Popen(
                command.argv,
                env=command.env,
                cwd=command.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.command = command
        self.started_s = time.monotonic()
        self.pidfd = os.pidfd_open(self._popen.pid)
        # Unreaped, so its entry in /proc is there even if it died at once.
        self.mark = Mark(self._popen.pid, _read_stat(self._popen.pid).start_ticks)

    def exit_code(self) -> int | None:
        """Return None while it runs; reaps it when it has ended (negative: the signal that ended it)."""
        return self._popen.poll()

    def close(self) -> None:
        """Give back the pidfd of an ended child."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def mark_of(pid: int) -> Mark | None:
    """Return the mark of a live process; None if there is none (a zombie has ended)."""
    try:
        stat = _read_stat(pid)
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


def _read_stat(pid: int) -> Stat:
    return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))


def _is_same(mark: Mark) -> bool:
    try:
        return _read_stat(mark.pid).start_ticks == mark.start_ticks
    except OSError:
        return False


def _all_stats() -> Iterator[Stat]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield _read_stat(int(entry.name))
