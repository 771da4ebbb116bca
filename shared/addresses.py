"""Where Bide may connect to: the check of an agent's URL, and of every address that its name resolves to.

An agent's URL is a wish of a stranger (SSRF). `check_url` judges it when it is registered; `resolve` judges what the
name means at the moment of connecting, and the connection goes to the address that was judged, so that a name that
changes its meaning in between gains nothing. Redirects are nobody's business here: the client follows none.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name and port → addresses as text."""

URL_MAX = 2048


class AddressRefused(Exception):  # noqa: N818 - a state of the address, not an error of the program
    """Bide does not connect there; the message is a sentence for whoever registered it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, taken apart once."""

    host: str
    """A name, or an address without brackets."""
    port: int
    tls: bool
    path: bytes
    """With its query."""
    authority: bytes
    """For the Host header."""


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


_METADATA = frozenset(
    ip_address(text)
    for text in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
"""Where clouds hand out credentials. Two of them stand inside ranges that an operator may allow."""
_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
_LINK_LOCAL = _networks("169.254.0.0/16", "fe80::/10")
_RESERVED = _networks(
    "0.0.0.0/8", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "240.0.0.0/4", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)  # fmt: skip
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class AddressRules:
    """What the operator allows beyond the public internet."""

    allow_loopback: bool = False
    private_networks: tuple[Network, ...] = ()
    """Parts of the private ranges that agents live in; nothing outside those ranges is allowed by standing here."""

    def refusal(self, text: str) -> str | None:
        """Why this address is never connected to; None: it may be."""
        address = _inner(ip_address(text.partition("%")[0]))
        if _within(address, _PRIVATE) and address not in _METADATA:
            allowed = _within(address, self.private_networks)
            return None if allowed else f"{text} is private and in none of the networks that the operator allows."
        if address.is_loopback:
            return (
                None if self.allow_loopback else f"{text} is this very machine; only BIDE_ALLOW_LOOPBACK permits that."
            )
        never = _never(address)
        return f"{text} is {never}, which is never connected to." if never else None


def _never(address: Address) -> str | None:
    if address in _METADATA:
        return "a cloud's metadata service"
    if _within(address, _LINK_LOCAL):
        return "link-local"
    if address.is_unspecified or address.is_multicast or _within(address, _RESERVED):
        return "not the address of one host (unspecified, multicast, broadcast or reserved)"
    return "reserved" if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6 else None


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for: that is where the packets go."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


_UNPRINTABLE = re.compile(r"[^\x21-\x7e]|[\\\"<>^`{|}]")
_NAME = re.compile(r"(?=.{1,253}\.?$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")
_PORTS = {"http": 80, "https": 443}


@lru_cache(maxsize=4096)
def parse_url(url: str) -> Target:
    """Take a URL apart.

    Raises:
        AddressRefused: it is none that a request can be sent to; the sentence says which part and why.
    """
    if len(url) > URL_MAX:
        raise AddressRefused(f"The URL is longer than {URL_MAX} characters.")
    if _UNPRINTABLE.search(url):
        raise AddressRefused("The URL holds a space, a control or another forbidden character; percent-encode it.")
    if "#" in url:
        raise AddressRefused("The URL has a fragment (#…), which no server ever sees; leave it out.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise AddressRefused("The URL's host or port cannot be read; the port is a number from 1 to 65535.") from None
    if parts.scheme not in _PORTS:
        raise AddressRefused("The URL must begin with http:// or https://.")
    if "@" in parts.netloc:
        raise AddressRefused("The URL holds a user name or password; credentials go into agent_authorization.")
    if port == 0 or parts.netloc.endswith(":"):
        raise AddressRefused("The URL's port is a number from 1 to 65535.")
    host = (parts.hostname or "").lower()
    if not _is_host(host):
        raise AddressRefused("The URL has no host, or one that is no name (letters, digits, -, _ and dots) and no IP.")
    shown = f"[{host}]" if ":" in host else host
    usual = port in (None, _PORTS[parts.scheme])
    return Target(
        host=host,
        port=port or _PORTS[parts.scheme],
        tls=parts.scheme == "https",
        path=((parts.path or "/") + (f"?{parts.query}" if parts.query else "")).encode(),
        authority=(shown if usual else f"{shown}:{port}").encode(),
    )


def _is_host(host: str) -> bool:
    if ":" not in host:
        return _NAME.fullmatch(host) is not None
    return literal(host) is not None and "%" not in host


def literal(host: str) -> str | None:
    """The address, if the host is one."""
    try:
        return str(ip_address(host))
    except ValueError:
        return None


def check_url(url: str, rules: AddressRules) -> Target:
    """Judge an agent's URL as far as it can be judged without resolving its name; `resolve` does the rest.

    Raises:
        AddressRefused: the sentence says what is wrong with it.
    """
    target = parse_url(url)
    address = literal(target.host)
    refusal = rules.refusal(address) if address else None
    if refusal:
        raise AddressRefused(refusal)
    if target.host.rstrip(".") == "localhost" and not rules.allow_loopback:
        raise AddressRefused("localhost is this very machine; only BIDE_ALLOW_LOOPBACK permits that.")
    return target


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver.

    Raises:
        OSError: there is no such name, or nobody to ask.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def resolve(target: Target, rules: AddressRules, lookup: Lookup = system_lookup) -> Sequence[str]:
    """The addresses of the target, all of them judged; the caller bounds the time.

    Raises:
        AddressRefused: one of them is refused. A name that means two things is not trusted with either.
        OSError: the name does not resolve.
    """
    own = literal(target.host)
    addresses = [own] if own else await lookup(target.host, target.port)
    for address in addresses:
        refusal = rules.refusal(address)
        if refusal:
            raise AddressRefused(refusal if own else f"{target.host} resolves to {refusal}")
    if not addresses:
        raise OSError(f"{target.host} has no address")
    return addresses
