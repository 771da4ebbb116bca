"""One delivery: hand an item to its agent, follow what it accepted, and say what came back.

Nothing here writes: whatever happens ends as an `Ending` that the drain settles. Bytes that may have left are never
sent twice by this file; sending again is the queue's decision, under the same X-Queue-Id and a higher X-Bide-Delivery.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import asyncpg

from services.queue.decide import Item, Reply
from services.queue.settings import Settings
from shared.a2a import Envelope, Verb, parse
from shared.agents import AgentError, Agents, Exchange, Limits
from shared.facts import EvidenceKind
from shared.replies import Answer, Outcome, Verdict, classify
from shared.results import read_result
from shared.settings import STOP_HEARD_S, TURN_SLACK_S
from shared.telemetry import log

CANCEL_TIMEOUT_S = 10.0
"""A cancel that does not return by then is over: there are servers that wait in it for the end of the turn (C-K11)."""
POLL_TIMEOUT_S = 30.0
_UNBOUNDED_S = 1e9
_NO_SUCH_TASK = -32001


@dataclass(frozen=True, slots=True)
class Ending:
    """What a delivery came to."""

    item: Item
    reply: Reply
    answer: bytes | None = None
    error: str | None = None
    retry_after_s: float | None = None
    evidence: EvidenceKind | None = None
    task_canceled: bool = False
    """The answer is a Task that was canceled."""


_REPLIES: dict[Outcome, Reply] = {
    Outcome.DELIVERED: "delivered",
    Outcome.BUSY: "busy",
    Outcome.NOT_DELIVERED: "not_delivered",
    Outcome.PREEMPTED: "preempted",
    Outcome.FAILED_ATTEMPT: "failed_attempt",
    Outcome.REFUSED: "refused",
    Outcome.UNKNOWN: "unknown",
    Outcome.ANSWER_LOST: "answer_lost",
    Outcome.ANSWER_TOO_LARGE: "answer_too_large",
}


class TaskKnown(Protocol):
    """Told the agent's own task id as soon as it is known, and whether the task goes on from an earlier delivery."""

    def __call__(self, item: Item, task_id: str, *, goes_on: bool) -> Awaitable[None]: ...


