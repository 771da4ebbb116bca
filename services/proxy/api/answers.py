"""What a caller is told about a message that is kept: the 202 body, our projection of it as a Task, the agent's answer.

Nothing of ours stands in `result` but `metadata[EXTENSION]`, and a waiting Task has no human text (A-P-09).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from json.decoder import JSONDecoder
from typing import Any
from uuid import UUID

from shared.results import EXTENSION

MESSAGE = "workspace agent busy: request queued, will be delivered when it has capacity"
"""The words that the original callers test for."""
POLL_AFTER_S = 2


@dataclass(frozen=True, slots=True)
class Kept:
    """A message that the broker has confirmed."""

    queue_id: UUID
    """Of the item that it is: the first one's where it was kept before."""
    workspace_id: str
    depth: int
    position: int | None
    priority: str
    reason: str
    context_id: str
    is_known: bool = False
    """The queue had it already."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How this caller speaks."""

    modern: bool
    """1.0's shapes; the method's name decides."""
    plain_keys: bool
    """The four keys of the original callers beside `result`; not with `A2A-Version: 1.x`, whose kit refuses them."""


def state_word(state: str, *, modern: bool) -> str:
    return f"TASK_STATE_{state.upper().replace('-', '_')}" if modern else state


def task(
    queue_id: str, context_id: str, state: str, metadata: Mapping[str, Any], *, modern: bool, at: datetime | None = None
) -> dict[str, Any]:
    """A Task of ours."""
    moment = (at or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        **({} if modern else {"kind": "task"}),
        "id": queue_id,
        "contextId": context_id,
        "status": {"state": state_word(state, modern=modern), "timestamp": moment},
        "metadata": {EXTENSION: dict(metadata)},
    }


def kept_body(kept: Kept, dialect: Dialect, request_id: str, state: str = "submitted") -> bytes:
    """The JSON-RPC response of a kept message; `request_id` as it was written."""
    metadata = {
        "queueId": str(kept.queue_id),
        "position": kept.position,
        "depth": kept.depth,
        "priority": kept.priority,
        "reason": kept.reason,
    }
    promised = task(str(kept.queue_id), kept.context_id, state, metadata, modern=dialect.modern)
    result = {"task": promised} if dialect.modern else promised
    extra = ""
    if dialect.plain_keys:
        keys = {"queued": True, "queue_id": str(kept.queue_id), "queue_depth": kept.depth, "message": MESSAGE}
        extra = "," + json.dumps(keys)[1:-1]
    return f'{{"jsonrpc":"2.0","id":{request_id},"result":{json.dumps(result)}{extra}}}'.encode()


def kept_headers(kept: Kept) -> list[tuple[bytes, bytes]]:
    queue_id = str(kept.queue_id).encode()
    return [
        (b"location", b"/queue/" + queue_id),
        (b"x-queue-id", queue_id),
        (b"x-queue-depth", str(kept.depth).encode()),
        (b"retry-after", str(POLL_AFTER_S).encode()),
    ]


def result_body(result: Mapping[str, Any], request_id: str) -> bytes:
    return f'{{"jsonrpc":"2.0","id":{request_id},"result":{json.dumps(result)}}}'.encode()


_STATES = {
    "queued": "submitted",
    "dispatched": "working",
    "completed": "completed",
    "canceled": "canceled",
    "superseded": "submitted",
}


def task_of_item(item: Mapping[str, Any], *, modern: bool) -> dict[str, Any]:
    """An item as a Task: ours until the agent has answered, then the agent's own under our id."""
    queue_id = str(item["queue_id"])
    answer = item.get("answer")
    result = answer.get("result") if isinstance(answer, dict) else None
    metadata = {
        "queueId": queue_id,
        **{name: item[name] for name in ("position", "priority", "status", "reason") if item.get(name) is not None},
    }
    if item.get("status") == "completed" and isinstance(result, dict):
        return _agents_task(result, queue_id, metadata, modern=modern)
    state = _STATES.get(str(item.get("status")), "failed")
    context_id = str(item.get("context_id") or queue_id)
    return task(queue_id, context_id, state, metadata, modern=modern, at=_moment(item.get("ended_at")))


def _agents_task(
    result: Mapping[str, Any], queue_id: str, metadata: Mapping[str, Any], *, modern: bool
) -> dict[str, Any]:
    wrapped = result.get("task") or result.get("message")
    inner = dict(wrapped) if isinstance(wrapped, dict) else dict(result)
    if isinstance(inner.get("status"), dict):
        return _with_id(inner, queue_id)
    # A bare Message where a Task was promised: a completed one with its parts as the artifact.
    context_id = str(inner.get("contextId") or queue_id)
    ours = task(queue_id, context_id, "completed", metadata, modern=modern)
    artifact = {"artifactId": str(inner.get("messageId") or queue_id), "parts": inner.get("parts") or []}
    return {**ours, "artifacts": [artifact]}


def _with_id(inner: dict[str, Any], queue_id: str) -> dict[str, Any]:
    """Our id in the envelope, never inside parts."""
    status = dict(inner["status"])
    if isinstance(status.get("message"), dict) and "taskId" in status["message"]:
        status["message"] = {**status["message"], "taskId": queue_id}
    inner |= {"id": queue_id, "status": status}
    if isinstance(inner.get("history"), list):
        inner["history"] = [
            {**said, "taskId": queue_id} if isinstance(said, dict) and "taskId" in said else said
            for said in inner["history"]
        ]
    return inner


def followed(answer: bytes, queue_id: UUID, request_id: str) -> bytes | None:
    """What 1.0's GetTask said of an accepted Task, as SendMessage says it and under our id.

    None: it is what the agent answered to the message itself, `{"task": …}` or `{"message": …}`.
    """
    try:
        result = json.loads(answer)["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(result, dict) or not isinstance(result.get("status"), dict):
        return None
    return result_body({"task": _with_id(dict(result), str(queue_id))}, request_id)


def agents_ids(item: Mapping[str, Any]) -> str | None:
    """The agent's own id of the Task that this item became; None: it became none that is known."""
    answer = item.get("answer")
    result = answer.get("result") if isinstance(answer, dict) else None
    found = result.get("task", result) if isinstance(result, dict) else None
    if isinstance(found, dict) and isinstance(found.get("status"), dict) and isinstance(found.get("id"), str):
        return str(found["id"])
    return None


def _moment(said: Any) -> datetime | None:
    return datetime.fromisoformat(said) if isinstance(said, str) else None


_decoder = JSONDecoder(parse_int=str, parse_float=str, strict=False)


def with_request_id(answer: bytes, request_id: str) -> bytes:
    """The agent's JSON-RPC answer under this caller's id; every other byte stays. What cannot be read stays whole."""
    try:
        text = answer.decode()
        at = _skip(text, 0)
        if text[at] != "{":
            return answer
        at = _skip(text, at + 1)
        while text[at] == '"':
            key, at = _decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
            start = at
            _, at = _decoder.raw_decode(text, at)
            if key == "id":
                return f"{text[:start]}{request_id}{text[at:]}".encode()
            at = _skip(text, _skip(text, at) + 1)
    except (ValueError, IndexError, RecursionError):
        return answer
    return answer


def with_request_id_in_events(stream: bytes, request_id: str) -> bytes:
    """The same for every event of a recorded stream."""
    return b"\n".join(
        b"data: " + with_request_id(line[5:].strip(), request_id) if line.startswith(b"data:") else line
        for line in stream.replace(b"\r\n", b"\n").split(b"\n")
    )


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
