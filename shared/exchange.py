"""One request to an agent and its answer: the limits, the head, the stream of the body, and the four ways it fails.

Whoever reads an exchange waits here; bytes and ends are put in by `shared/connection.py`. What has come before a
failure is read before the failure is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from shared.outcomes import Answer, Fault, NoAnswer

Life = Callable[[], float]
"""When the agent last showed life by other means (a heartbeat, progress), in `time.monotonic()` seconds."""
Until = Callable[[], float]
"""Until when an exchange may last as things stand now, in `time.monotonic()` seconds: it may move meanwhile."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one exchange may take. Times in seconds."""

    connect_timeout_s: float = 5.0
    """For a free connection, the name, TCP and TLS together."""
    idle_timeout_s: float = 300.0
    """Without a byte from the agent and without any other sign of its life."""
    total_timeout_s: float = 86_400.0
    """From the first byte of the request to the last of the answer."""


class AgentError(Exception):
    """An exchange failed; `outcome` is what `shared.replies.classify` takes."""

    def __init__(self, outcome: Answer | NoAnswer, detail: str) -> None:
        super().__init__(f"{outcome.fault}: {detail}")
        self.outcome = outcome


class NotSent(AgentError):  # noqa: N818 - a state of the request, as the three below
    """No byte of the request left: whatever it is, it may be sent again."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(NoAnswer(sent=False, fault=fault), detail)


class Unanswered(AgentError):  # noqa: N818
    """The request was sent, and no head of an answer came: the agent may have taken it."""

    def __init__(self, fault: Fault, detail: str, *, stale: bool) -> None:
        super().__init__(NoAnswer(sent=True, fault=fault), detail)
        self.stale = stale
        """A reused connection ended without one byte: what an idempotent request may be repeated after."""


class BodyLost(AgentError):  # noqa: N818
    """A head came, and not the whole body."""


class TooLarge(AgentError):  # noqa: N818
    """The body is larger than the reader takes."""


class Wire(Protocol):
    """What an exchange asks of its connection."""

    def drained(self) -> None:
        """Read on: everything that had come was taken."""

    def hang_up(self, detail: str) -> None:
        """Close: the rest of the answer is not wanted."""


class Exchange:
    """A request that was sent. Use it as an async context manager: what is not read to its end is closed."""

    __slots__ = (
        "_body_end", "_buffered", "_error", "_headers", "_idle_s", "_life", "_pieces", "_total_at", "_until", "_waiter",
        "_wire", "head_only", "raw_headers", "reused", "seen_at", "status",
    )  # fmt: skip

    def __init__(
        self,
        wire: Wire,
        limits: Limits,
        life: Life | None,
        *,
        reused: bool,
        head: bool,
        until: Until | None = None,
    ) -> None:
        self.status = 0
        """0 until the head has come; `Agents.send` gives an exchange away only after that."""
        self.raw_headers: list[tuple[bytes, bytes]] = []
        """Names in lower case, in the order they came."""
        self.reused = reused
        self.head_only = head
        self.seen_at = monotonic()
        self._waiter: asyncio.Future[None] | None = None
        self._wire: Wire | None = wire
        self._idle_s = limits.idle_timeout_s
        self._total_at = self.seen_at + limits.total_timeout_s
        self._life = life
        self._until = until
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._body_end = False
        self._error: AgentError | None = None
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """By name in lower case; values of a name that stands twice are joined with a comma."""
        if self._headers is None:
            self._headers = {}
            for raw_name, raw_value in self.raw_headers:
                name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
                self._headers[name] = f"{self._headers[name]}, {value}" if name in self._headers else value
        return self._headers

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes: each chunk is all that is there.

        Raises:
            BodyLost: while iterating, after what came before.
        """
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._next()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def read(self, max_bytes: int) -> bytes:
        """The whole body.

        Raises:
            TooLarge: it is larger than `max_bytes`; the connection is closed.
            BodyLost: it did not come whole.
        """
        if not self._body_end:
            declared = self.headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > max_bytes:
                raise self._too_large(max_bytes)
        pieces: list[bytes] = []
        left = max_bytes
        while chunk := await self._next():
            left -= len(chunk)
            if left < 0:
                raise self._too_large(max_bytes)
            pieces.append(chunk)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _next(self) -> bytes:
        """All that is there; empty at the end."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._body_end:
                return b""
            await self.wait()
        pieces, self._pieces, self._buffered = self._pieces, [], 0
        if self._wire is not None:
            self._wire.drained()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_large(self, max_bytes: int) -> TooLarge:
        self.close()
        answer = Answer(self.status, self.headers, None, Fault.TOO_LARGE)
        return TooLarge(answer, f"the body has more than {max_bytes} bytes")

    def close(self) -> None:
        """Hang up, if the answer has not come whole; nothing otherwise."""
        if self._wire is not None:
            self._wire.hang_up("the exchange was closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    async def wait(self) -> None:
        """Wait for the next thing to happen: the head, a chunk, the end."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # ── told by the connection ──────────────────────────────────────────────────────────────────────────────────────

    def arrived(self, piece: bytes) -> int:
        """Take a piece of the body; how much is waiting to be read now."""
        self._pieces.append(piece)
        self._buffered += len(piece)
        self.wake()
        return self._buffered

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def finish(self) -> None:
        self._body_end, self._wire = True, None
        self.wake()

    def fail(self, fault: Fault, detail: str, *, nothing_came: bool) -> None:
        if self.status:
            self._error = BodyLost(Answer(self.status, self.headers, None, fault), detail)
        else:
            self._error = Unanswered(fault, detail, stale=self.reused and nothing_came)
        self._wire = None
        self.wake()

    def raise_failure(self) -> None:
        """Raise what happened before the head."""
        if self._error is not None and not self.status:
            raise self._error

    def deadline(self, *, paused: bool) -> tuple[float, Fault]:
        """The next moment at which this is over unless something happens. A reader's slowness is not the agent's."""
        total_at = self._total_at if self._until is None else self._until()
        if paused:
            return total_at, Fault.TOTAL_TIMEOUT
        seen_at = self.seen_at if self._life is None else max(self.seen_at, self._life())
        idle_at = seen_at + self._idle_s
        return (idle_at, Fault.IDLE_TIMEOUT) if idle_at < total_at else (total_at, Fault.TOTAL_TIMEOUT)
