"""The description of the HTTP face: /openapi.json, and /docs, one static page that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from typing import Any

from services.proxy.api.forms import CancelMany, Heartbeat, Note, Patch, Register, UpdateCard, Why

_REF = "#/components/schemas/{model}"


def _operation(
    summary: str,
    *,
    ok: dict[str, str],
    errors: tuple[int, ...],
    body: str | None = None,
    parameters: tuple[dict[str, Any], ...] = (),
    rpc: bool = False,
) -> dict[str, Any]:
    kind = "application/json" if rpc else "application/problem+json"
    failed = {"schema": {"$ref": "#/components/schemas/" + ("RpcError" if rpc else "Problem")}}
    responses: dict[str, Any] = {
        status: {"description": said, "content": {} if status == "304" else {"application/json": {}}}
        for status, said in ok.items()
    }
    if rpc:
        responses["200"]["content"]["text/event-stream"] = {}
    responses |= {str(status): {"description": _ERRORS[status], "content": {kind: failed}} for status in errors}
    operation: dict[str, Any] = {"summary": summary, "responses": responses, "security": [{"bearer": []}]}
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body}"}
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": body not in {"Note", "Why"}, "content": content}
    return operation


_ERRORS = {
    400: "The request cannot be read",
    401: "No token, or one that nobody has",
    403: "Not allowed for this caller",
    404: "There is no such thing, or it is another's",
    405: "Another method",
    408: "The body did not come in time",
    409: "It stands against what is there",
    410: "It was removed",
    412: "It has changed since you read it",
    413: "The body is too large",
    422: "A value is not what it must be",
    429: "Too much waits: come again after Retry-After",
    500: "A bug; the log says which",
    502: "The agent gave no answer that can be passed on",
    503: "Not now: come again after Retry-After",
    504: "The agent took too long",
    508: "The message goes in circles",
}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_WS, _ITEM = _in_path("workspace_id"), _in_path("queue_id")
_PAGE = (_in_query("cursor", {"type": "string"}), _in_query("limit", {"type": "integer", "minimum": 1, "maximum": 500}))
_LINE = (
    _in_query("status", {"type": "string"}),
    _in_query("priority", {"type": "string"}),
    _in_query("caller", {"type": "string"}),
)
_WROTE = (400, 401, 403, 408, 413, 422, 500, 503)
_A2A = (400, 401, 403, 404, 408, 409, 410, 413, 422, 429, 500, 502, 503, 504, 508)


_W = "/workspaces/{workspace_id}"
_Q = "/queue/{queue_id}"
_CARD = "The agent's card at our origin"
_OK = {"200": "Done"}
_CARD_OK = {**_OK, "304": "As you have it"}
_CANCELED = {**_OK, "202": "Its agent has it, and is asked to end"}
_AGAIN = {"201": "A new item", "200": "The one that it was sent again as before"}
_READ = (401, 403, 404, 500, 503)
_LISTED = (400, 401, 403, 500, 503)
_ACTED = (*_WROTE, 404, 409)
_PAUSED = (*_WROTE, 404, 410)

_ENDED = (*_WROTE, 404, 409, 410)
_RESTARTED = {**_OK, "202": "It has begun"}
_S = f"{_W}/schedules"
_SCHEDULE = f"{_S}/{{schedule_id}}"
_OF = (_WS, _in_path("schedule_id"))
_MADE = {"201": "Made", "200": "It was made already"}
_APPLIED = {**_OK, "202": "It stands; the queue has not said yet that it holds it"}
_PLANNED = (*_WROTE, 404, 409, 410)
_EDITED = (*_PLANNED, 412)

_TABLE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("post", "/registry/register", _operation("Enrol an agent", ok=_OK, errors=(*_WROTE, 409, 410), body="Register")),
    ("post", "/registry/heartbeat", _operation("Live", ok=_OK, errors=(*_WROTE, 404, 409, 410), body="Heartbeat")),
    (
        "post",
        "/registry/update-card",
        _operation("Swap the card", ok=_OK, errors=(*_WROTE, 404, 410), body="UpdateCard"),
    ),
    (
        "get",
        f"{_W}/.well-known/agent-card.json",
        _operation(_CARD, ok=_CARD_OK, errors=(*_READ, 410), parameters=(_WS,)),
    ),
    ("get", f"{_W}/.well-known/agent.json", _operation(_CARD, ok=_CARD_OK, errors=(*_READ, 410), parameters=(_WS,))),
    ("get", _Q, _operation("A kept message", ok=_OK, errors=_READ, parameters=(_ITEM,))),
    ("delete", _Q, _operation("Cancel a message", ok=_CANCELED, errors=_ACTED, body="Note", parameters=(_ITEM,))),
    ("get", f"{_Q}/answer", _operation("The agent's answer alone", ok=_OK, errors=(*_READ, 409), parameters=(_ITEM,))),
    (
        "post",
        f"{_Q}/retry",
        _operation("Send again what ended badly", ok=_AGAIN, errors=_ACTED, body="Note", parameters=(_ITEM,)),
    ),
    ("post", f"{_Q}/promote", _operation("Put it first", ok=_OK, errors=_ACTED, body="Note", parameters=(_ITEM,))),
    (
        "post",
        f"{_W}/queue/cancel",
        _operation("Cancel what matches", ok=_OK, errors=(*_WROTE, 404), body="CancelMany", parameters=(_WS,)),
    ),
    ("get", "/dead-letters", _operation("What was set aside", ok=_OK, errors=_LISTED, parameters=_PAGE)),
    (
        "post",
        "/dead-letters/{letter}/replay",
        _operation("Publish it again", ok=_OK, errors=_ACTED, body="Note", parameters=(_in_path("letter"),)),
    ),
    ("get", f"{_W}/queue", _operation("Who waits", ok=_OK, errors=(*_READ, 400), parameters=(_WS, *_LINE, *_PAGE))),
    ("get", "/workspaces", _operation("All workspaces", ok=_OK, errors=_LISTED, parameters=_PAGE)),
    ("get", _W, _operation("What is known of it now", ok=_OK, errors=(*_READ, 410), parameters=(_WS,))),
    ("patch", _W, _operation("Settings", ok=_OK, errors=(*_WROTE, 404, 410), body="Patch", parameters=(_WS,))),
    ("post", f"{_W}/pause", _operation("Pause it", ok=_OK, errors=_PAUSED, body="Note", parameters=(_WS,))),
    ("post", f"{_W}/resume", _operation("Let it go on", ok=_OK, errors=_PAUSED, body="Note", parameters=(_WS,))),
    ("post", f"{_W}/remove", _operation("Remove it for ever", ok=_OK, errors=(*_READ, 410), parameters=(_WS,))),
    ("post", f"{_W}/stop", _operation("Stop what runs", ok=_OK, errors=_ENDED, body="Why", parameters=(_WS,))),
    (
        "post",
        f"{_W}/checkpoint",
        _operation("Ask it to save what it has", ok=_OK, errors=_ENDED, body="Why", parameters=(_WS,)),
    ),
    (
        "post",
        f"{_W}/restart",
        _operation("Restart its agent", ok=_RESTARTED, errors=_ENDED, body="Why", parameters=(_WS,)),
    ),
    (
        "get",
        f"{_W}/life",
        _operation(
            "What was seen of its life, and its restarts",
            ok=_OK,
            errors=(*_LISTED, 404, 410),
            parameters=(_WS, _PAGE[1]),
        ),
    ),
    ("get", _S, _operation("Its schedules", ok=_OK, errors=(*_READ, 410), parameters=(_WS, *_PAGE))),
    ("post", _S, _operation("A new schedule", ok=_MADE, errors=_PLANNED, body="Schedule", parameters=(_WS,))),
    ("get", _SCHEDULE, _operation("A schedule", ok=_OK, errors=(*_READ, 410), parameters=_OF)),
    ("patch", _SCHEDULE, _operation("Change it", ok=_APPLIED, errors=_EDITED, body="Schedule", parameters=_OF)),
    ("delete", _SCHEDULE, _operation("Delete it", ok=_APPLIED, errors=_EDITED, parameters=_OF)),
    ("post", f"{_SCHEDULE}/run", _operation("Fire now", ok=_MADE, errors=_PLANNED, parameters=_OF)),
    ("post", f"{_SCHEDULE}/pause", _operation("Pause", ok=_APPLIED, errors=_PLANNED, body="Note", parameters=_OF)),
    ("post", f"{_SCHEDULE}/resume", _operation("Go on", ok=_APPLIED, errors=_PLANNED, parameters=_OF)),
    ("get", f"{_SCHEDULE}/fires", _operation("Fires", ok=_OK, errors=(*_LISTED, 404, 410), parameters=(*_OF, *_PAGE))),
    (
        "get",
        f"{_SCHEDULE}/preview",
        _operation(
            "The next moments",
            ok=_OK,
            errors=(*_LISTED, 404, 410),
            parameters=(*_OF, _in_query("n", {"type": "integer", "minimum": 1, "maximum": 100})),
        ),
    ),
    (
        "post",
        f"{_W}/a2a",
        _operation(
            "A2A JSON-RPC, 0.3 and 1.0 by the method's name",
            ok={**_OK, "202": "Kept: it will be delivered"},
            errors=_A2A,
            body="RpcRequest",
            parameters=(_WS,),
            rpc=True,
        ),
    ),
)


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for method, path, operation in _TABLE:
        paths.setdefault(path, {})[method] = operation
    return paths


_SCHEDULE_SHAPE: dict[str, Any] = {
    "type": "object",
    "description": "One of cron, every_s and at says when; the scheduler judges the values.",
    "properties": {
        "name": {"type": "string"},
        "cron": {"type": "string", "maxLength": 256},
        "every_s": {"type": "number", "minimum": 1},
        "at": {"type": "string", "format": "date-time"},
        "timezone": {"type": "string", "default": "UTC"},
        "prompt": {"type": "string"},
        "overlap": {"enum": ["queue_one", "queue_all", "skip"], "default": "queue_one"},
        "catchup_window_s": {"type": "number"},
        "jitter_s": {"type": "number"},
        "session_ceiling_s": {"type": "number"},
        "priority": {"enum": ["CRITICAL", "TASK", "INFO"], "default": "TASK"},
        "context": {"enum": ["fresh", "same"], "default": "fresh"},
        "ends_at": {"type": "string", "format": "date-time"},
        "remaining_runs": {"type": "integer", "minimum": 1},
    },
}


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for model in (Register, Heartbeat, UpdateCard, Patch, Note, Why, CancelMany):
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    schemas["RpcRequest"] = {
        "type": "object",
        "required": ["method"],
        "properties": {
            "jsonrpc": {"const": "2.0"},
            "id": {},
            "method": {"type": "string"},
            "params": {"type": "object"},
        },
    }
    error = {"type": "object", "required": ["code", "message"]}
    schemas["Schedule"] = _SCHEDULE_SHAPE
    schemas["RpcError"] = {"type": "object", "required": ["error"], "properties": {"error": error}}
    schemas["Problem"] = {"type": "object", "required": ["status", "title", "code", "detail"]}
    return schemas


DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Bide",
        "version": "1",
        "description": "Keeps AI agents reachable while they are busy, stuck or dead.",
    },
    "paths": _paths(),
    "components": {"schemas": _schemas(), "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
}
OPENAPI = json.dumps(DESCRIPTION).encode()


def _page() -> bytes:
    rows = "".join(
        f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td><td>{', '.join(operation['responses'])}</td></tr>"
        for path, methods in DESCRIPTION["paths"].items()
        for method, operation in methods.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Bide</title>'
        '<meta name="viewport" content="width=device-width"><style>body{font:16px/1.5 system-ui;margin:2rem auto;'
        "max-width:70rem;padding:0 1rem}td{padding:.3rem .8rem;border-top:1px solid #8884;vertical-align:top}"
        "table{border-collapse:collapse}</style></head><body><h1>Bide</h1>"
        "<p>Send <code>Authorization: Bearer &lt;token&gt;</code> with every request. The whole description, with all "
        'fields, is <a href="openapi.json">openapi.json</a>.</p>'
        f"<table>{rows}</table></body></html>"
    ).encode()


DOCS = _page()
