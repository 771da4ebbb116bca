"""The supervisor's loop: wakes when a child dies or a signal comes, restarts what died, ends when asked to.

Decides when to restart: 0.2 s after a death, doubled each time up to 10 s, and 0.2 s again for what ran for 30 s.
Refuses to poll: it sleeps on pidfds and on the signals' own pipe.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Self, TypeVar

from deploy.local.errors import StackError
from deploy.local.ledger import Ledger
from deploy.local.process import Command

FIRST_DELAY_S, LAST_DELAY_S = 0.2, 10.0
STEADY_S = 30.0

ResultT = TypeVar("ResultT")


class StopAsked(Exception):  # noqa: N818 (a request, no error)
    """A signal asked for the end of the stack."""


@dataclass(frozen=True)
class Backoff:
    """How long a command waits for its next start."""

    delay_s: float = FIRST_DELAY_S

    def after(self, *, lived_s: float) -> Backoff:
        """Return the backoff for the death after this one."""
        if lived_s >= STEADY_S:
            return Backoff(FIRST_DELAY_S * 2)
        return Backoff(min(self.delay_s * 2, LAST_DELAY_S))

    def due_in_s(self, *, lived_s: float) -> float:
        """Return how long to wait now."""
        return FIRST_DELAY_S if lived_s >= STEADY_S else self.delay_s


class Signals:
    """SIGINT and SIGTERM as something to wait for. The second one runs `at_once` on the spot."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        self._at_once = at_once
        self.asked = False
        self.wake_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {signum: signal.signal(signum, self._heard) for signum in (signal.SIGINT, signal.SIGTERM)}
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self.wake_fd)
        os.close(self._write_fd)

    def wake(self) -> None:
        """Wake the loop from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._write_fd, b"\0")

    def drain(self) -> None:
        """Read what woke the loop."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)

    def run(self, work: Callable[[], ResultT], *, give_up: Callable[[], None]) -> ResultT:
        """Do the work in a thread and return its result; on a signal call `give_up`, then raise StopAsked.

        `give_up` takes away what the work waits for: the thread cannot be interrupted, and it is waited for.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future: Future[ResultT] = pool.submit(work)
            future.add_done_callback(lambda _: self.wake())
            with selectors.DefaultSelector() as selector:
                selector.register(self.wake_fd, selectors.EVENT_READ)
                while not future.done():
                    selector.select()
                    self.drain()
                    if self.asked:
                        give_up()
                        raise StopAsked
            return future.result()

    def _heard(self, _signum: int, _frame: FrameType | None) -> None:
        if self.asked:
            self._at_once()
        self.asked = True


def supervise(ledger: Ledger, signals: Signals, report: Callable[[str], None]) -> None:
    """Keep every child of the ledger running; return when a signal asks for the end."""
    backoffs: dict[str, Backoff] = {}
    due: dict[str, tuple[float, Command]] = {}
    while not signals.asked:
        _wait_for_news(ledger, signals, until_s=min((at_s for at_s, _ in due.values()), default=None))
        now_s = time.monotonic()
        for name, child in list(ledger.children.items()):
            code = child.exit_code()
            if code is None:
                continue
            lived_s = now_s - child.started_s
            backoff = backoffs.get(name, Backoff())
            wait_s = backoff.due_in_s(lived_s=lived_s)
            backoffs[name] = backoff.after(lived_s=lived_s)
            due[name] = (now_s + wait_s, child.command)
            report(
                f"{name} (pid {child.mark.pid}) {said_of(code)} after {lived_s:.1f} s; starts again in {wait_s:.1f} s"
            )
            ledger.strike([child.mark])
        for name in [name for name, (at_s, _) in due.items() if at_s <= now_s]:
            _, command = due.pop(name)
            with contextlib.suppress(StackError):  # The stack is stopping.
                child = ledger.spawn(command)
                report(f"{name} started again (pid {child.mark.pid})")


def said_of(code: int) -> str:
    """Say in words how a process ended."""
    names = {signum.value: signum.name for signum in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with {code}"


def _wait_for_news(ledger: Ledger, signals: Signals, *, until_s: float | None) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(signals.wake_fd, selectors.EVENT_READ)
        for child in list(ledger.children.values()):
            selector.register(child.pidfd, selectors.EVENT_READ)
        selector.select(None if until_s is None else max(0.0, until_s - time.monotonic()))
    signals.drain()
