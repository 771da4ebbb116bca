"""The one client that talks to agents: a pool of kept-alive HTTP/1.1 connections, for the proxy and the queue service.

It connects to addresses that it has judged itself, follows no redirect, keeps no cookie, repeats nothing that an agent
may have taken, and tells in types how far a request came: `NotSent`, `Unanswered`, `BodyLost`. What an outcome means is
told by `shared/replies.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Sequence

from shared.addresses import AddressRefused, AddressRules, Lookup, Target, parse_url, system_lookup
from shared.connection import Connection
from shared.dialing import Dialer
from shared.exchange import AgentError, BodyLost, Exchange, Life, Limits, NotSent, TooLarge, Unanswered, Until
from shared.origins import Origin, Pool
from shared.outcomes import Fault

__all__ = [
    "AddressRules", "AgentError", "Agents", "BodyLost", "Exchange", "Headers", "Life", "Limits", "NotSent", "TooLarge",
    "Unanswered", "Until",
]  # fmt: skip

Headers = Sequence[tuple[bytes, bytes]]

_LIMITS = Limits()
_ORIGINS_MAX = 4096
"""Hosts that are remembered before those without a connection are forgotten."""
_METHODS = {name: name.encode() + b" " for name in ("POST", "GET", "HEAD", "PUT", "PATCH", "DELETE")}
_REPEATABLE = frozenset({"GET", "HEAD"})


class Agents:
    """A pool; any number of tasks of one loop may send through it."""

    def __init__(
        self,
        rules: AddressRules,
        *,
        connections_max: int = 256,
        idle_max: int = 1024,
        keepalive_s: float = 4.0,
        head_max_bytes: int = 65_536,
        buffer_max_bytes: int = 262_144,
        lookup: Lookup = system_lookup,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Make a pool that connects where `rules` allow.

        `connections_max` counts per host and port, in use or not; more callers wait. `idle_max` counts the unused ones
        of the whole pool. `keepalive_s` is below the 5 s after which common servers (uvicorn, Node) close, so that a
        request rarely meets a connection that is just being closed. `buffer_max_bytes`: what an exchange holds for a
        slow reader before it stops reading from the agent.
        """
        self._origins: dict[tuple[str, int, bool], Origin] = {}
        self._pool = Pool(
            Dialer(
                rules,
                lookup,
                tls,
                lambda: Connection(
                    keepalive_s=keepalive_s, head_max_bytes=head_max_bytes, buffer_max_bytes=buffer_max_bytes
                ),
            ),
            connections_max=connections_max,
            idle_max=idle_max,
        )

    async def send(
        self,
        url: str,
        body: bytes = b"",
        headers: Headers = (),
        *,
        method: str = "POST",
        limits: Limits = _LIMITS,
        last_life: Life | None = None,
        until: Until | None = None,
        fresh: bool = False,
    ) -> Exchange:
        """Send a request and come back with the head of its answer.

        `fresh` opens a new connection: on it, an end without an answer is never a server's idle timeout. A GET or HEAD
        that met one is repeated once; a POST never is, since the server may have processed it (RFC 9110 §9.2.2).

        `until` bounds it instead of the total limit, and is asked again as long as it runs.

        Raises:
            NotSent: nothing left; `outcome.fault` says why.
            Unanswered: it was sent, and no head came.
        """
        target, request = _request(url, method, headers, body)
        try:
            return await self._send(target, request, method, limits, last_life=last_life, until=until, fresh=fresh)
        except Unanswered as error:
            if not error.stale or method not in _REPEATABLE:
                raise
        return await self._send(target, request, method, limits, last_life=last_life, until=until, fresh=True)

    async def _send(
        self,
        target: Target,
        request: bytes,
        method: str,
        limits: Limits,
        *,
        last_life: Life | None,
        until: Until | None,
        fresh: bool,
    ) -> Exchange:
        origin = self._origin(target)
        connection = None if fresh else origin.take()
        if connection is None:
            connection = await origin.acquire(limits.connect_timeout_s, fresh=fresh)
        exchange = Exchange(connection, limits, last_life, reused=connection.used, head=method == "HEAD", until=until)
        connection.begin(request, exchange)
        try:
            while not exchange.status:
                await exchange.wait()
                exchange.raise_failure()
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def close(self, grace_s: float = 0.0) -> None:
        """Send nothing more; give what runs `grace_s` to end, then hang up."""
        pool = self._pool
        pool.closing = True
        for origin in self._origins.values():
            origin.retire()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(origin.open for origin in self._origins.values()):
                    pool.freed.clear()
                    await pool.freed.wait()
        pool.closed = True
        for origin in self._origins.values():
            origin.hang_up()
        pool.dialer.close()
        for _ in range(3):  # aborted transports are closed in the next turns of the loop
            await asyncio.sleep(0)

    def _origin(self, target: Target) -> Origin:
        if self._pool.closing:
            raise NotSent(Fault.HUNG_UP, "the client is closing")
        key = (target.host, target.port, target.tls)
        origin = self._origins.get(key)
        if origin is None:
            if len(self._origins) >= _ORIGINS_MAX:
                self._origins = {key: origin for key, origin in self._origins.items() if origin.is_used()}
            origin = self._origins[key] = Origin(self._pool, target)
        return origin


_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = frozenset(
    {
        b"connection", b"content-length", b"expect", b"host", b"keep-alive", b"proxy-connection", b"te", b"trailer",
        b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""Headers of the connection and the framing: this client writes them, nobody else."""
_vetted: set[bytes] = set()
"""Names that were found good, as they were written; a bounded memory."""
_VETTED_MAX = 1024


def _request(url: str, method: str, headers: Headers, body: bytes) -> tuple[Target, bytes]:
    try:
        target = parse_url(url)
    except AddressRefused as error:
        raise NotSent(Fault.ADDRESS_REFUSED, str(error)) from None
    if method not in _METHODS:
        raise NotSent(Fault.REQUEST_REFUSED, f"no such method: {method!r}")
    lines = [_METHODS[method], target.path, b" HTTP/1.1\r\nhost: ", target.authority, b"\r\n"]
    for name, value in headers:
        if name not in _vetted:
            _vet(name)
        lines += (name, b": ", value, b"\r\n")
    lines.append(b"content-length: %d\r\n\r\n" % len(body))
    head = b"".join(lines)
    breaks = len(headers) + 4
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head:
        raise NotSent(Fault.REQUEST_REFUSED, "a header's value holds CR, LF or NUL")
    return target, head + body


def _vet(name: bytes) -> None:
    if not _TOKEN.fullmatch(name):
        raise NotSent(Fault.REQUEST_REFUSED, f"a header cannot be named {name!r}")
    if name.lower() in _OURS:
        raise NotSent(Fault.REQUEST_REFUSED, f"the header {name.decode()} is the client's own")
    if len(_vetted) < _VETTED_MAX:
        _vetted.add(name)
