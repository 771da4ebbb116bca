"""What a caller asks of an agent: JSON-RPC of A2A 0.3 and 1.0, read strictly, as official servers do.

Owns which methods there are. A request that leaves out `jsonrpc` or `messageId` is refused: Bide supplies them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
TASK_NOT_FOUND = -32001
TASK_NOT_CANCELABLE = -32002


class Dialect(Enum):
    """The two versions of A2A that are spoken; a method's name says which."""

    V03 = "0.3"
    V10 = "1.0"


class Verb(Enum):
    """What a method asks for."""

    SEND = "send"
    STREAM = "stream"
    GET = "get"
    CANCEL = "cancel"
    SUBSCRIBE = "subscribe"


METHODS = {
    "message/send": (Dialect.V03, Verb.SEND),
    "message/stream": (Dialect.V03, Verb.STREAM),
    "tasks/get": (Dialect.V03, Verb.GET),
    "tasks/cancel": (Dialect.V03, Verb.CANCEL),
    "SendMessage": (Dialect.V10, Verb.SEND),
    "SendStreamingMessage": (Dialect.V10, Verb.STREAM),
    "GetTask": (Dialect.V10, Verb.GET),
    "CancelTask": (Dialect.V10, Verb.CANCEL),
}

WITH_SUBSCRIBE = {
    **METHODS,
    "tasks/resubscribe": (Dialect.V03, Verb.SUBSCRIBE),
    "SubscribeToTask": (Dialect.V10, Verb.SUBSCRIBE),
}


class CallError(Exception):
    """The request cannot be taken: a JSON-RPC code and a sentence."""

    def __init__(self, code: int, sentence: str, request_id: Any = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.request_id = request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request that can be taken. `text` joins the text parts; `at_once`: the caller does not wait for the end."""

    dialect: Dialect
    verb: Verb
    request_id: Any
    message_id: str | None = None
    context_id: str | None = None
    task_id: str | None = None
    text: str = ""
    at_once: bool = False
    message: Mapping[str, Any] = field(default_factory=dict)
    """The whole message, as it came."""


def read(body: bytes, methods: Mapping[str, tuple[Dialect, Verb]] = METHODS) -> Call:
    """Read a request for one of `methods`.

    Raises:
        CallError: it is no JSON-RPC request, names no method of ours, or lacks what the method needs.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CallError(PARSE_ERROR, f"The body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise CallError(INVALID_REQUEST, "The body is no JSON object.")
    request_id, method, params = request.get("id"), request.get("method"), request.get("params")
    if request.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise CallError(INVALID_REQUEST, 'jsonrpc must be "2.0" and method a string.', request_id)
    if method not in methods:
        raise CallError(METHOD_NOT_FOUND, f"There is no {method} here; try {', '.join(methods)}.", request_id)
    dialect, verb = methods[method]
    if not isinstance(params, dict):
        raise CallError(INVALID_PARAMS, "params must be an object.", request_id)
    if verb in {Verb.GET, Verb.CANCEL, Verb.SUBSCRIBE}:
        if not isinstance(params.get("id"), str):
            raise CallError(INVALID_PARAMS, "params.id must be the id of a task.", request_id)
        return Call(dialect=dialect, verb=verb, request_id=request_id, task_id=params["id"])
    return _message(dialect, verb, request_id, params)


def _message(dialect: Dialect, verb: Verb, request_id: Any, params: Mapping[str, Any]) -> Call:
    message = params.get("message")
    if not isinstance(message, dict):
        raise CallError(INVALID_PARAMS, "params.message must be an object.", request_id)
    message_id = _said(message, "messageId", "message_id")
    parts = message.get("parts")
    if not isinstance(message_id, str) or not isinstance(parts, list):
        raise CallError(INVALID_PARAMS, "The message needs a messageId and parts.", request_id)
    configuration = params.get("configuration")
    configuration = configuration if isinstance(configuration, dict) else {}
    context_id = _said(message, "contextId", "context_id")
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return Call(
        dialect=dialect,
        verb=verb,
        request_id=request_id,
        message_id=message_id,
        context_id=context_id if isinstance(context_id, str) else None,
        text="\n".join(text for text in texts if isinstance(text, str)),
        at_once=configuration.get("blocking") is False
        or _said(configuration, "returnImmediately", "return_immediately") is True,
        message=message,
    )


def _said(where: Mapping[str, Any], camel: str, snake: str) -> Any:
    """ProtoJSON takes both spellings."""
    return where.get(camel, where.get(snake))
