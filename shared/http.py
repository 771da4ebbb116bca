"""The small HTTP face that every service has: health, metrics, problems, and the server under it.

The proxy's own routes stand in `services/proxy`; they answer with the same `respond` and `problem`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from shared.settings import SharedSettings
from shared.telemetry import Health, log

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_GRACE_S = 5
"""How long open requests may finish once the server is told to stop."""


def health_app(health: Health) -> App:
    """Serve `/livez`, `/readyz` and `/metrics`; anything else is a 404 problem."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        match scope["path"]:
            case "/livez":
                stuck = health.stuck()
                await respond(send, 503 if stuck else 200, {"status": "stuck" if stuck else "alive", **stuck})
            case "/readyz":
                ready, report = await health.check()
                await respond(send, 200 if ready else 503, {"status": "ready" if ready else "not ready", **report})
            case "/metrics":
                await _send(send, 200, CONTENT_TYPE_LATEST, generate_latest(REGISTRY))
            case path:
                detail = f"There is no {path} here. Try /livez, /readyz or /metrics."
                await problem(send, 404, "Not found", detail)

    return app


async def respond(send: Send, status: int, body: Mapping[str, Any]) -> None:
    await _send(send, status, "application/json", json.dumps(body).encode())


async def problem(send: Send, status: int, title: str, detail: str) -> None:
    """Answer with application/problem+json (RFC 9457): `detail` says what, why and what to do next."""
    body = json.dumps({"type": "about:blank", "status": status, "title": title, "detail": detail}).encode()
    await _send(send, status, "application/problem+json", body)


async def _send(send: Send, status: int, content_type: str, body: bytes) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service: it stops its parts in an order of its own."""
        yield


@asynccontextmanager
async def serving(app: App, settings: SharedSettings) -> AsyncIterator[str]:
    """Serve `app` for the length of the block; yield the base URL.

    Raises:
        OSError: the address is taken.
    """
    family = socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET
    listener = socket.create_server((settings.http_host, settings.http_port), family=family, backlog=2048)
    # Inherited by what it accepts. asyncio sets it only on sockets that know their protocol, and an answer in two
    # writes would wait 40 ms for the caller's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, http="httptools", timeout_graceful_shutdown=_GRACE_S
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    host = f"[{settings.http_host}]" if family == socket.AF_INET6 else settings.http_host
    url = f"http://{host}:{listener.getsockname()[1]}"
    log.info("listening", url=url)
    try:
        yield url
    finally:
        server.should_exit = True
        await task
