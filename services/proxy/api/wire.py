"""HTTP as the routes see it: a request with a bounded body, an answer, and the two forms of an error.

Errors on plain routes are problem+json, on A2A routes JSON-RPC errors with their HTTP status, but for those that are
replies of the protocol itself. All carry the code, a sentence that says what, why and what to do, and Retry-After where
it helps.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qs
from uuid import UUID

from pydantic import BaseModel, ValidationError

from services.proxy.decide import Refuse
from services.proxy.metrics import REFUSED
from shared.a2a import error_body
from shared.http import Receive, Scope, Send

Pairs = list[tuple[bytes, bytes]]
ModelT = TypeVar("ModelT", bound=BaseModel)


class Refused(Exception):  # noqa: N818 - an outcome: the router renders it
    """A route says no. `request_id` is what a JSON-RPC error answers to."""

    def __init__(self, refuse: Refuse, request_id: str = "null") -> None:
        super().__init__(refuse.sentence)
        self.refuse = refuse
        self.request_id = request_id


class Request:
    """One request. Headers by lower-case name; of one that stands twice the last counts."""

    __slots__ = ("headers", "method", "path", "receive", "scope", "send")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return value.decode("latin-1").strip() if value is not None else None

    def query(self) -> Mapping[str, str]:
        pairs = parse_qs(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        return {name: values[-1] for name, values in pairs.items()}

    def origin(self) -> str:
        """Scheme and host by which the caller reached us."""
        host = (self.headers.get(b"host") or b"localhost").decode("latin-1")
        return f"{self.scope.get('scheme', 'http')}://{host}"

    async def body(self, bytes_max: int, within_s: float) -> bytes:
        """The whole body.

        Raises:
            Refused: it is larger than `bytes_max`, or did not come in time, or the caller went away.
        """
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > bytes_max:
            raise Refused(_too_large(bytes_max))
        message = await self.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            try:
                async with asyncio.timeout(within_s):
                    body = await self._rest(body, bytes_max)
            except TimeoutError:
                raise Refused(Refuse(408, "body_slow", "The body did not come in time. Send it again.")) from None
        if len(body) > bytes_max:
            raise Refused(_too_large(bytes_max))
        return body

    async def _rest(self, first: bytes, bytes_max: int) -> bytes:
        pieces, size = [first], len(first)
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Refused(Refuse(400, "body_cut", "The body did not come whole. Send it again."))
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > bytes_max:
                raise Refused(_too_large(bytes_max))
            pieces.append(piece)
            if not message.get("more_body"):
                return b"".join(pieces)


def _too_large(bytes_max: int) -> Refuse:
    sentence = f"The body has more than {bytes_max} bytes. Send less, or a reference to where the rest is."
    return Refuse(413, "body_too_large", sentence, -32600)


@dataclass(slots=True)
class Response:
    """An answer that is whole."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Pairs = field(default_factory=list)

    async def send(self, send: Send) -> None:
        headers = [
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def validated(kind: type[ModelT], body: bytes) -> ModelT:
    """Read a JSON body.

    Raises:
        Refused: 400 where it is no JSON, 422 where a value is not what it must be; each value with its own reason.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if any(found["type"] == "json_invalid" for found in problems):
            raise Refused(Refuse(400, "not_json", "The body is not JSON. Send an object.")) from None
        said = "; ".join(f"{'.'.join(map(str, found['loc'])) or 'body'}: {found['msg']}" for found in problems)
        raise Refused(Refuse(422, "bad_value", f"{said}."[:1000])) from None


def answer(status: int, body: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]] = ()) -> Response:
    return Response(status, json.dumps(body).encode(), headers=list(headers))


def problem(refuse: Refuse) -> Response:
    """RFC 9457, with our code beside it."""
    body = {
        "type": "about:blank",
        "status": refuse.status,
        "title": HTTPStatus(refuse.status).phrase,
        "code": refuse.code,
        "detail": refuse.sentence,
    }
    return Response(refuse.status, json.dumps(body).encode(), b"application/problem+json", error_headers(refuse))


def rpc_error(refuse: Refuse, request_id: str, data: Mapping[str, Any] | None = None) -> Response:
    """A JSON-RPC error; `data` says more than the code."""
    REFUSED.labels(refuse.code).inc()
    details = {"code": refuse.code, "class": "refused", "status": refuse.status, "text": refuse.sentence}
    body = error_body(refuse.rpc_code, refuse.sentence, request_id=request_id, data={**details, **(data or {})})
    return Response(200 if refuse.is_reply else refuse.status, body, headers=error_headers(refuse))


def error_headers(refuse: Refuse) -> Pairs:
    headers: Pairs = []
    if refuse.retry_after_s is not None:
        headers.append((b"retry-after", str(refuse.retry_after_s).encode()))
    if refuse.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if refuse.status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return headers


_UUID7 = 7


def own_id(said: Any) -> UUID | None:
    """The id, if it can be one of ours."""
    try:
        found = UUID(said) if isinstance(said, str) else None
    except ValueError:
        return None
    return found if found is not None and found.version == _UUID7 and str(found) == str(said).lower() else None
