"""One kept-alive HTTP/1.1 connection: the wire under `shared/exchange.py`.

It carries one exchange after the other, without pipelining, and it knows whether a byte of a request may have left:
that alone separates `not delivered` from `unknown`. It takes no task and, while traffic flows, no timer: one lazy timer
looks again when its time has come.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Mapping
from time import monotonic
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from shared.exchange import Exchange, NotSent
from shared.outcomes import Fault

_NEVER = float("inf")
_TIMER_SLACK_S = 0.002
"""Loops keep time in milliseconds: a timer that comes this much early has come."""
_LOOK_AGAIN_S = 30.0
"""An end that was far away may have come nearer (`Until`): it is looked at this often."""
_SWITCHING = 101
_RDHUP: int = getattr(select, "POLLRDHUP", 0)


class Home(Protocol):
    """Where a connection belongs: told once when it may be used again, or once that it is gone."""

    def returned(self, connection: Connection) -> None: ...
    def gone(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to one address, and the exchange that runs on it."""

    __slots__ = (
        "_buffer_max", "_came", "_complete", "_exchange", "_head", "_head_max", "_home", "_interim", "_keep",
        "_keepalive_s", "_loop", "_parser", "_paused", "_poll", "_stale_at", "_timer", "_timer_at", "_transport",
        "_unread", "used",
    )  # fmt: skip

    def __init__(self, *, keepalive_s: float, head_max_bytes: int, buffer_max_bytes: int) -> None:
        self.used = False
        """Whether a request has gone out on it."""
        self._loop = asyncio.get_running_loop()
        self._home: Home | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._poll = select.poll()
        self._exchange: Exchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = _NEVER
        self._keepalive_s = self._stale_at = keepalive_s
        self._head_max = head_max_bytes
        self._buffer_max = buffer_max_bytes
        self._came = self._complete = self._interim = self._keep = self._paused = False
        self._head = self._unread = 0

    # ── used by the pool and by exchanges ───────────────────────────────────────────────────────────────────────────

    def settle(self, home: Home | None) -> None:
        """Belong to `home` from now on, or to nobody who wants to hear of its end."""
        self._home = home

    def is_usable(self) -> bool:
        """Whether a request may go out on it now, as far as can be known.

        Not too long idle, and nothing unread in the socket: an end that the peer has sent is seen even before the
        loop comes round to it. What is still under way cannot be seen: that request ends as unknown.
        """
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and monotonic() < self._stale_at
            and not self._poll.poll(0)
        )

    def begin(self, request: bytes, exchange: Exchange) -> None:
        """Send a request. From here on a byte of it may have left.

        Raises:
            NotSent: the connection is closed.
        """
        if self._transport is None or self._transport.is_closing():
            self.discard()
            raise NotSent(Fault.CONNECTION_REFUSED, "the connection was closed before the request was written")
        self._exchange = exchange
        self._came = self._complete = self._interim = False
        self.used = True
        self._head = self._unread = 0
        self._transport.write(request)
        self._watch(exchange.deadline(paused=False)[0])

    def drained(self) -> None:
        """The reader took everything."""
        if self._paused and self._exchange is not None:
            self._exchange.seen_at = monotonic()
            self._resume()
            self._watch(self._exchange.deadline(paused=False)[0])

    def hang_up(self, detail: str) -> None:
        self._break(Fault.HUNG_UP, detail)

    def discard(self) -> None:
        """Close it and free its place; an exchange on it must have ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        home, self._home = self._home, None
        if home is not None:
            home.gone(self)

    # ── told by the loop ────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self._stale_at = monotonic() + self._keepalive_s
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN | _RDHUP)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # nothing was asked: a 408 for an idle connection, or noise
            self.discard()
            return
        exchange.seen_at = monotonic()
        self._came = True
        self._unread += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self._complete:
                self._break(Fault.MALFORMED, str(error.__context__ or error))
                return
            self._keep = False
        if self._complete:
            self._end(exchange)
        elif self._unread > self._head_max:  # the head, or what stands between two pieces of a body
            self._break(Fault.MALFORMED, f"more than {self._head_max} bytes of head")

    def eof_received(self) -> None:
        """Let the transport close: `connection_lost` follows."""

    def connection_lost(self, error: Exception | None) -> None:
        exchange = self._exchange
        if exchange is not None and error is None and exchange.status and _ends_with_connection(exchange.headers):
            self._keep = False
            self._end(exchange)
        elif exchange is not None:
            self._break(Fault.EOF if error is None else Fault.RESET, str(error or "the agent closed the connection"))
        else:
            self.discard()

    # ── told by the parser ──────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more came than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._head += len(name) + len(value) + 4
        if self._head > self._head_max:
            raise ValueError(f"more than {self._head_max} bytes of head")
        if not exchange.status:  # otherwise it is a trailer
            exchange.raw_headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        status = self._parser.get_status_code()
        if status < 200:  # noqa: PLR2004
            if status == _SWITCHING:
                raise ValueError("it switched protocols, which nobody asked for")
            self._interim = True
            exchange.raw_headers.clear()
            return
        self._unread = 0
        exchange.status = status
        self._keep = self._parser.should_keep_alive()
        if exchange.head_only:  # the parser cannot know, and would wait for a body
            self._complete, self._keep = True, False
        exchange.wake()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._unread = 0
        if exchange.arrived(body) > self._buffer_max and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = not self._interim
        self._interim = False

    # ── how it ends ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, exchange: Exchange) -> None:
        """The answer came whole; what is buffered is the reader's, the connection is free."""
        self._exchange = None
        self._resume()
        exchange.finish()
        # What is still unwritten when the answer has come would be read as the next request.
        written = self._transport is not None and not self._transport.get_write_buffer_size()
        if self._keep and written and self._home is not None:
            keepalive_s = _keepalive_s(exchange.raw_headers, self._keepalive_s)
            self._stale_at = monotonic() + keepalive_s
            self._watch(self._stale_at)
            self._home.returned(self)
        else:
            self.discard()

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._paused = False

    def _break(self, fault: Fault, detail: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(fault, detail, nothing_came=not self._came)
        self.discard()

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self, at: float) -> None:
        at = min(at, monotonic() + _LOOK_AGAIN_S)
        if at >= self._timer_at:  # the timer that runs will look again
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.0, at - monotonic()), self._look)

    def _look(self) -> None:
        self._timer, self._timer_at = None, _NEVER
        exchange = self._exchange
        at, fault = (self._stale_at, Fault.HUNG_UP) if exchange is None else exchange.deadline(paused=self._paused)
        if monotonic() < at - _TIMER_SLACK_S:
            self._watch(at)
        elif exchange is None:
            self.discard()
        else:
            self._break(fault, "nothing came" if fault is Fault.IDLE_TIMEOUT else "it took too long")


def _ends_with_connection(headers: Mapping[str, str]) -> bool:
    """Whether the end of the connection is the end of the body (RFC 9112 §6.3)."""
    coding = headers.get("transfer-encoding")
    if coding is not None:
        return not coding.lower().rstrip().endswith("chunked")
    return "content-length" not in headers


def _keepalive_s(headers: list[tuple[bytes, bytes]], ours_s: float) -> float:
    """How long the connection may wait for its next use: a second less than the server says it keeps it."""
    for name, value in headers:
        if name == b"keep-alive":
            said = value.lower().partition(b"timeout=")[2].partition(b",")[0].strip()
            if said.isdigit():
                return min(ours_s, max(0.0, int(said[:6]) - 1.0))
    return ours_s
