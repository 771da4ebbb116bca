"""From what became of a message to the bytes of its caller's answer, and the way those bytes leave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from services.proxy.api.answers import (
    Kept,
    agents_ids,
    kept_body,
    kept_headers,
    with_request_id,
    with_request_id_in_events,
)
from services.proxy.api.asking import Found
from services.proxy.api.message import Message, Wish
from services.proxy.api.wire import Refused, Request, Response, rpc_error
from services.proxy.decide import Refuse
from services.proxy.forward import Broken, Passed
from shared.a2a import PARSE_ERROR, Envelope, EnvelopeError, error_body, parse
from shared.http import Send
from shared.outcomes import Fault, Verdict

Landed: TypeAlias = Passed | Kept | Broken | Refuse

EVENT_STREAM = b"text/event-stream"
TOO_LARGE_TO_SHARE = Refuse(
    503, "twin_too_large", "The answer went to whoever sent this message first; it is too large to be given twice."
)


class CallerSink:
    """The caller's connection. One that takes nothing for `stall_s` counts as gone; the forward goes on without it."""

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send = send
        self._stall_s = stall_s
        self._gone = False
        self.began = False

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]], length: int | None) -> None:
        pairs = [*headers, (b"content-length", b"%d" % length)] if length is not None else list(headers)
        await self._out({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, chunk: bytes, *, more: bool) -> None:
        await self._out({"type": "http.response.body", "body": chunk, "more_body": more})

    async def give(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        pairs = [*headers, (b"content-length", b"%d" % len(body))]
        await self._out(
            {"type": "http.response.start", "status": status, "headers": pairs},
            {"type": "http.response.body", "body": body},
        )

    def cut(self) -> None:
        self._gone = True

    async def _out(self, *messages: dict[str, object]) -> None:
        if self._gone:
            return
        self.began = True
        try:
            async with asyncio.timeout(self._stall_s):
                for message in messages:
                    await self._send(message)
        except (TimeoutError, OSError):
            self._gone = True


def render(message: Message, landed: Landed, workspace_id: str) -> Response:
    """The answer, under the id of this caller's request."""
    match landed:
        case Kept():
            return kept(message, landed)
        case Refuse():
            headers = [(b"x-queue-id", message.queue_word.encode())] if landed.code == "keep_unknown" else []
            response = rpc_error(landed, message.request_id, {"target": workspace_id})
            response.headers += headers
            return response
        case Broken(verdict):
            return broken(verdict, message.request_id, workspace_id)
        case Passed():
            return again(message, landed)


def kept(message: Message, landed: Kept, state: str = "submitted") -> Response:
    """The promise: 202 to who expects no answer now, 200 to who reads an answer."""
    body = kept_body(landed, message.dialect, message.request_id, state)
    headers = kept_headers(landed)
    if message.wish is Wish.STREAM:
        event = b"data: " + body + b"\n\n"
        return Response(200, event, EVENT_STREAM, [*headers, (b"cache-control", b"no-cache")])
    return Response(200 if message.wish is Wish.BLOCKING else 202, body, headers=headers)


def again(message: Message, landed: Passed) -> Response:
    """The answer of the same message, for one who joined it."""
    if landed.recorded is None:
        return rpc_error(TOO_LARGE_TO_SHARE, message.request_id)
    content_type = dict(landed.headers).get(b"content-type", b"application/json")
    if content_type.lower().startswith(EVENT_STREAM):
        body = with_request_id_in_events(landed.recorded, message.request_id)
    else:
        body = with_request_id(landed.recorded, message.request_id)
    return Response(landed.status, body, content_type)


_TIMEOUTS = frozenset({Fault.IDLE_TIMEOUT.value, Fault.TOTAL_TIMEOUT.value, Fault.CONNECT_TIMEOUT.value})


def broken(verdict: Verdict, request_id: str, workspace_id: str) -> Response:
    """An error that says class, status, text and target: never an empty one (A-P-08)."""
    status = verdict.status if verdict.status is not None and verdict.status >= 400 else None  # noqa: PLR2004
    status = status or (504 if verdict.reason in _TIMEOUTS else 502)
    data = {
        "code": verdict.reason,
        "class": verdict.outcome.value,
        "status": verdict.status,
        "text": verdict.text,
        "target": workspace_id,
    }
    body = error_body(-32603, f"{workspace_id}: {verdict.text}", request_id=request_id, data=data)
    headers = []
    if verdict.retry_after_s is not None:
        headers.append((b"retry-after", str(round(verdict.retry_after_s)).encode()))
    return Response(status, body, headers=headers)


def agents_task_id(item: Found) -> str | None:
    return agents_ids(item.read())


def parse_call(body: bytes) -> Envelope:
    """Read a request's envelope.

    Raises:
        Refused: it is none; with the id of the request as far as it could be read.
    """
    try:
        return parse(body)
    except EnvelopeError as error:
        refuse = Refuse(error.status, "not_json_rpc", str(error), error.code)
        raise Refused(refuse, error.request_id if error.code != PARSE_ERROR else "null") from None


async def refuse_call(request: Request, refuse: Refuse, request_id: str) -> str:
    """Answer with the error; return the word for it."""
    await rpc_error(refuse, request_id).send(request.send)
    return "failed" if refuse.status >= 500 else "refused"  # noqa: PLR2004
