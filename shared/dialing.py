"""Making a connection to an agent.

Its name is resolved anew each time, every address is judged, and the socket is connected to the very address that was
judged; SNI and Host stay the name.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from time import monotonic

from shared.addresses import AddressRefused, AddressRules, Lookup, Target, resolve
from shared.connection import Connection
from shared.exchange import NotSent
from shared.outcomes import Fault

_ADDRESSES_MAX = 4
"""Addresses of one name that are tried, each with a fair share of the time that is left."""
_OURS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM}
)
"""Errors of this machine, which say nothing about the agent."""
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED})


class Dialer:
    """Makes connections with `make`, where `rules` allow."""

    def __init__(
        self, rules: AddressRules, lookup: Lookup, tls: ssl.SSLContext | None, make: Callable[[], Connection]
    ) -> None:
        self._rules = rules
        self._lookup = lookup
        self._tls = tls
        self._make = make
        self._lookups: dict[tuple[str, int], asyncio.Task[Sequence[str]]] = {}

    async def dial(self, target: Target, timeout_s: float) -> Connection:
        """Resolve, judge, connect and make TLS, all within `timeout_s`.

        Raises:
            NotSent: the fault names the step.
        """
        until = monotonic() + timeout_s
        addresses = (await self._addresses(target, timeout_s))[:_ADDRESSES_MAX]
        failure: NotSent | None = None
        for number, address in enumerate(addresses):
            share_s = max(0.0, until - monotonic()) / (len(addresses) - number)
            try:
                async with asyncio.timeout(share_s):
                    return await self._connect(address, target)
            except TimeoutError:
                failure = NotSent(Fault.CONNECT_TIMEOUT, f"no connection to {address} within {share_s:.1f} s")
            except NotSent as error:
                failure = error
        assert failure is not None, "resolve gives at least one address"
        raise failure

    def close(self) -> None:
        for task in self._lookups.values():
            task.cancel()

    async def _addresses(self, target: Target, timeout_s: float) -> Sequence[str]:
        """One lookup per name at a time: a resolver that hangs holds one of the few threads there are, not all."""
        key = (target.host, target.port)
        task = self._lookups.get(key)
        if task is None:
            task = self._lookups[key] = asyncio.create_task(self._resolve(target), name="resolve")
            task.add_done_callback(lambda done: self._forget(key, done))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise NotSent(Fault.DNS, f"{target.host} was not resolved within {timeout_s:.1f} s") from None
        except asyncio.CancelledError:
            if task.cancelled():
                raise NotSent(Fault.HUNG_UP, "the client was closed") from None
            raise

    def _forget(self, key: tuple[str, int], done: asyncio.Task[Sequence[str]]) -> None:
        del self._lookups[key]
        if not done.cancelled():
            done.exception()  # whoever asked may have given up: then nobody else looks at it

    async def _resolve(self, target: Target) -> Sequence[str]:
        try:
            return await resolve(target, self._rules, self._lookup)
        except AddressRefused as error:
            raise NotSent(Fault.ADDRESS_REFUSED, str(error)) from None
        except (OSError, UnicodeError) as error:
            raise NotSent(Fault.DNS, str(error)) from None

    async def _connect(self, address: str, target: Target) -> Connection:
        try:
            peer = await _tcp(address, target.port)
        except OSError as error:
            raise NotSent(_fault(error), f"{address}: {error}") from None
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                self._make,
                sock=peer,
                ssl=self._context() if target.tls else None,
                server_hostname=target.host.rstrip(".") if target.tls else None,
            )
        except OSError as error:
            peer.close()
            raise NotSent(Fault.TLS if target.tls else _fault(error), f"{address}: {error}") from None
        except BaseException:
            peer.close()
            raise
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # made when it is first needed: reading the system's certificates takes its time
            self._tls = ssl.create_default_context()
        return self._tls


async def _tcp(address: str, port: int) -> socket.socket:
    peer = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        peer.setblocking(False)  # noqa: FBT003 - its only parameter
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(peer, (address, port))
    except BaseException:
        peer.close()
        raise
    return peer


def _fault(error: OSError) -> Fault:
    if isinstance(error, TimeoutError):
        return Fault.CONNECT_TIMEOUT
    if error.errno in _OURS:
        return Fault.NO_CONNECTION
    return Fault.CONNECTION_REFUSED if error.errno in _REFUSED else Fault.UNREACHABLE
