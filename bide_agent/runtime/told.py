"""What is told of a turn: as a Task and its events in either dialect, and as what is kept of it on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bide_agent.calls import Dialect
from bide_agent.runtime import parts as parts_
from bide_agent.runtime.options import Options
from bide_agent.runtime.parts import Part
from bide_agent.runtime.turns import Ending, Turn
from bide_agent.tasks import TaskState

Json = dict[str, Any]


def task(dialect: Dialect, turn: Turn, *, wrapped: bool = True) -> Json:
    """The Task as it stands; `wrapped` where 1.0 could have said something else (not in GetTask and CancelTask)."""
    parts = turn.parts
    said: Json = {
        "id": turn.task_id,
        "contextId": turn.context_id,
        "status": _status(dialect, turn),
        "metadata": dict(turn.metadata),
        **({"artifacts": [_artifact(dialect, turn, parts)]} if parts else {}),
    }
    if dialect is Dialect.V03:
        return {"kind": "task", **said}
    return {"task": said} if wrapped else said


def artifact_update(dialect: Dialect, turn: Turn, parts: Sequence[Part], *, is_first: bool) -> Json:
    said: Json = {
        "taskId": turn.task_id,
        "contextId": turn.context_id,
        "artifact": _artifact(dialect, turn, parts),
        "append": not is_first,
        "lastChunk": False,
    }
    return {"kind": "artifact-update", **said} if dialect is Dialect.V03 else {"artifactUpdate": said}


def status_update(dialect: Dialect, turn: Turn) -> Json:
    """The last event of a stream."""
    said: Json = {
        "taskId": turn.task_id,
        "contextId": turn.context_id,
        "status": _status(dialect, turn),
        "metadata": dict(turn.metadata),
    }
    if dialect is Dialect.V10:
        return {"statusUpdate": said}
    return {"kind": "status-update", **said, "final": True}


def kept(turn: Turn) -> Json:
    """What is kept of an answer; `again` makes a turn of it."""
    return {
        "task_id": turn.task_id,
        "context_id": turn.context_id,
        "queue_id": turn.queue_id,
        "state": turn.state.value,
        "at": turn.changed_at.isoformat(),
        "parts": turn.parts,
        "metadata": dict(turn.metadata),
    }


def again(said: Mapping[str, Any]) -> Turn:
    """A turn that has ended, from what was kept of it."""
    turn = Turn(
        context_id=said["context_id"],
        queue_id=said["queue_id"],
        task_id=said["task_id"],
        state=TaskState(said["state"]),
        changed_at=datetime.fromisoformat(said["at"]),
        chunks=[said["parts"]],
        metadata=said["metadata"],
        ending=Ending.DONE,
    )
    turn.close()
    return turn


def card(options: Options, url: str) -> Json:
    """The agent card: both dialects' members, each ignores the other's."""
    interfaces = [{"url": url, "protocolBinding": "JSONRPC", "protocolVersion": dialect.value} for dialect in Dialect]
    skill = {"id": "answer", "name": "Answer", "description": options.description, "tags": ["text"]}
    return {
        "name": options.workspace,
        "description": options.description,
        "version": "1",
        "protocolVersion": "0.3.0",
        "url": url,
        "preferredTransport": "JSONRPC",
        "supportedInterfaces": interfaces[::-1],
        "capabilities": {"streaming": True, "pushNotifications": False},
        "defaultInputModes": ["text/plain"],
        "defaultOutputModes": ["text/plain"],
        "skills": [dict(one) for one in options.skills] or [skill],
    }


def _artifact(dialect: Dialect, turn: Turn, parts: Sequence[Part]) -> Json:
    return {"artifactId": f"{turn.task_id}-answer", "parts": [parts_.said(dialect, part) for part in parts]}


def _status(dialect: Dialect, turn: Turn) -> Json:
    is_03 = dialect is Dialect.V03
    said: Json = {
        "state": turn.state.value if is_03 else f"TASK_STATE_{turn.state.name}",
        "timestamp": turn.changed_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    if turn.note:
        said["message"] = {
            **({"kind": "message", "role": "agent"} if is_03 else {"role": "ROLE_AGENT"}),
            "messageId": f"{turn.task_id}-status",
            "taskId": turn.task_id,
            "contextId": turn.context_id,
            "parts": [parts_.said(dialect, {"text": turn.note})],
        }
    return said
