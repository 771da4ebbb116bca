"""The A2A envelope: what Bide must know of a JSON-RPC body, and where it stands, so that the rest stays byte-exact.

Only the envelope is read: the top level, `params`, `params.message`. Values inside are skipped by the C scanner of the
standard library, which tells where they end; so a change (`Envelope.with_values`) replaces the bytes of one value.
A message as nearly all are is read at a glance (`shared/glance.py`), and walked only where it is changed.
Both dialects are read: 0.3 (`message/send`) and 1.0 (`SendMessage`), camelCase and snake_case (ProtoJSON).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from json.decoder import JSONDecoder
from typing import Any

from shared.glance import Glance, glance
from shared.results import EXTENSION


class Verb(Enum):
    """What a method asks for, whichever dialect names it."""

    SEND = "send"
    STREAM = "stream"
    GET = "get"
    CANCEL = "cancel"
    SUBSCRIBE = "subscribe"
    LIST = "list"
    OTHER = "other"


_VERBS = {
    "message/send": Verb.SEND,
    "SendMessage": Verb.SEND,
    "message/stream": Verb.STREAM,
    "SendStreamingMessage": Verb.STREAM,
    "tasks/get": Verb.GET,
    "GetTask": Verb.GET,
    "tasks/cancel": Verb.CANCEL,
    "CancelTask": Verb.CANCEL,
    "tasks/resubscribe": Verb.SUBSCRIBE,
    "SubscribeToTask": Verb.SUBSCRIBE,
    "tasks/list": Verb.LIST,
    "ListTasks": Verb.LIST,
}

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
INVALID_PARAMS = -32602


class EnvelopeError(Exception):
    """The body is no A2A request: a JSON-RPC `code`, the HTTP `status`, and a sentence that says what to do."""

    def __init__(self, code: int, sentence: str, *, status: int = 400, request_id: str = "null") -> None:
        super().__init__(sentence)
        self.code = code
        self.status = status
        self.request_id = request_id


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class _Value:
    """One value of the text: where it stands, and what it is (None for what was only skipped)."""

    start: int
    end: int
    value: Any


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Envelope:
    """What was read of a request. Names are A2A's in snake_case; None: the caller did not say it."""

    body: bytes
    """As it came."""
    method: str
    verb: Verb
    request_id: str | None
    """The id as it was written (`1`, `"a"`, `null`): echoed byte for byte."""
    message_id: str | None
    context_id: str | None
    task_id: str | None
    has_message: bool
    """It has a `params.message` that is an object."""
    says_version: bool
    """It has a `jsonrpc`."""
    names_task: bool
    """It has a `params.message.taskId`."""
    wishes: Mapping[str, Any]
    """What the message's metadata hold under our extension. Numbers are text, as they were written."""
    blocking: bool | None
    return_immediately: bool | None
    task_ids: frozenset[str]
    """Every id in it that could be a task's, for whoever asks whose they are."""
    expires_in_s: float | None
    unnumbered: bytes
    """The body without the value of its `id`."""

    def with_values(self, values: Mapping[str, Any]) -> bytes:
        """The body with the values at these paths (`jsonrpc`, `params.message.messageId`, …) replaced or added.

        Raises:
            KeyError: the object that would hold a missing value is not there either.
        """
        if not values:
            return self.body
        text = self.body.decode()
        found = dict(_walk(text))
        edits = sorted((_edit(text, found, path, value) for path, value in values.items()), key=lambda edit: edit[:2])
        out: list[str] = []
        at = 0
        for start, end, new in edits:
            out += (text[at:start], new)
            at = end
        out.append(text[at:])
        return "".join(out).encode()


def _edit(text: str, found: Mapping[str, _Value], path: str, value: Any) -> tuple[int, int, str]:
    new = json.dumps(value)
    if path in found:
        return found[path].start, found[path].end, new
    parent, _, key = path.rpartition(".")
    braces = found[f"{parent}{{"]
    comma = "" if text[braces.start : braces.end].strip() == "" else ","
    return braces.start, braces.start, f"{json.dumps(key)}:{new}{comma}"


_OPENED = ("params", "params.message")
"""The objects below the top level whose members are looked at."""
_SNAKE = re.compile(r"_([a-z])")
_SPACE = re.compile(r"[ \t\n\r]*")


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Numbers stay text: nothing here computes with them, and a number of 10,000 digits is legal JSON.
_decoder = JSONDecoder(parse_int=str, parse_float=str, parse_constant=_constant, strict=True)


def parse(body: bytes) -> Envelope:
    """Read the envelope of a request.

    Raises:
        EnvelopeError: not UTF-8, not JSON, no object, or no method.
    """
    seen = glance(body)
    return walk(body) if seen is None else _usual(body, seen)


def _usual(body: bytes, seen: Glance) -> Envelope:
    """What the walk would have found in a message that was understood at a glance."""
    message, (start, end) = seen.message, seen.id_span
    configuration = _mapping(seen.params.get("configuration"))
    return Envelope(
        body=body,
        method=seen.method,
        verb=_VERBS.get(seen.method, Verb.OTHER),
        request_id=body[start:end].decode(),
        message_id=_words(message["messageId"]),
        context_id=_words(message.get("contextId")),
        task_id=None,
        has_message=True,
        says_version=True,
        names_task=False,
        wishes=_NONE,
        blocking=_flag(configuration.get("blocking")),
        return_immediately=_at_once(configuration),
        task_ids=_NO_IDS,
        expires_in_s=None,
        unnumbered=body[:start] + body[end:],
    )


