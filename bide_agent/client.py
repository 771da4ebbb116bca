"""The one HTTP client of the agent: a request per connection, bounded in time and size, HTTP and HTTPS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

READ_MAX = 128 * 1024 * 1024


class UnreachableError(Exception):
    """No answer came: refused, reset, cut, too late, or no HTTP."""


@dataclass(slots=True)
class Reply:
    """What came back. Header names are lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        """The body as an object; empty where it is none: what a stranger answers is never a reason to fall over."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


class _Reader:
    """Collects what httptools calls out; the names of the methods are its own."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def request(
    method: str, url: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None, timeout_s: float = 5.0
) -> Reply:
    """Send one request and read the whole answer.

    Raises:
        UnreachableError: no whole answer within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _request(method, url, body, headers or {})
    except TimeoutError:
        raise UnreachableError(f"{url}: no answer within {timeout_s:g} s") from None
    except (OSError, httptools.HttpParserError) as error:
        raise UnreachableError(f"{url}: {type(error).__name__}: {error}") from None


async def _request(method: str, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), ssl=True if secure else None
    )
    try:
        named = {"host": parts.netloc, "content-length": str(len(body)), "connection": "close", **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        writer.write(f"{method} {parts.path or '/'} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body)
        await writer.drain()
        return await _read(reader, url)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, url: str) -> Reply:
    read = _Reader()
    parser = httptools.HttpResponseParser(read)
    while not read.complete:
        chunk = await reader.read(65_536)
        if not chunk:
            raise UnreachableError(f"{url}: the connection was closed in the middle of the answer")
        parser.feed_data(chunk)
        if len(read.body) > READ_MAX:
            raise UnreachableError(f"{url}: the answer is over {READ_MAX} bytes")
    return Reply(parser.get_status_code(), read.headers, bytes(read.body))


async def post(url: str, body: Mapping[str, Any], *, token: str | None = None, timeout_s: float = 5.0) -> Reply:
    """Send JSON. Raises `UnreachableError` as `request` does."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
    return await request("POST", url, json.dumps(body).encode(), headers=headers, timeout_s=timeout_s)
