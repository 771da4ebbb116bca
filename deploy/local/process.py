"""A command of the local stack and the child that runs it: in a session of its own, with a pidfd that says its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.processes import Mark, read_stat


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
        self.mark = Mark(self._popen.pid, read_stat(self._popen.pid).start_ticks)

    def exit_code(self) -> int | None:
        """Return None while it runs; reaps it when it has ended (negative: the signal that ended it)."""
        return self._popen.poll()

    def close(self) -> None:
        """Give back the pidfd of an ended child."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
