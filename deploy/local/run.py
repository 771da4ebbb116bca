"""How a server is run: as processes of ours, in a container (containers.py), or by somebody else.

Owns start, stop, kill and pause of one server. Refuses them all for a server that was given by URL.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from deploy.local.errors import StackError
from deploy.local.ledger import Ledger
from deploy.local.process import Child, Command
from shared.processes import end, family, is_stopped, kill, send

READY_LIMIT_S = 120.0
PAUSE_LIMIT_S = 5.0
"""How long a server may take from its start to its first answer (warm: PostgreSQL 0.2 s, RabbitMQ 3 s)."""
RETRY_S = 0.05
LOG_TAIL_LINES = 15


class Run(Protocol):
    """The controls of one server."""

    def start(self) -> None:
        """Start it, on the same port and data as before, and return when it answers."""

    def stop(self, signum: int | None = None, /) -> None:
        """Stop it in good order, or with this signal, and return when it is gone."""

    def kill(self) -> None:
        """SIGKILL it and all its children."""

    def pause(self) -> None:
        """Freeze it: it keeps its connections and answers nothing."""

    def resume(self) -> None:
        """Let a frozen one go on."""

    def is_running(self) -> bool:
        """Tell whether it runs (frozen counts as running)."""


class Server:
    """A server in use: where it is, what it is, and the controls that every server has."""

    def __init__(self, *, url: str, source: str, run: Run, version: str) -> None:
        self.url = url
        self.source = source
        self.version = version
        self._run = run

    def start(self) -> None:
        """Start it again on the same port and data; return when it takes connections."""
        self._run.start()

    def kill(self) -> None:
        """SIGKILL it and its children."""
        self._run.kill()

    def pause(self) -> None:
        """Freeze it with its children: connections stay open and nothing answers."""
        self._run.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._run.resume()

    def is_running(self) -> bool:
        """Tell whether it runs."""
        return self._run.is_running()


class LocalRun:
    """A server as processes of ours; the last command is the server, those before it are what it needs."""

    def __init__(self, ledger: Ledger, commands: Sequence[Command], *, probe: Callable[[], object]) -> None:
        self._ledger = ledger
        self._commands = commands
        self._probe = probe

    def start(self) -> None:
        """Start what does not run and wait until the probe no longer raises OSError."""
        children = [self._child(command) or self._ledger.spawn(command) for command in self._commands]
        wait_until_ready(children[-1], self._probe)

    def stop(self, signum: int | None = None, /) -> None:
        """Stop the server first, then what it needed."""
        for command in reversed(self._commands):
            child = self._child(command)
            if child is not None:
                end({child.mark: signum or command.stop_signal}, limit_s=command.stop_limit_s)
                self._ledger.strike([child.mark])

    def kill(self) -> None:
        """SIGKILL the server with its children; what it needed is killed too."""
        marks = [child.mark for child in self._alive()]
        kill(marks)
        self._ledger.strike(marks)

    def pause(self) -> None:
        """SIGSTOP the server and its children; come back when every thread of theirs stands."""
        marks = family(child.mark for child in self._alive())
        for mark in marks:
            send(mark, signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_LIMIT_S
        while not all(is_stopped(mark) for mark in marks) and time.monotonic() < deadline:
            time.sleep(RETRY_S / 10)

    def resume(self) -> None:
        """SIGCONT the server and its children."""
        for mark in family(child.mark for child in self._alive()):
            send(mark, signal.SIGCONT)

    def is_running(self) -> bool:
        """Tell whether the server's own process runs."""
        return self._child(self._commands[-1]) is not None

    def _alive(self) -> list[Child]:
        return [child for child in map(self._child, self._commands) if child is not None]

    def _child(self, command: Command) -> Child | None:
        child = self._ledger.children.get(command.name)
        return child if child is not None and child.exit_code() is None else None


class GivenRun:
    """A server that was given by URL: in use here, in charge elsewhere."""

    def __init__(self, variable: str) -> None:
        self._variable = variable

    def start(self) -> None:
        """Refuse."""
        raise self._refusal()

    def stop(self, _signum: int | None = None, /) -> None:
        """Refuse."""
        raise self._refusal()

    def kill(self) -> None:
        """Refuse."""
        raise self._refusal()

    def pause(self) -> None:
        """Refuse."""
        raise self._refusal()

    def resume(self) -> None:
        """Refuse."""
        raise self._refusal()

    def is_running(self) -> bool:
        """Say yes: it answered when we began."""
        return True

    def _refusal(self) -> StackError:
        return StackError(f"the server of {self._variable} is not ours to control; leave {self._variable} unset")


def wait_until_ready(child: Child, probe: Callable[[], object], *, limit_s: float = READY_LIMIT_S) -> None:
    """Return when the probe no longer raises OSError; StackError with the log's end when that does not come."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            probe()
        except OSError as error:
            code = child.exit_code()
            if code is not None:
                raise StackError(
                    f"{child.command.name} ended with {code} before it was ready:\n{tail(child)}"
                ) from error
            if time.monotonic() > deadline:
                raise StackError(
                    f"{child.command.name} was not ready within {limit_s:.0f} s ({error}):\n{tail(child)}"
                ) from error
            time.sleep(RETRY_S)
        else:
            return


def tail(child: Child, *, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines that this child logged, indented, below the log's path."""
    log = child.command.log
    try:
        with log.open("rb") as file:
            file.seek(child.log_from)
            last = file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        last = []
    return "\n".join([f"  {log}", *(f"    {line}" for line in last)])
