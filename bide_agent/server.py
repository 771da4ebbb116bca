"""HTTP under the agent: uvicorn, one request as an `Exchange`, and the hanging up that ASGI has no word for."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LOWEST, HIGHEST = 26_000, 32_000
"""Below the range that the kernel takes outgoing ports from: a restarted agent can have its port again. Apart from the
local stack's: a server that is being started again shall find its port free."""
TRIES = 200
BODY_MAX = 16 * 1024 * 1024
BACKSTOP_S = 2
"""When every turn has been cut, uvicorn cancels what is still open after this long: a caller that does not read."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TooLargeError(Exception):
    """A body over `BODY_MAX`."""


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.from_loopback = bool(scope["client"]) and scope["client"][0] in {"127.0.0.1", "::1"}
        self._transport: asyncio.Transport = scope["bide.transport"]
        self._receive = receive
        self._send = send

    async def body(self) -> bytes:
        """Read the whole body.

        Raises:
            TooLargeError: it is longer than `BODY_MAX`.
        """
        chunks = bytearray()
        while True:
            read = await self._receive()
            chunks += read.get("body", b"")
            if len(chunks) > BODY_MAX:
                raise TooLargeError
            if not read.get("more_body"):
                return bytes(chunks)

    async def respond(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        """Answer whole. Header names are written with `_` for `-`."""
        await self.begin(status, content_type, content_length=str(len(body)), **headers)
        await self._send({"type": "http.response.body", "body": body})

    async def problem(self, status: int, title: str, detail: str, **headers: str) -> None:
        body = {"type": "about:blank", "status": status, "title": title, "detail": detail}
        await self.respond(status, json.dumps(body).encode(), "application/problem+json", **headers)

    async def begin(self, status: int, content_type: str, **headers: str) -> None:
        named = {"content_type": content_type, **headers}
        sent = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def write(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def gone(self) -> None:
        """Come back when the connection is closed, by whichever side."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def hang_up(self) -> None:
        """Close the connection once what was written has left; the caller reads EOF."""
        self._transport.close()

    async def drop(self) -> None:
        """Hang up and wait until it is so: uvicorn would answer 500 to an app that ends before."""
        self.hang_up()
        await self.gone()


class _Protocol(HttpToolsProtocol):
    def on_message_begin(self) -> None:
        """Put the connection into the scope, so that an exchange can hang up."""
        super().on_message_begin()
        cast("Scope", self.scope)["bide.transport"] = self.transport


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._told.set()

    async def main_loop(self) -> None:
        """Wait to be told instead of looking ten times a second: a test may run a hundred agents in one loop."""
        await self._told.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the loop: an agent may be one of many in it."""
        yield


@asynccontextmanager
async def serving(app: Callable[[Exchange], Awaitable[None]], listener: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on `listener` for the length of the block."""

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        await app(Exchange(scope, receive, send))

    config = uvicorn.Config(
        asgi, lifespan="off", log_config=None, access_log=False, http=_Protocol, ws="none",
        timeout_graceful_shutdown=BACKSTOP_S,
    )  # fmt: skip
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="agent http")
    try:
        yield
    finally:
        server.stop()
        await task


def listen(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Listen, on loopback if nothing else is said.

    Raises:
        OSError: the port is taken, or, for port 0, 200 random ones were.
    """
    if port:
        return _listen(port, host)
    for candidate in random.sample(range(LOWEST, HIGHEST), TRIES):
        try:
            return _listen(candidate, host)
        except OSError:
            continue
    raise OSError(f"no free port found between {LOWEST} and {HIGHEST}")


def _listen(port: int, host: str) -> socket.socket:
    listener = socket.create_server((host, port), backlog=2048)
    # Inherited by what it accepts: an answer in two writes would wait 40 ms for the caller's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def told(body: bytes) -> Mapping[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("the body is no JSON object")  # noqa: TRY004 - one class for every body that is unfit
    return value
