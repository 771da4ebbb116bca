"""Ports of one stack: remembered, so that URLs survive a restart, and never given to two stacks at once.

Owns the choice within 20000-26000: below the range that the kernel takes outgoing ports from, so that no connection
can sit on a port between two starts, and apart from the one that agents choose from. Refuses a port that is demanded
and taken.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from deploy.local.errors import StackError
from deploy.local.memory import Memory

LOWEST, HIGHEST = 20_000, 26_000
TRIES = 200
"""Random ports that are looked at before we give up: with a tenth of the range in use, all taken is 1 in 10^200."""


class Ports:
    """Ports that belong to this process until `close`."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._claims: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for claim in self._claims:
            claim.close()

    def claim(self, name: str, *, exactly: int | None = None, prefer: int | None = None) -> int:
        """Return a free port for `name`: the remembered one, else `prefer`, else any."""
        remembered = self._memory.recall(f"port.{name}")
        if exactly is None:
            candidates = wishes(remembered=remembered, prefer=prefer, rest=_any_ports())
        else:
            candidates = iter([exactly])
        port = first_free(candidates, self._take)
        if port is None:
            raise StackError(
                f"port {exactly} is taken; choose another with --port"
                if exactly is not None
                else f"no free port for {name} between {LOWEST} and {HIGHEST}"
            )
        self._memory.keep(f"port.{name}", str(port))
        return port

    def _take(self, port: int) -> bool:
        if not _is_free(port):
            return False
        # An abstract socket is the lock: its names belong to the network namespace as ports do, other users see them
        # too, and it goes when we do. Without it two stacks that start at once would both find the same port free.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0bide-local-port-{port}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True


def wishes(*, remembered: str | None, prefer: int | None, rest: Iterable[int]) -> Iterator[int]:
    """Return the order in which ports are tried."""
    if remembered is not None:
        yield int(remembered)
    if prefer is not None:
        yield prefer
    yield from rest


def first_free(candidates: Iterable[int], take: Callable[[int], bool]) -> int | None:
    """Return the first candidate that could be taken."""
    return next((port for port in candidates if take(port)), None)


def _any_ports() -> Iterator[int]:
    return iter(random.sample(range(LOWEST, HIGHEST), TRIES))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of the last run that linger in TIME_WAIT do not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