def _words(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else _NONE


def _at_once(configuration: Mapping[str, Any]) -> bool | None:
    return _flag(configuration.get("returnImmediately", configuration.get("return_immediately")))


_NONE: Mapping[str, Any] = {}
_NO_IDS: frozenset[str] = frozenset()


def walk(body: bytes) -> Envelope:
    """Read the envelope of any request, key by key: what `parse` finds too, and at a glance where it can.

    Raises:
        EnvelopeError: as `parse`.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise EnvelopeError(PARSE_ERROR, f"The body is not UTF-8 (byte {error.start}). Send JSON in UTF-8.") from None
    try:
        every = list(_walk(text))
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise EnvelopeError(PARSE_ERROR, f"The body is not JSON: {detail}.") from None
    found = dict(every)
    if "{" not in found:
        raise EnvelopeError(
            INVALID_REQUEST, "The body is no JSON object. Send one JSON-RPC request; A2A has no batches."
        )
    return _envelope(body, text, found, every)


def _envelope(body: bytes, text: str, found: Mapping[str, _Value], every: Iterable[tuple[str, _Value]]) -> Envelope:
    def said(path: str) -> Any:
        return found[path].value if path in found else None

    def words(path: str) -> str | None:
        value = said(path)
        return value if isinstance(value, str) and text[found[path].start] == '"' else None

    start, end = (found["id"].start, found["id"].end) if "id" in found else (0, 0)
    request_id = text[start:end] if "id" in found else None
    method = words("method")
    if not method:
        sentence = "The request has no method. Name one, for example message/send."
        raise EnvelopeError(INVALID_REQUEST, sentence, request_id=request_id or "null")
    configuration = _mapping(said("params.configuration"))
    return Envelope(
        body=body,
        method=method,
        verb=_VERBS.get(method, Verb.OTHER),
        request_id=request_id,
        message_id=words("params.message.messageId"),
        context_id=words("params.message.contextId"),
        task_id=words("params.message.taskId") or words("params.id"),
        has_message="params.message{" in found,
        says_version="jsonrpc" in found,
        names_task="params.message.taskId" in found,
        wishes=_mapping(_mapping(said("params.message.metadata")).get(EXTENSION)),
        blocking=_flag(configuration.get("blocking")),
        return_immediately=_at_once(configuration),
        task_ids=_NO_IDS if _NAMES_TASK.isdisjoint(found) else _task_ids(every),
        expires_in_s=_seconds(said("params.expiresInSeconds")),
        unnumbered=(text[:start] + text[end:]).encode(),
    )


_REFERENCES = "params.message.referenceTaskIds"
_RESOURCES = ("params.name", "params.parent")
_NAMES_TASK = frozenset({"params.id", "params.taskId", "params.message.taskId", _REFERENCES, *_RESOURCES})


def _task_ids(every: Iterable[tuple[str, _Value]]) -> frozenset[str]:
    """Every id that any reader could take for a task's: of a key that stands twice, in either spelling, both."""
    found: set[str] = set()
    for path, value in every:
        if path in _NAMES_TASK and isinstance(value.value, str):
            # 1.0's drafts name resources: tasks/<id>, tasks/<id>/pushNotificationConfigs/<id>.
            named = value.value.split("/") if value.value.startswith("tasks/") else []
            found.add(named[1] if path in _RESOURCES and named else value.value)
        elif path == _REFERENCES and isinstance(value.value, list):
            found.update(each for each in value.value if isinstance(each, str))
    return frozenset(found)


def _seconds(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _walk(text: str) -> Iterator[tuple[str, _Value]]:
    """Every value of the opened objects, by path in camelCase; of a key that stands twice the last one counts."""
    start = _skip(text, 0)
    if text[start : start + 1] == "{":
        end, inside = _object(text, start, "")
        yield from inside
    else:
        _, end = _decoder.raw_decode(text, start)
    if _skip(text, end) != len(text):
        raise ValueError(f"there is more text after its end (character {end})")


def _object(text: str, start: int, path: str) -> tuple[int, list[tuple[str, _Value]]]:
    found: list[tuple[str, _Value]] = []
    at = _skip(text, start + 1)
    while text[at : at + 1] != "}":
        if text[at : at + 1] != '"':
            raise ValueError(f"a key is expected at character {at}")
        key, at = _decoder.raw_decode(text, at)
        at = _expect(text, at, ":")
        name = f"{path}.{_SNAKE.sub(lambda m: m[1].upper(), key)}".lstrip(".")
        if name in _OPENED and text[at : at + 1] == "{":
            end, inside = _object(text, at, name)
            found += [(name, _Value(at, end, {})), *inside]
        else:
            value, end = _decoder.raw_decode(text, at)
            found.append((name, _Value(at, end, value)))
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "}":
                raise ValueError(f"a comma stands before the closing brace at character {at}")
        elif text[at : at + 1] != "}":
            raise ValueError(f"a comma or a closing brace is expected at character {at}")
    found.append((f"{path}{{", _Value(start + 1, at, None)))
    return at + 1, found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != character:
        raise ValueError(f"{character!r} is expected at character {at}")
    return _skip(text, at + 1)


def error_body(code: int, sentence: str, *, request_id: str = "null", data: Mapping[str, Any] | None = None) -> bytes:
    """A JSON-RPC error response; `request_id` as it was written."""
    error = {"code": code, "message": sentence, **({"data": data} if data else {})}
    return f'{{"jsonrpc":"2.0","id":{request_id},"error":{json.dumps(error)}}}'.encode()
