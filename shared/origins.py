"""The places that connections to one host take: who may have one, who waits for one, which are idle.

A place is given on, never given up, while somebody waits, so that nobody who comes later passes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field
from time import monotonic

from shared.addresses import Target
from shared.connection import Connection
from shared.dialing import Dialer
from shared.exchange import NotSent
from shared.outcomes import Fault


@dataclass(slots=True)
class Pool:
    """What the origins of one client share."""

    dialer: Dialer
    connections_max: int
    """Per origin."""
    idle_max: int
    """Of all origins."""
    idle: int = 0
    closing: bool = False
    """Nothing new begins."""
    closed: bool = False
    """Nothing goes on."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a place becomes free."""


class Origin:
    """The connections to one host and port, and who waits for one."""

    def __init__(self, pool: Pool, target: Target) -> None:
        self.open = 0
        """Places taken: connections, and attempts to make one."""
        self._pool = pool
        self._target = target
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()

    def is_used(self) -> bool:
        return bool(self.open or self._waiting)

    def take(self) -> Connection | None:
        """The idle connection that was used last; so those that are not needed grow old and go."""
        while self._idle:
            connection = self._pop_idle()
            if connection.is_usable():
                return connection
            connection.discard()
        return None

    async def acquire(self, timeout_s: float, *, fresh: bool) -> Connection:
        """A connection, made or waited for.

        Raises:
            NotSent: none was free, or none could be made, within `timeout_s`.
        """
        until = monotonic() + timeout_s
        while True:
            if self._pool.closed:
                raise NotSent(Fault.HUNG_UP, "the client was closed")
            if self.open < self._pool.connections_max and not self._waiting:
                self.open += 1
                break
            if fresh and self._idle:
                self._pop_idle().discard()
                continue
            connection = await self._wait(until - monotonic())
            if connection is None:
                break  # its place is ours
            if connection not in self._connections:
                continue  # it ended while it was handed over, and its place went to somebody else
            if not fresh and connection.is_usable():
                return connection
            self._connections.discard(connection)
            connection.settle(None)
            connection.discard()
            break
        return await self._make(until - monotonic())

    async def _make(self, timeout_s: float) -> Connection:
        try:
            connection = await self._pool.dialer.dial(self._target, timeout_s)
        except BaseException:
            self._free()
            raise
        connection.settle(self)
        if self._pool.closed:
            connection.discard()
            raise NotSent(Fault.HUNG_UP, "the client was closed")
        self._connections.add(connection)
        return connection

    async def _wait(self, timeout_s: float) -> Connection | None:
        """A connection, or None for the place of one."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Connection | None] = loop.create_future()
        timer = loop.call_later(max(0.0, timeout_s), _give_up, waiter)
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:  # it was served in the same moment
                self._pass_on(waiter.result())
            raise
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)

    def _pass_on(self, connection: Connection | None) -> None:
        if connection is None:
            self._free()
        elif connection in self._connections:
            self.returned(connection)

    def returned(self, connection: Connection) -> None:
        """Its exchange ended and it may be used again."""
        if self._serve(connection):
            return
        if self._pool.closing or self._pool.idle >= self._pool.idle_max:
            connection.discard()
            return
        self._idle.append(connection)
        self._pool.idle += 1

    def gone(self, connection: Connection) -> None:
        """It was closed, by whichever side."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._pool.idle -= 1
        self._free()

    def retire(self) -> None:
        """Close what is idle and turn away who waits."""
        while self._idle:
            self._pop_idle().discard()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(NotSent(Fault.HUNG_UP, "the client is closing"))

    def hang_up(self) -> None:
        for connection in list(self._connections):
            connection.hang_up("the client was closed")

    def _pop_idle(self) -> Connection:
        self._pool.idle -= 1
        return self._idle.pop()

    def _free(self) -> None:
        if not self._serve(None):
            self.open -= 1
            self._pool.freed.set()

    def _serve(self, connection: Connection | None) -> bool:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False


def _give_up(waiter: asyncio.Future[Connection | None]) -> None:
    if not waiter.done():
        waiter.set_exception(NotSent(Fault.NO_CONNECTION, "all connections to this address are in use"))
