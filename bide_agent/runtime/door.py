"""The routes of an agent, and who may pass: Bide alone, once it has told the agent what it will show.

Before that, an agent that belongs to a Bide answers 503 with Retry-After: it cannot know who calls. Where Bide has no
`BIDE_DELIVERY_SECRET` it shows nothing, and everybody is let in.
"""

from __future__ import annotations

import hmac
import json
from typing import Protocol

from bide_agent import shapes
from bide_agent.calls import INTERNAL_ERROR, WITH_SUBSCRIBE, CallError, read
from bide_agent.decide import Result
from bide_agent.directives import Directives
from bide_agent.runtime.replies import Replies
from bide_agent.server import BODY_MAX, Exchange, TooLargeError, told

CARDS = ("/.well-known/agent-card.json", "/.well-known/agent.json")
DIRECTIVES = {"/control/checkpoint": "checkpoint", "/control/stop": "stop"}


class Guard(Protocol):
    """Who knows what a caller must carry."""

    @property
    def delivery_token(self) -> str | None: ...
    @property
    def lets_everybody_in(self) -> bool: ...


class Door:
    """Every request comes in here."""

    def __init__(self, replies: Replies, directives: Directives, guard: Guard, card: shapes.Json) -> None:
        self._replies = replies
        self._directives = directives
        self._guard = guard
        self._card = json.dumps(card).encode()

    async def __call__(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except TooLargeError:
            await exchange.problem(413, "Too large", f"The body is over {BODY_MAX} bytes.", connection="close")

    async def _route(self, exchange: Exchange) -> None:
        match exchange.method, exchange.path:
            case "GET", path if path in CARDS:
                await exchange.respond(200, self._card)
            case "POST", path if path in {"/", *DIRECTIVES}:
                body = await exchange.body()
                if not await self._is_let_in(exchange):
                    return
                if path == "/":
                    await self._call(exchange, body)
                else:
                    await self._directive(exchange, DIRECTIVES[path], body)
            case method, path:
                there = f"POST /, GET {CARDS[0]}, POST {' or '.join(DIRECTIVES)}"
                await exchange.problem(404, "Not found", f"There is no {method} {path} here. Try {there}.")

    async def _is_let_in(self, exchange: Exchange) -> bool:
        if self._guard.lets_everybody_in:
            return True
        token = self._guard.delivery_token
        if token is None:
            sentence = "busy: this agent has not registered yet and cannot know its callers; come again later"
            body = shapes.error(None, INTERNAL_ERROR, sentence, "busy")
            await exchange.respond(503, body, retry_after="1")
            return False
        if hmac.compare_digest(exchange.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
            return True
        detail = "This agent takes calls from Bide only: Authorization: Bearer and the token it was told."
        await exchange.problem(401, "Unauthorized", detail, www_authenticate="Bearer")
        return False

    async def _call(self, exchange: Exchange, body: bytes) -> None:
        try:
            call = read(body, WITH_SUBSCRIBE)
        except CallError as error:
            await exchange.respond(200, shapes.error(error.request_id, error.code, str(error)))
            return
        await self._replies.answer(exchange, call)

    async def _directive(self, exchange: Exchange, kind: str, body: bytes) -> None:
        try:
            directive = {"kind": kind, **told(body)}
        except (ValueError, RecursionError) as error:
            await exchange.problem(422, "No directive", str(error))
            return
        result = self._directives.hear(directive) if directive["kind"] == kind else None
        if result is None:
            detail = f"A directive here has an id, which is a string, and its kind is {kind} or left out."
            await exchange.problem(422, "No directive", detail)
        elif result is Result.ENDED:
            detail = "No session of this id runs here: it has ended, or its message has not come yet."
            await exchange.problem(409, "No such session", detail)
        else:
            await exchange.respond(200, json.dumps({"result": result.value}).encode())
