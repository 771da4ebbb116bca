"""The first two frames of AMQP 0-9-1: enough to know that a broker answers, and which one it is.

Refuses to do more; clients are aio-pika's business.
"""

from __future__ import annotations

import socket
import ssl
from urllib.parse import urlsplit

HEADER = b"AMQP\x00\x00\x09\x01"
ANSWER_LIMIT_S = 5.0
_PORTS = {"amqp": 5672, "amqps": 5671}


def broker_version(url: str) -> str:
    """Return the version that the broker at this URL states; OSError while none answers."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or _PORTS.get(parts.scheme, 5672)
    with socket.create_connection((host, port), timeout=ANSWER_LIMIT_S) as plain:
        if parts.scheme == "amqps":
            with ssl.create_default_context().wrap_socket(plain, server_hostname=host) as secure:
                return _handshake(secure)
        return _handshake(plain)


def version_in(start: bytes) -> str:
    """Return `version` from the server properties of a Connection.Start frame, or "?"."""
    # A table entry is a short string (the name), a type letter, and for "S" a length of four bytes.
    key = b"\x07versionS"
    at = start.find(key)
    if at < 0:
        return "?"
    length_at = at + len(key)
    length = int.from_bytes(start[length_at : length_at + 4], "big")
    return start[length_at + 4 : length_at + 4 + length].decode()


def _handshake(connection: socket.socket) -> str:
    connection.sendall(HEADER)
    frame = b""
    while len(frame) < 7 or len(frame) < 7 + int.from_bytes(frame[3:7], "big"):  # noqa: PLR2004 (a frame's header)
        part = connection.recv(65_536)
        if not part:
            raise ConnectionError("the broker closed the connection during the handshake")
        frame += part
    if frame[:1] != b"\x01":
        raise ConnectionError(f"no AMQP 0-9-1 broker: it answered {frame[:8]!r}")
    return version_in(frame)
