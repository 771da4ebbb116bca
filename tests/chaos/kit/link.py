"""A TCP proxy before a server, and what a network does to connections: delay, cut, silence, an answer that is lost.

One `Link` stands between one process and one server, so that a fault hits exactly that process. It runs in the test's
own loop. Nothing is decoded but what a `cut_after` looks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

_CHUNK = 65_536
_LINGER_NONE = struct.pack("ii", 1, 0)
Way = Literal["up", "down"]
"""up: from the process to the server."""


@dataclass(eq=False)
class _Pair:
    """One connection: two streams and the two pumps between them."""

    process: asyncio.StreamWriter
    server: asyncio.StreamWriter
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    met: int = 0
    """How many of the marks of a `hold_after` have come."""

    def reset(self) -> None:
        """End both halves with RST: neither side learns what the other had still sent."""
        for writer in (self.process, self.server):
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            writer.transport.abort()
        for task in self.tasks:
            task.cancel()


class Link:
    """All connections of one process to one server, and their faults."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._pairs: set[_Pair] = set()
        self._open: dict[Way, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._cut_after: tuple[Way, bytes, asyncio.Event] | None = None
        self._hold_after: tuple[Sequence[bytes], asyncio.Event] | None = None
        self._refusing = False
        self.delay_s = 0.0
        """Added to each chunk in each direction, in order: what a slow or far server costs a round trip, twice."""
        self.listening_on = 0
        for gate in self._open.values():
            gate.set()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def reset(self) -> None:
        """Cut every connection that there is now; new ones may come."""
        for pair in list(self._pairs):
            pair.reset()

    def hold(self, *ways: Way) -> None:
        """Let nothing through any more, without closing: a black hole, or with one way a half-open connection."""
        for way in ways or ("up", "down"):
            self._open[way].clear()

    def release(self) -> None:
        """Let through what was held, in order."""
        for gate in self._open.values():
            gate.set()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Cut what there is and take nothing new: the server is away, for this process."""
        self._refusing = True
        self.reset()
        try:
            yield
        finally:
            self._refusing = False

    def cut_after(self, mark: bytes, way: Way = "up") -> asyncio.Event:
        """Let the next chunk with `mark` pass, and then cut its connection before an answer comes back.

        Returns: set once that has happened.
        """
        done = asyncio.Event()
        self._cut_after = (way, mark, done)
        return done

    def hold_after(self, *marks: bytes) -> asyncio.Event:
        """Let no answer through any more once each of `marks` has come from the process, in turn on one connection.

        The chunk with the last of them still passes: the server acts on it.

        Returns: set once that has happened.
        """
        done = asyncio.Event()
        self._hold_after = (marks, done)
        return done

    async def serve(self, process: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        """One new connection of the process."""
        if self._refusing:
            back.transport.abort()
            return
        try:
            server, to_server = await asyncio.open_connection(*self._target)
        except OSError:
            back.transport.abort()
            return
        pair = _Pair(back, to_server)
        self._pairs.add(pair)
        pair.tasks = [
            asyncio.create_task(self._pump(pair, process, to_server, "up")),
            asyncio.create_task(self._pump(pair, server, back, "down")),
        ]
        try:
            await asyncio.gather(*pair.tasks, return_exceptions=True)
        finally:
            self._pairs.discard(pair)
            pair.reset()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*pair.tasks, return_exceptions=True)

    async def _pump(self, pair: _Pair, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: Way) -> None:
        try:
            while chunk := await source.read(_CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._open[way].wait()
                cut = self._meets(way, chunk)
                if way == "up":
                    self._follow(pair, chunk)
                target.write(chunk)
                await target.drain()
                if cut is not None:
                    # Half a second for the server to act on it; its answer is held back meanwhile.
                    await self._cut(pair, cut)
                    return
            await self._open[way].wait()  # a black hole swallows goodbyes too
            if target.can_write_eof():
                target.write_eof()
        except OSError:
            await self._open[way].wait()
            pair.reset()  # a killed process resets its connections: the server must hear of it

    def _meets(self, way: Way, chunk: bytes) -> asyncio.Event | None:
        if self._cut_after is None or self._cut_after[0] != way or self._cut_after[1] not in chunk:
            return None
        done, self._cut_after = self._cut_after[2], None
        return done

    def _follow(self, pair: _Pair, chunk: bytes) -> None:
        if self._hold_after is None:
            return
        marks, done = self._hold_after
        while pair.met < len(marks) and marks[pair.met] in chunk:
            pair.met += 1
        if pair.met == len(marks):
            self._hold_after = None
            self.hold("down")
            done.set()

    async def _cut(self, pair: _Pair, done: asyncio.Event) -> None:
        other = next(task for task in pair.tasks if task is not asyncio.current_task())
        other.cancel()
        await asyncio.sleep(_ACT_S)
        pair.reset()
        done.set()


_ACT_S = 0.5
"""How long a server gets to act on the last thing it was sent."""


@asynccontextmanager
async def link(host: str, port: int, *, listen_on: int) -> AsyncIterator[Link]:
    """A link to host:port that listens on 127.0.0.1:`listen_on`."""
    made = Link(host, port)
    server = await asyncio.start_server(made.serve, "127.0.0.1", listen_on)
    made.listening_on = listen_on
    try:
        yield made
    finally:
        server.close()
        made.release()
        made.reset()
