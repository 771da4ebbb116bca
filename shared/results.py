"""What an agent's JSON says: one JSON-RPC response, or the data of one stream event, read for its few facts.

Both dialects: 0.3 (`kind`, lower-case states) and 1.0 (`result.task`, `TASK_STATE_…`), also bare and without the
JSON-RPC frame (HTTP+JSON). Nothing that an agent sends raises here, and no text of it is kept but two ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import orjson

EXTENSION = "urn:bide:queue:1"
TERMINAL_STATES = frozenset({"completed", "failed", "canceled", "rejected"})
INTERRUPTED_STATES = frozenset({"input-required", "auth-required"})
FINAL_STATES = TERMINAL_STATES | INTERRUPTED_STATES
"""The turn is over: §2 calls it delivered."""

_STATES = FINAL_STATES | {"submitted", "working", "unknown"}
_ID_MAX = 1024
_UNSTORABLE = re.compile("[\\0\ud800-\udfff]")


class Kind(StrEnum):
    MESSAGE = "message"
    TASK = "task"
    UPDATE = "update"
    """A status or artifact event of a task."""
    ERROR = "error"
    OTHER = "other"
    """A result that is none of A2A's answers to a message."""
    NOTHING = "nothing"


@dataclass(slots=True)  # not frozen: one is made for each answer, and freezing makes that three times as dear
class Result:
    """The facts of one response or event, or of a stream so far (`then`)."""

    kind: Kind
    task_id: str | None = None
    context_id: str | None = None
    state: str | None = None
    """In 0.3's words; what is no state of A2A reads `unknown`."""
    preempted: bool = False
    error_code: int | None = None
    error_mark: str | None = None
    """`error.data.code`, if it is `busy` or `preempted`."""
    trouble: str | None = None
    """Why it is NOTHING."""

    def then(self, later: Result) -> Result:
        """What is known after one more event. An event that says nothing takes nothing away."""
        if later.kind in {Kind.OTHER, Kind.NOTHING} and self.kind is not Kind.NOTHING:
            return self
        return replace(
            later,
            task_id=later.task_id or self.task_id,
            context_id=later.context_id or self.context_id,
            state=later.state or self.state,
            preempted=later.preempted or self.preempted,
        )


def read_result(body: bytes) -> Result:
    """Read a JSON-RPC response, or the data of a stream event."""
    try:
        glanced = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _read_leniently(body)
    # An error's code is a number, of which orjson knows fewer.
    if isinstance(glanced, dict) and glanced.get("error") is None:
        return _response(glanced)
    return _read_leniently(body)


def _read_leniently(body: bytes) -> Result:
    """What orjson refuses too: a byte order mark, raw controls, lone surrogates, NaN."""
    try:
        value = _decoder.decode(body.decode("utf-8-sig", "surrogatepass"))
    except UnicodeDecodeError:
        return _nothing("the body is not UTF-8")
    except ValueError:
        return _nothing("the body is not JSON" if body.strip() else "the body is empty")
    except RecursionError:
        return _nothing("the body is nested too deeply")
    return _response(value) if isinstance(value, dict) else _nothing("the body is no JSON object")


def _nothing(trouble: str) -> Result:
    return Result(Kind.NOTHING, trouble=trouble)


def _response(value: Mapping[str, Any]) -> Result:
    if value.get("error") is not None:
        return _error(value["error"])
    if "result" in value:
        return _result(value["result"]) if isinstance(value["result"], dict) else Result(Kind.OTHER)
    bare = _result(value) if "jsonrpc" not in value else Result(Kind.OTHER)
    return _nothing("it holds neither a result nor an error") if bare.kind is Kind.OTHER else bare


def _integer(digits: str) -> int:
    # Nothing here computes with numbers, and Python refuses to read one of more than 4,300 digits.
    return int(digits) if len(digits) < 20 else 0  # noqa: PLR2004


_decoder = json.JSONDecoder(parse_int=_integer, strict=False)


def _error(error: Any) -> Result:
    if not isinstance(error, dict):
        return Result(Kind.ERROR)
    code = error.get("code")
    data = error.get("data")
    details = data if isinstance(data, list) else [data]  # 1.0 sends a list of details
    marks = [detail["code"] for detail in details if isinstance(detail, dict) and "code" in detail]
    return Result(
        Kind.ERROR,
        error_code=code if isinstance(code, int) and not isinstance(code, bool) else None,
        error_mark=next((mark for mark in marks if mark in ("busy", "preempted")), None),
    )


_WRAPPED = {
    "task": Kind.TASK,
    "message": Kind.MESSAGE,
    "statusUpdate": Kind.UPDATE,
    "artifactUpdate": Kind.UPDATE,
    "status_update": Kind.UPDATE,
    "artifact_update": Kind.UPDATE,
}
_KINDS = {"task": Kind.TASK, "message": Kind.MESSAGE, "status-update": Kind.UPDATE, "artifact-update": Kind.UPDATE}


def _result(result: Mapping[str, Any]) -> Result:
    kind, value = _shape(result)
    if kind is Kind.OTHER:
        return Result(Kind.OTHER)
    status = value.get("status")
    status = status if isinstance(status, dict) else {}
    return Result(
        kind,
        task_id=_id(value, "id") if kind is Kind.TASK else _id(value, "taskId", "task_id"),
        context_id=_id(value, "contextId", "context_id"),
        state=None if kind is Kind.MESSAGE else _state(status.get("state")),
        preempted=_is_preempted(value) or _is_preempted(status.get("message")),
    )


def _shape(result: Mapping[str, Any]) -> tuple[Kind, Mapping[str, Any]]:
    """Which of A2A's objects this is, and that object."""
    said = result.get("kind")
    if isinstance(said, str) and said in _KINDS:
        return _KINDS[said], result
    for key, kind in _WRAPPED.items():
        if isinstance(result.get(key), dict):
            return kind, result[key]
    of_task = "taskId" in result or "task_id" in result
    if isinstance(result.get("status"), dict) and "state" in result["status"]:
        return Kind.UPDATE if of_task and "id" not in result else Kind.TASK, result
    if of_task and isinstance(result.get("artifact"), dict):
        return Kind.UPDATE, result
    if isinstance(result.get("parts"), list):
        return Kind.MESSAGE, result
    return Kind.OTHER, result


def _state(said: Any) -> str | None:
    if not isinstance(said, str):
        return None
    state = said.lower().removeprefix("task_state_").replace("_", "-").replace("cancelled", "canceled")
    return state if state in _STATES else "unknown"


def _id(value: Mapping[str, Any], *names: str) -> str | None:
    """An id that can be stored and sent back: a lone surrogate or a NUL fits neither Postgres nor the bus."""
    for name in names:
        said = value.get(name)
        if isinstance(said, str) and 0 < len(said) <= _ID_MAX and not _UNSTORABLE.search(said):
            return said
    return None


def _is_preempted(value: Any) -> bool:
    metadata = value.get("metadata") if isinstance(value, dict) else None
    ours = metadata.get(EXTENSION) if isinstance(metadata, dict) else None
    return isinstance(ours, dict) and ours.get("preempted") is True