class Delivery:
    """One item on its way. `run` comes back with its ending; `ask_cancel` and `ask_stop` have the agent asked to end.

    Whatever is asked of the agent, the connection stays: only `hang_up` and the longest turn end it from here.
    """

    def __init__(self, agents: Agents, settings: Settings, item: Item, *, last_life: Callable[[], float]) -> None:
        self.item = item
        self._agents = agents
        self._settings = settings
        self._last_life = last_life
        self._task_id = item.agent_task_id
        self._cancel_owed = item.cancel_requested
        """Somebody wants it canceled, and the agent has not been told."""
        self._stop_asked = False
        self._asked = asyncio.Event()
        self._hung_up: Ending | None = None
        self._untold: Callable[[], Awaitable[None]] | None = None
        """Writes what is known of its task; None: nothing is, or it is written."""
        self._envelope = parse(item.body)
        self._exchange: Exchange | None = None
        self._heard_at = time.monotonic()
        self._clock = asyncio.get_running_loop().time
        self._begun = self._clock()  # not the row's moment, which is another clock's
        self._until = self._begun + self._longest_s()
        self._bound: asyncio.Timeout | None = None

    async def run(self, task_known: TaskKnown) -> Ending:
        """Deliver; an accepted Task is followed to its end, within the longest turn."""
        bound = asyncio.timeout_at(self._until)
        try:
            async with bound:
                self._bound = bound
                return await self._run(task_known)
        except TimeoutError:
            if not bound.expired():
                raise
        finally:
            self._bound = None
        if self._hung_up is not None:
            return replace(self._hung_up, item=self.item)
        # To send it again would only begin another turn of the longest length.
        return Ending(self.item, "ceiling", error="It did not end within the longest time that a turn may take.")

    async def _run(self, task_known: TaskKnown) -> Ending:
        if self._task_id is not None:
            task_id = self._task_id
            followed = await self._follow(task_id, found=lambda: task_known(self.item, task_id, goes_on=True))
            if followed is not None:
                return followed
            if self._stop_asked:
                return self._task_gone()
            self._task_id = None
        verdict, answer = await self._call(_unary(self._envelope))
        if verdict.outcome is not Outcome.ACCEPTED or verdict.agent_task_id is None:
            return self._ending(verdict, answer)
        self._task_id = new_id = verdict.agent_task_id
        self._untold = lambda: task_known(self.item, new_id, goes_on=False)
        return await self._follow(new_id) or self._task_gone()

    def moved(self, url: str, agent_authorization: str | None) -> None:
        """Take over where the agent is now: its task is asked for there."""
        self.item = replace(self.item, url=url, agent_authorization=agent_authorization)

    def bound(self, ceiling_s: float, grace_s: float) -> None:
        """Take over its ceiling as it is now; a lowered one leaves the time in which a session is ended (C-K9)."""
        if (ceiling_s, grace_s) == (self.item.ceiling_s, self.item.grace_s):
            return
        self.item = replace(self.item, ceiling_s=ceiling_s, grace_s=grace_s)
        self._reschedule(max(self._begun + self._longest_s(), self._clock() + grace_s + TURN_SLACK_S))

    def ask_cancel(self) -> None:
        """Remember that somebody wants it canceled; the agent is told when its task id is known."""
        if not self.item.cancel_requested:
            self.item = replace(self.item, cancel_requested=True)
            self._owe_cancel()

    def ask_stop(self, *, heard_age_s: float = 0.0) -> None:
        """Have the agent asked to end it, also if it was asked before; `heard_age_s` ago that was said last.

        While it is being said the longest turn does not count: what ends the session knows better (policies §2).
        """
        if not self._stop_asked:
            self._stop_asked = True
            self._owe_cancel()
        self._reschedule(max(self._until, self._clock() + STOP_HEARD_S - heard_age_s))

    def hang_up(self, reply: Reply, error: str) -> bool:
        """Let go of the connection: it has come to `reply`. False: it has come to something before."""
        if self._hung_up is not None:
            return False
        self._hung_up = Ending(self.item, reply, error=error)
        self._reschedule(self._clock())
        return True

    def silent_s(self) -> float:
        """How long no byte has come."""
        seen_at = self._exchange.seen_at if self._exchange is not None else 0.0
        return time.monotonic() - max(self._heard_at, seen_at)

    def _owe_cancel(self) -> None:
        self._cancel_owed = True
        self._asked.set()

    def _reschedule(self, until: float) -> None:
        self._until = until
        if self._bound is not None and not self._bound.expired():
            self._bound.reschedule(until)

    def _task_gone(self) -> Ending:
        return Ending(self.item, "unknown", error="the agent no longer has the task")

    @property
    def task_id(self) -> str | None:
        return self._task_id

    def _ending(self, verdict: Verdict, answer: bytes | None) -> Ending:
        # A Task that was accepted without an id cannot be followed.
        reply = _REPLIES.get(verdict.outcome, "unknown")
        kept = answer if reply in {"delivered", "refused", "failed_attempt"} else None
        error = None if reply == "delivered" else verdict.text
        canceled = verdict.task_state == "canceled"
        return Ending(self.item, reply, kept, error, verdict.retry_after_s, verdict.evidence, task_canceled=canceled)

    async def _follow(self, task_id: str, *, found: Callable[[], Awaitable[None]] | None = None) -> Ending | None:
        """Ask for the task until it has ended; None: the agent does not know it. A failed poll says nothing.

        `found` has it written that an earlier delivery's task still runs: only the agent knows.
        """
        pause_s = self._settings.follow_min_s
        while True:
            await self._tell_task()
            self._asked.clear()
            if self._cancel_owed:
                await self._send_cancel(task_id)
            verdict, answer = await self._call(_about(self._envelope, "get", task_id), within_s=POLL_TIMEOUT_S)
            if verdict.outcome is Outcome.DELIVERED:
                return self._ending(verdict, answer)
            if answer is not None and read_result(answer).error_code == _NO_SUCH_TASK:
                return None
            if found is not None and verdict.outcome is Outcome.ACCEPTED:
                self._untold, found = found, None
                await self._tell_task()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):  # the agent's own pace; the interval is a setting
                    await self._asked.wait()
            pause_s = min(self._settings.follow_max_s, pause_s * 1.5)

    async def _tell_task(self) -> None:
        """Have it written, so that another replica could follow the task; as often as it takes."""
        if self._untold is None:
            return
        try:
            await self._untold()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("task_id_not_written", queue_id=str(self.item.queue_id), error=type(error).__name__)
        else:
            self._untold = None

    async def _send_cancel(self, task_id: str) -> None:
        """Once for each who asked, but again where it did not reach the agent."""
        self._cancel_owed = False
        verdict, _ = await self._call(_about(self._envelope, "cancel", task_id), within_s=CANCEL_TIMEOUT_S)
        log.info("cancel_forwarded", queue_id=str(self.item.queue_id), outcome=verdict.outcome.value)
        self._cancel_owed = self._cancel_owed or verdict.outcome is Outcome.NOT_DELIVERED

    async def _call(self, body: bytes, *, within_s: float = _UNBOUNDED_S) -> tuple[Verdict, bytes | None]:
        """One request to the agent: what it means, and the answer's bytes."""
        limits = Limits(idle_timeout_s=min(self._settings.forward_idle_s, within_s), total_timeout_s=within_s)
        try:
            exchange = await self._agents.send(
                self.item.url,
                body,
                self._headers(),
                limits=limits,
                last_life=self._last_life,
                fresh=self.item.at_most_once,
            )
            self._exchange = exchange
            async with exchange:
                answer = await exchange.read(self._settings.answer_bytes_max)
        except AgentError as error:
            return classify(error.outcome, now=datetime.now(UTC)), None
        finally:
            if self._exchange is not None:
                self._heard_at, self._exchange = max(self._heard_at, self._exchange.seen_at), None
        return classify(Answer(exchange.status, exchange.headers, answer), now=datetime.now(UTC)), answer

    def _longest_s(self) -> float:
        item = self.item
        return item.ceiling_s + item.grace_s + TURN_SLACK_S if item.ceiling_s else self._settings.forward_max_s

    def _headers(self) -> list[tuple[bytes, bytes]]:
        item = self.item
        headers = [
            (b"content-type", b"application/json"),
            (b"x-queue-id", str(item.queue_id).encode()),
            (b"x-bide-delivery", str(item.delivery_no).encode()),
            (b"x-bide-session", f"{item.queue_id}:{item.delivery_no}".encode()),
            (b"x-bide-hops", str(item.hops + 1).encode()),
        ]
        if "/" not in self._envelope.method:  # the 1.0 dialect
            headers.append((b"a2a-version", b"1.0"))
        authorization = item.agent_authorization or _delivery_token(self._settings, item.workspace_id)
        if authorization:
            headers.append((b"authorization", authorization.encode()))
        return headers


def _delivery_token(settings: Settings, workspace_id: str) -> str | None:
    if settings.delivery_secret is None:
        return None
    secret = settings.delivery_secret.get_secret_value().encode()
    return f"Bearer {hmac.new(secret, workspace_id.encode(), hashlib.sha256).hexdigest()}"


def _unary(envelope: Envelope) -> bytes:
    """The body; a kept stream is delivered as a plain send, for nobody listens to its events."""
    if envelope.verb is not Verb.STREAM:
        return envelope.body
    plain = "message/send" if "/" in envelope.method else "SendMessage"
    return envelope.with_values({"method": plain})


def _about(envelope: Envelope, verb: str, task_id: str) -> bytes:
    """A request about the agent's task, under the id of the caller's request: the answer is his as it comes."""
    names = {"get": ("tasks/get", "GetTask"), "cancel": ("tasks/cancel", "CancelTask")}[verb]
    method = names["/" not in envelope.method]
    request_id = envelope.request_id or "null"
    return f'{{"jsonrpc":"2.0","id":{request_id},"method":"{method}","params":{{"id":{json.dumps(task_id)}}}}}'.encode()
