"""What an agent says, in the shape of the dialect that the caller speaks.

0.3 tells the type of a thing by its `kind` and writes states in lower case; 1.0 wraps what may be one of several things
in a member that names it, has no `kind`, and writes enums as TASK_STATE_WORKING and ROLE_AGENT.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from bide_agent.calls import Dialect
from bide_agent.tasks import Task, TaskState

EXTENSION = "urn:bide:queue:1"
Json = dict[str, Any]


def result(request_id: Any, value: Json) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": value}).encode()


def error(request_id: Any, code: int, sentence: str, marked: str | None = None) -> bytes:
    """A JSON-RPC error; `marked` is the `data.code` by which Bide knows busy and preempted."""
    said: Json = {"code": code, "message": sentence, **({"data": {"code": marked}} if marked else {})}
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": said}).encode()


def event(body: bytes) -> bytes:
    """One server-sent event. The body is one line: `json.dumps` writes no newline."""
    return b"data: " + body + b"\n\n"


def message(dialect: Dialect, *, text: str, context_id: str, metadata: Mapping[str, Any]) -> Json:
    said: Json = {
        "messageId": str(uuid.uuid4()), "contextId": context_id, "parts": [_part(dialect, text)], "metadata": metadata,
    }  # fmt: skip
    if dialect is Dialect.V10:
        return {"message": {**said, "role": "ROLE_AGENT"}}
    return {"kind": "message", "role": "agent", **said}


def task(dialect: Dialect, one: Task, *, wrapped: bool = True) -> Json:
    """A Task as it stands; `wrapped` where 1.0 could have said something else (not in GetTask and CancelTask)."""
    said: Json = {
        "id": one.task_id,
        "contextId": one.context_id,
        "status": _status(dialect, one),
        "metadata": one.metadata,
        **({"artifacts": [_artifact(dialect, one)]} if one.state is TaskState.COMPLETED else {}),
    }
    if dialect is Dialect.V03:
        return {"kind": "task", **said}
    return {"task": said} if wrapped else said


def artifact_update(dialect: Dialect, one: Task) -> Json:
    said: Json = {
        "taskId": one.task_id, "contextId": one.context_id, "artifact": _artifact(dialect, one),
        "append": False, "lastChunk": True,
    }  # fmt: skip
    return {"kind": "artifact-update", **said} if dialect is Dialect.V03 else {"artifactUpdate": said}


def status_update(dialect: Dialect, one: Task) -> Json:
    said: Json = {
        "taskId": one.task_id, "contextId": one.context_id, "status": _status(dialect, one), "metadata": one.metadata,
    }  # fmt: skip
    if dialect is Dialect.V10:
        return {"statusUpdate": said}
    return {"kind": "status-update", **said, "final": one.state is not TaskState.WORKING}


def padded(text: str, size: int, whole: Callable[[str], bytes]) -> bytes:
    """`whole(text)`, with as much behind the text as makes the body `size` bytes long."""
    body = whole(text)
    return body if len(body) >= size else whole(text + "x" * (size - len(body)))


def card(name: str, url: str) -> Json:
    """The agent card: both dialects' members, each ignores the other's."""
    interfaces = [{"url": url, "protocolBinding": "JSONRPC", "protocolVersion": dialect.value} for dialect in Dialect]
    return {
        "name": name,
        "description": "Echoes what it is told, and misbehaves when asked to.",
        "version": "0.1.0",
        "protocolVersion": "0.3.0",
        "url": url,
        "preferredTransport": "JSONRPC",
        "supportedInterfaces": interfaces[::-1],
        "capabilities": {"streaming": True, "pushNotifications": False},
        "defaultInputModes": ["text/plain"],
        "defaultOutputModes": ["text/plain"],
        "skills": [{"id": "echo", "name": "Echo", "description": "Says the text again.", "tags": ["echo"]}],
    }


def _part(dialect: Dialect, text: str) -> Json:
    return {"kind": "text", "text": text} if dialect is Dialect.V03 else {"text": text}


def _artifact(dialect: Dialect, one: Task) -> Json:
    return {"artifactId": f"{one.task_id}-answer", "parts": [_part(dialect, one.text)]}


def _status(dialect: Dialect, one: Task) -> Json:
    state = one.state.value if dialect is Dialect.V03 else f"TASK_STATE_{one.state.name}"
    return {"state": state, "timestamp": one.changed_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
