"""A usual request read at a glance: one pass in C, where `shared/a2a.py` walks key by key.

The walk is the authority. A glance says nothing (None) of whatever it cannot prove to read as the walk does: what must
be completed, keys that few write, another spelling of a key, a key that may stand twice, our own extension.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson

from shared.results import EXTENSION

_TOP = frozenset({"jsonrpc", "id", "method", "params"})
_PARAMS = frozenset({"message", "configuration", "metadata"})
_MESSAGE = frozenset({"kind", "role", "parts", "messageId", "contextId", "metadata", "extensions"})
_EXTENSION = EXTENSION.encode()
"""Its values are the walk's: it keeps numbers as they were written."""
_ASCII = re.compile(rb"\\u00[2-7]")
"""An escape that may hide a key. Without one, each key of ours stands in the bytes as it is written here."""
_ID = re.compile(rb'"id"[ \t\n\r]*:[ \t\n\r]*("[^"\\]*"|-?[0-9]+)(?=[ \t\n\r,}])')
_BRACKETS_MAX = 400
"""No body with so few is nested too deeply for the walk, which may still have to change it."""


class Glance(NamedTuple):
    """What was seen: the objects, and where the value of `id` stands in the bytes."""

    method: str
    params: dict[str, Any]
    message: dict[str, Any]
    id_span: tuple[int, int]


def glance(body: bytes) -> Glance | None:
    """Read a whole message that has all it needs and nothing unusual; None: walk."""
    try:
        top = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    found = _message(top)
    if found is None or not _is_plain(body, found):
        return None
    written = _ID.search(body)
    return Glance(top["method"], top["params"], found, written.span(1)) if written is not None else None


def _message(top: Any) -> dict[str, Any] | None:
    """The message of a request with no other keys than the usual ones, and with those that must be completed."""
    if not isinstance(top, dict) or top.keys() != _TOP or not top["method"] or not isinstance(top["method"], str):
        return None
    params = top["params"]
    message = params.get("message") if isinstance(params, dict) and params.keys() <= _PARAMS else None
    usual = isinstance(message, dict) and message.keys() <= _MESSAGE and "messageId" in message
    return message if usual else None


def _is_plain(body: bytes, message: dict[str, Any]) -> bool:
    """Whether no second key hides behind one that was found: each is there, and its word stands no more often."""
    return (
        body.count(b'"params"') == 1
        and body.count(b'"message"') == 1 + (message.get("kind") == "message")
        and body.count(b'"id"') == 1
        and body.count(b"{") + body.count(b"[") <= _BRACKETS_MAX
        and _EXTENSION not in body
        and not (b"\\u00" in body and _ASCII.search(body))
    )
