"""The agent's routes, and who may pass: Bide by the delivery token, whoever tests the agent from this machine only.

`POST /control/checkpoint` and `/control/stop` take a directive as JSON: 200 `{"result": …}`, or 409 where the session
does not run here. `POST /control/behave` takes changes of `Behaviour` (and `busy_s`) as JSON, `POST /control/beat`
makes the heart beat now; both answer the behaviour and what is active.
"""

from __future__ import annotations

import dataclasses
import hmac
import json

from bide_agent import shapes
from bide_agent.behaviour import BehaviourError, Fate
from bide_agent.calls import INTERNAL_ERROR, Call, CallError, Verb, read
from bide_agent.decide import Result
from bide_agent.directives import Directives
from bide_agent.messages import Messages
from bide_agent.record import Received, received
from bide_agent.server import BODY_MAX, Exchange, TooLargeError, told
from bide_agent.state import State

CARDS = ("/.well-known/agent-card.json", "/.well-known/agent.json")
DIRECTIVES = {"/control/checkpoint": "checkpoint", "/control/stop": "stop"}


class Door:
    """Every request comes in here."""

    def __init__(self, state: State, messages: Messages, directives: Directives) -> None:
        self._state = state
        self._directives = directives
        self._messages = messages

    async def __call__(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except TooLargeError:
            await exchange.problem(413, "Too large", f"The body is over {BODY_MAX} bytes.", connection="close")

    async def _route(self, exchange: Exchange) -> None:
        match exchange.method, exchange.path:
            case "POST", "/":
                await self._call(exchange)
            case "GET", path if path in CARDS:
                card = shapes.card(self._state.options.workspace, self._state.url)
                await exchange.respond(200, json.dumps(card).encode())
            case "POST", path if path in DIRECTIVES and self._state.behaviour.control:
                await self._directive(exchange, DIRECTIVES[path])
            case "POST", "/control/behave" | "/control/beat":
                await self._control(exchange)
            case method, path:
                there = f"POST /, {CARDS[0]}, POST {', '.join(DIRECTIVES)}, /control/behave or /control/beat"
                detail = f"There is no {method} {path} here. Try {there}."
                await exchange.problem(404, "Not found", detail)

    async def _call(self, exchange: Exchange) -> None:
        body = await exchange.body()
        one = received(self._state.options.workspace, body, exchange.headers)
        try:
            call = read(body)
        except CallError as error:
            await self._unreadable(exchange, error, one)
            return
        one.message_id, one.text = call.message_id, call.text
        is_message = call.verb in {Verb.SEND, Verb.STREAM}
        if not self._known(exchange):
            await self._stranger(exchange, one if is_message else None)
        elif not is_message or not await self._turned_away(exchange, call, one):
            await self._messages.answer(exchange, call, one)

    async def _unreadable(self, exchange: Exchange, error: CallError, one: Received) -> None:
        if not self._known(exchange):
            await self._stranger(exchange, one)
            return
        self._refuse(one, "unreadable")
        await exchange.respond(200, shapes.error(error.request_id, error.code, str(error)))

    async def _turned_away(self, exchange: Exchange, call: Call, one: Received) -> bool:
        """Refuse a message before a slot is taken, if it comes to that."""
        state = self._state
        if state.spend([Fate.WRONG_TOKEN]):
            await self._stranger(exchange, one)
        elif state.spend([Fate.BARE_503]):
            self._refuse(one, "bare_503")
            await exchange.respond(503, b"no upstream\n", "text/plain")
        elif state.turns.full:
            self._refuse(one, "busy")
            sentence = f"busy: {state.turns.active} of {state.turns.max_concurrent} slots are taken; come again later"
            busy = shapes.error(call.request_id, INTERNAL_ERROR, sentence, "busy")
            await exchange.respond(503, busy, retry_after=str(state.behaviour.retry_after_s))
        else:
            return False
        return True

    def _refuse(self, one: Received, outcome: str) -> None:
        self._state.record.refuse(one, active=self._state.turns.active, outcome=outcome)

    def _known(self, exchange: Exchange) -> bool:
        delivery = self._state.tokens.delivery
        if delivery is None or not self._state.behaviour.check_token:
            return True
        said = exchange.headers.get("authorization", "")
        return hmac.compare_digest(said.encode(), f"Bearer {delivery}".encode())

    async def _stranger(self, exchange: Exchange, one: Received | None) -> None:
        if one:
            self._refuse(one, "wrong_token")
        detail = "This agent takes calls from Bide only: Authorization: Bearer and the token it was told."
        await exchange.problem(401, "Unauthorized", detail, www_authenticate="Bearer")

    async def _directive(self, exchange: Exchange, kind: str) -> None:
        if not self._known(exchange):
            await self._stranger(exchange, None)
            return
        try:
            directive = {"kind": kind, **told(await exchange.body())}
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

    async def _control(self, exchange: Exchange) -> None:
        if not exchange.from_loopback:
            await exchange.problem(403, "Forbidden", "Only a process on this machine may control this agent.")
            return
        try:
            if exchange.path == "/control/beat":
                self._state.wake.set()
            else:
                self._state.behave(told(await exchange.body()))
        except (BehaviourError, ValueError) as error:
            await exchange.problem(422, "No such behaviour", str(error))
            return
        turns = self._state.turns
        report = {"behaviour": dataclasses.asdict(self._state.behaviour), "active": turns.active}
        await exchange.respond(200, json.dumps(report).encode())
