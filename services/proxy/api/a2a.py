"""POST /workspaces/{id}/a2a: the way of one message. Read it, decide, then forward it, keep it, or join its twin.

While held calls and bridged streams are not built, a blocking or streaming call to a busy workspace gets the submitted
Task: with 200, because its SDK reads an answer there; only who expects no answer now gets 202 (2-http).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from services.proxy.api.answers import Kept
from services.proxy.api.ending import Endings
from services.proxy.api.finding import Finding
from services.proxy.api.forwarding import Forwarding
from services.proxy.api.identity import Caller, Identity
from services.proxy.api.keeping import KEY_CONFLICT, NOT_KEPT, Keeper
from services.proxy.api.message import Message, Wish, now_utc, read_message
from services.proxy.api.questions import Questions
from services.proxy.api.rendering import Landed, parse_call, refuse_call
from services.proxy.api.situation import Situation
from services.proxy.api.tasks import Tasks
from services.proxy.api.wire import Refused, Request
from services.proxy.copies import Copies
from services.proxy.copies.flights import Flight
from services.proxy.decide import (
    Arrival,
    Ask,
    Attach,
    Forward,
    Head,
    Keep,
    Reason,
    Refuse,
    Verdict,
    Workspace,
    admit,
    route,
)
from services.proxy.forward import Back, Broken, Passed
from services.proxy.metrics import ATTACHED, STALE_COPY
from services.proxy.settings import Settings
from shared.a2a import Envelope, Verb
from shared.telemetry import log

LOST = Refuse(
    503, "twin_lost", "The same message was under way and its answer got lost. Send it again.", retry_after_s=1
)
_NO_PLACE = (NOT_KEPT, KEY_CONFLICT)


class A2A:
    """The hot route."""

    def __init__(
        self,
        settings: Settings,
        copies: Copies,
        *,
        identity: Identity,
        finding: Finding,
        keeper: Keeper,
        questions: Questions,
        tasks: Tasks,
        forwarding: Forwarding,
        stopping: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._copies = copies
        self._identity = identity
        self._finding = finding
        self._keeper = keeper
        self._questions = questions
        self._tasks = tasks
        self._forwarding = forwarding
        self._situation = Situation(settings, copies)
        self._endings = Endings(copies, questions, stopping)

    async def __call__(self, request: Request, workspace_id: str) -> str:
        """Answer the request; return the word for what became of it."""
        standing, caller = await self._identity.tell(request)
        # Nobody unknown makes us ask Postgres.
        workspace = (await self._finding.find(workspace_id)) if caller else self._copies.registry.find(workspace_id)
        head = self._situation.head(request, workspace, standing, caller)
        refuse = admit(head)
        if refuse is not None or caller is None or workspace is None:
            return await refuse_call(request, refuse or LOST, "null")
        try:
            body = await request.body(self._settings.body_bytes_max, self._settings.body_read_s)
            envelope = parse_call(body)
        except Refused as error:
            return await refuse_call(request, error.refuse, error.request_id)
        if envelope.verb in (Verb.SEND, Verb.STREAM) and envelope.has_message:
            return await self._message(request, head, caller, workspace, envelope)
        return await self._tasks(request, caller, workspace, envelope, head.hops or 0)

    async def _message(
        self, request: Request, head: Head, caller: Caller, workspace: Workspace, envelope: Envelope
    ) -> str:
        started = time.perf_counter()
        request_id = envelope.request_id or "null"
        try:
            message = read_message(
                request, caller, workspace.workspace_id, envelope,
                hops=head.hops or 0, wait_max_s=self._settings.wait_max_s, now=now_utc(),
            )  # fmt: skip
            message = await self._tasks.resolve(message)
        except Refused as error:
            verdict = route(Arrival(head=head, fault=error.refuse))
            assert isinstance(verdict, Refuse), "a fault is refused"
            return await refuse_call(request, verdict, request_id)
        arrival = self._situation.arrival(head, message, workspace)
        verdict = route(arrival)
        if isinstance(verdict, Ask):
            known = await self._questions.knows(message)
            # Much may have happened meanwhile: it is looked at anew, and from here on nothing is awaited.
            arrival = self._situation.arrival(head, message, workspace)
            arrival.known = known or bool(arrival.known)
            verdict = route(arrival)
            assert not isinstance(verdict, Ask), "it is asked once"
        counted = self._situation.count(message, arrival, verdict)
        word, landed = await self._follow(verdict, request, message, workspace)
        if counted and (landed in _NO_PLACE or (isinstance(landed, Kept) and landed.is_known)):
            self._situation.uncount(message)
        _log(message, verdict, landed, became=word, took_s=time.perf_counter() - started)
        return word

    async def _follow(
        self, verdict: Verdict, request: Request, message: Message, workspace: Workspace
    ) -> tuple[str, Landed | None]:
        """Do what was decided. Nothing is awaited before it counts: the next message sees this one."""
        match verdict:
            case Refuse():
                return await refuse_call(request, verdict, message.request_id), None
            case Attach():
                return await self._attach(request, message), None
            case Keep(reason):
                return await self._begin(request, message, workspace, reason)
            case Forward(stale_copy):
                if stale_copy:
                    STALE_COPY.inc()
                return await self._begin(request, message, workspace, None)

    async def _begin(
        self, request: Request, message: Message, workspace: Workspace, reason: Reason | None
    ) -> tuple[str, Landed]:
        """Take the message in hand: `reason` says why it is kept, None that it goes to the agent."""
        key = (message.workspace_id, message.caller.caller_hash, message.key_hash)
        flights = self._copies.flights
        flight = None
        if message.has_key:
            flight = flights.begin(key, message.envelope.method, message.body_hash, message.queue_word)
        try:
            if message.wish is Wish.LIMITED and reason is not None:
                with self._copies.keeps.waiting_for(message.queue_id) as waiter:
                    landed: Landed = await self._land(flight, await self._keeper.keep(message, reason))
                    return await self._endings.answer(request, message, landed, waiter), landed
            landed = await self._deliver(request, message, workspace, reason)
            await self._land(flight, landed)
        finally:
            if flight is not None:
                flights.end(key, flight)
        if isinstance(landed, Passed):
            return "answered", landed
        return await self._endings.answer(request, message, landed, None), landed

    async def _land(self, flight: Flight | None, landed: Landed) -> Landed:
        """Tell those who joined; a flight that has landed is over, whoever of them waits on."""
        if flight is not None and not flight.landed.done():
            flight.landed.set_result(landed)
        return landed

    async def _deliver(self, request: Request, message: Message, workspace: Workspace, reason: Reason | None) -> Landed:
        if reason is not None:
            return await self._keeper.keep(message, reason)
        ending = await self._forwarding.forward(request, message, workspace)
        match ending:
            case Passed():
                return ending
            case Back(verdict):
                return await self._keeper.keep(message, Reason(verdict.outcome.value))
            case Broken():
                return ending

    async def _attach(self, request: Request, message: Message) -> str:
        """Wait for the answer of the same message; each gets it under the id of its own request."""
        key = (message.workspace_id, message.caller.caller_hash, message.key_hash)
        flight = self._copies.flights.find(key)
        assert flight is not None, "the verdict said so"
        ATTACHED.inc()
        flight.joined += 1
        try:
            landed = await asyncio.shield(flight.landed)
        except asyncio.CancelledError:
            if not flight.landed.cancelled():
                raise
            return await refuse_call(request, LOST, message.request_id)
        assert isinstance(landed, Passed | Kept | Broken | Refuse)
        # Where the keep is unknown, all retries must bring back one id: that under which the broker may have it.
        joined = replace(message, queue_word=flight.queue_word)
        return await self._endings.answer(request, joined, landed, None)


def _log(message: Message, verdict: Verdict, landed: Landed | None, *, became: str, took_s: float) -> None:
    """The one line of a message: never its text, never a token."""
    facts: dict[str, object] = {}
    if isinstance(verdict, Keep):
        facts["reason"] = verdict.reason.value
    elif isinstance(verdict, Forward) and verdict.stale_copy:
        facts["stale_copy"] = True
    match landed or verdict:
        case Passed(verdict=came) | Broken(verdict=came):
            facts |= {"outcome": came.outcome.value, "status": came.status}
        case Kept(reason=reason):
            facts["reason"] = reason
        case Refuse(code=code):
            facts["code"] = code
    log.info(
        "message_routed",
        workspace_id=message.workspace_id,
        caller_id=message.caller.caller_id,
        queue_id=message.queue_word,
        method=message.envelope.method,
        verdict=type(verdict).__name__.lower(),
        became=became,
        took_ms=round(took_s * 1000, 1),
        **facts,
    )
