"""The proxy service as it runs, and a caller of it, for tests: real servers, a real port, real agents."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httptools
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from services.proxy.__main__ import MIGRATIONS, wire
from services.proxy.api.door import Door
from services.proxy.copies import Copies
from services.proxy.settings import Settings
from shared.database import open_pool
from shared.service import Service, running
from tests.conftest import Stack, until

ADMIN = "the-admin-token"
SECRET = "the-delivery-secret"


def proxy_settings(stack: Stack, **changes: object) -> Settings:
    base = stack.settings("proxy").model_dump()
    base.pop("replica_id", None)
    values = {
        **base,
        "allow_loopback": True,
        "admin_token": SecretStr(ADMIN),
        "delivery_secret": SecretStr(SECRET),
        "drain_s": 5.0,
        "http_port": free_port(),
        **changes,
    }
    return Settings.model_validate(values)


def free_port() -> int:
    """One that nobody listens on now, of those that tests may use."""
    while True:
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", random.randrange(26_000, 32_000)))
            port: int = trial.getsockname()[1]
            return port


@dataclass(slots=True)
class Reply:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        return [json.loads(line[5:]) for line in self.body.split(b"\n") if line.startswith(b"data:")]

    # Told by the parser.
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def send(
    url: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """One request on a connection of its own."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}:{port}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
    reply = Reply()
    parser = httptools.HttpResponseParser(reply)
    try:
        with suppress(ConnectionResetError):
            while data := await reader.read(65_536):
                parser.feed_data(data)
                reply.status = parser.get_status_code()
                if reply.complete:
                    break
    finally:
        writer.close()
    return reply


@dataclass(slots=True)
class Proxy:
    """A running replica, and its caller."""

    url: str
    copies: Copies
    service: Service
    door: Door

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = ADMIN, **headers: str
    ) -> Reply:
        """A request; `headers` with underscores for dashes. A body that is no bytes goes as JSON."""
        said = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            said["authorization"] = f"Bearer {token}"
        encoded = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return await send(self.url, method, path, encoded, said)

    async def register(self, name: str, url: str = "", **more: Any) -> dict[str, Any]:
        token = more.pop("token", ADMIN)
        reply = await self.call("POST", "/registry/register", {"id": name, "url": url, **more}, token=token)
        assert reply.status == 200, reply.body
        said: dict[str, Any] = reply.json()
        return said

    async def beat(self, name: str, token: str, active: int = 0, **more: Any) -> Reply:
        body = {"workspace_id": name, "active_tasks": active, **more}
        return await self.call("POST", "/registry/heartbeat", body, token=token)

    async def say(self, name: str, text: str = "hello", *, caller: str = "lead", **more: Any) -> Reply:
        """A 0.3 message/send as the original callers write it, unless `more` says otherwise."""
        headers = {key: more.pop(key) for key in list(more) if key not in _IN_BODY}
        return await self.call(
            "POST", f"/workspaces/{name}/a2a", message(text, **more), x_workspace_id=caller, **headers
        )

    async def ready(self) -> None:
        """A snapshot has come: from now on idle agents are forwarded to."""

        async def has_one() -> bool:
            return self.copies.backlogs.snapshot_at is not None

        await until(has_one)


_IN_BODY = ("message_id", "method", "request_id", "configuration", "metadata", "task_id", "context_id", "params")


def message(text: str, **more: Any) -> bytes:
    """The body of a send."""
    said: dict[str, Any] = {"role": "user", "parts": [{"kind": "text", "text": text}], "kind": "message"}
    said["messageId"] = more.get("message_id") or str(uuid7())
    for name, key in (("metadata", "metadata"), ("task_id", "taskId"), ("context_id", "contextId")):
        if name in more:
            said[key] = more[name]
    params = {"message": said, **more.get("params", {})}
    if "configuration" in more:
        params["configuration"] = more["configuration"]
    method = more.get("method", "message/send")
    return json.dumps({"jsonrpc": "2.0", "id": more.get("request_id", 1), "method": method, "params": params}).encode()


@asynccontextmanager
async def proxy(stack: Stack, **changes: object) -> AsyncIterator[Proxy]:
    """The service's own parts on a real port; at the end it is closed as by SIGTERM."""
    settings = proxy_settings(stack, **changes)
    door = Door()
    async with (
        nothing_left(),
        running("proxy", settings, MIGRATIONS, app=door.app) as service,
        AsyncExitStack() as parts,
    ):
        copies = await wire(service, settings, door, parts)
        task = asyncio.create_task(service.serve())
        try:
            await until(lambda: _has_started(service), 15)
            yield Proxy(f"http://127.0.0.1:{settings.http_port}", copies, service, door)
        finally:
            await door.close(settings.drain_s)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Drivers end their connections in tasks of their own: let them, before the loop is gone."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=2)


async def _has_started(service: Service) -> bool:
    return service.health._started


async def empty(stack: Stack) -> None:
    """No rows of any test before."""
    async with open_pool(stack.settings("proxy")) as pool:
        await pool.execute("TRUNCATE workspaces, callers, audit, outbox")
    async with open_pool(stack.settings("queue")) as pool:
        await pool.execute(
            "TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, "
            "replicas, inbox, outbox, dead_letters"
        )


def fresh(prefix: str = "w") -> str:
    return f"{prefix}-{uuid7().hex[-8:]}"
