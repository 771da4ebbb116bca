"""A live forward: the message goes straight to its agent, and what comes back straight to the caller.

Nothing is passed on before it is known not to be busy: an answer that is no stream and no success is read whole first.
From the first byte that the caller gets, everything is the caller's. Its leaving changes nothing here (A-P-05).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from shared.agents import AgentError, Agents, Exchange, Limits, Until
from shared.outcomes import Answer, Fault, Outcome, Verdict
from shared.replies import classify
from shared.results import Kind, Result, read_result

JUDGED_BYTES_MAX = 1 << 16
"""An answer is held back until it is whole or this long: no agent says `busy` in more bytes."""
RECORDED_BYTES_MAX = 1 << 20
"""What is remembered of an answer for those who sent the same message meanwhile."""
_BACK = frozenset({Outcome.BUSY, Outcome.NOT_DELIVERED, Outcome.PREEMPTED})
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server",
    }
)  # fmt: skip

Headers = Sequence[tuple[bytes, bytes]]


class Sink(Protocol):
    """Where an answer goes. It never raises: a caller that is gone is its own business."""

    async def start(self, status: int, headers: Headers, length: int | None) -> None: ...
    async def write(self, chunk: bytes, *, more: bool) -> None: ...
    async def give(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it at once."""

    def cut(self) -> None:
        """End the connection instead of the answer, so that what is missing is not taken for the end."""


class LiveSink(Sink, Protocol):
    """One that can say whether anything of an answer was given to it."""

    began: bool


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Outgoing:
    """What goes to the agent."""

    url: str
    body: bytes
    headers: Headers
    limits: Limits
    last_life: Callable[[], float]
    until: Until | None = None
    """Bounds it instead of the total limit; None: it is no session."""


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Passed:
    """The caller has the agent's answer; `recorded` is it, unless it is too large for those who joined."""

    verdict: Verdict
    status: int
    headers: Headers
    recorded: bytes | None


@dataclass(frozen=True, slots=True)
class Back:
    """Busy, not delivered or preempted: nothing was passed on, the message is to be kept."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing was passed on, and there is no answer of the agent that could be."""

    verdict: Verdict


Ending = Passed | Back | Broken


TaskKnown = Callable[[str], None]
"""Told the id of the agent's Task before the caller is: where an answer is too large to be held back, right after."""


DIED = (
    "Unknown: the message was sent, and its agent was declared dead before it had answered. It may have taken it. "
    "Send it again with the same messageId: it is kept until the agent is back."
)


STOPPED = (
    "Its session was told to stop ({reason}), and it ended without an answer. The agent may have done a part of it, "
    "and nobody sends it again: look what is done before you do."
)


def as_stopped(ending: Ending, reason: str | None) -> Ending:
    """What was told to stop for this reason and has no answer is not kept: it would be the same session once more."""
    if reason is None or isinstance(ending, Passed) or ending.verdict.outcome is Outcome.NOT_DELIVERED:
        return ending
    return Broken(Verdict(Outcome.UNKNOWN, "session_stopped", STOPPED.format(reason=reason)))


async def forward_within(
    bound: asyncio.Timeout, agents: Agents, outgoing: Outgoing, sink: LiveSink, *, task_known: TaskKnown | None = None
) -> Ending:
    """As `forward`, for as long as its agent lives: whoever knows better ends it by `bound`."""
    try:
        async with bound:
            return await forward(agents, outgoing, sink, task_known=task_known)
    except TimeoutError:
        if not bound.expired():
            raise
    verdict = Verdict(Outcome.UNKNOWN, "agent_died", DIED)
    if not sink.began:
        return Broken(verdict)
    sink.cut()
    return Passed(verdict, 0, (), None)


async def forward(
    agents: Agents, outgoing: Outgoing, sink: Sink, *, keepable: bool = True, task_known: TaskKnown | None = None
) -> Ending:
    """Send and pass on. `keepable` False: what is no message is not kept, so a busy answer is passed on as well."""
    try:
        exchange = await agents.send(
            outgoing.url,
            outgoing.body,
            outgoing.headers,
            limits=outgoing.limits,
            last_life=outgoing.last_life,
            until=outgoing.until,
        )
    except AgentError as error:
        verdict = _classify(error)
        return Back(verdict) if keepable and verdict.outcome in _BACK else Broken(verdict)
    async with exchange:
        if _is_stream(exchange):
            return await _stream(exchange, sink, task_known)
        return await _answer(exchange, sink, task_known, keepable=keepable)


async def _answer(exchange: Exchange, sink: Sink, task_known: TaskKnown | None, *, keepable: bool) -> Ending:
    tape = _Tape()
    whole = True
    try:
        async for chunk in exchange.chunks():
            tape.add(chunk)
            if tape.size > JUDGED_BYTES_MAX:
                whole = False
                break
    except AgentError as error:
        return Broken(_classify(error))
    body = tape.bytes() if whole else None
    verdict = classify(_answered(exchange, body), now=datetime.now(UTC))
    if keepable and verdict.outcome in _BACK:
        return Back(verdict)
    headers = _end_to_end(exchange)
    if body is None:
        return await _pour(exchange, sink, tape, headers, task_known)
    if not _says_something(body, verdict):
        return Broken(verdict)
    if verdict.outcome not in (Outcome.DELIVERED, Outcome.ACCEPTED):
        headers = [*headers, (b"x-bide-outcome", verdict.outcome.value.encode())]
    _tell(task_known, verdict)
    await sink.give(exchange.status, headers, body)
    return Passed(verdict, exchange.status, headers, body)


def _tell(task_known: TaskKnown | None, verdict: Verdict) -> None:
    if task_known is not None and verdict.agent_task_id is not None:
        task_known(verdict.agent_task_id)


async def _pour(exchange: Exchange, sink: Sink, tape: _Tape, headers: Headers, task_known: TaskKnown | None) -> Ending:
    """A large answer: passed on as it comes; its end decides only what is counted."""
    await sink.start(exchange.status, headers, None)
    await sink.write(tape.bytes(), more=True)
    try:
        async for chunk in exchange.chunks():
            tape.add(chunk)
            await sink.write(chunk, more=True)
    except AgentError as error:
        sink.cut()
        return Passed(_classify(error), exchange.status, headers, None)
    await sink.write(b"", more=False)
    body = tape.bytes() if tape.is_whole else None
    verdict = classify(_answered(exchange, body), now=datetime.now(UTC))
    _tell(task_known, verdict)
    return Passed(verdict, exchange.status, headers, body)


def _answered(exchange: Exchange, body: bytes | None) -> Answer:
    return Answer(exchange.status, exchange.headers, body, Fault.TOO_LARGE if body is None else None)


async def _stream(exchange: Exchange, sink: Sink, task_known: TaskKnown | None) -> Ending:
    headers = _end_to_end(exchange)
    await sink.start(exchange.status, headers, None)
    tape, events, first = _Tape(), _LastEvent(), _FirstTask(task_known)
    fault = None
    try:
        async for chunk in exchange.chunks():
            tape.add(chunk)
            events.add(chunk)
            first.add(chunk)
            await sink.write(chunk, more=True)
        await sink.write(b"", more=False)
    except AgentError as error:
        fault = error.outcome.fault
        sink.cut()
    answer = Answer(exchange.status, exchange.headers, None, fault)
    verdict = classify(answer, now=datetime.now(UTC), streamed=True, seen=events.read())
    return Passed(verdict, exchange.status, headers, tape.bytes() if tape.is_whole and fault is None else None)


def _classify(error: AgentError) -> Verdict:
    return classify(error.outcome, now=datetime.now(UTC))


def _is_stream(exchange: Exchange) -> bool:
    success = 200 <= exchange.status < 300  # noqa: PLR2004
    return success and exchange.headers.get("content-type", "").lower().startswith("text/event-stream")


def _says_something(body: bytes, verdict: Verdict) -> bool:
    """Whether a JSON-RPC client can read the body; an empty error must not reach a caller (A-P-08)."""
    if verdict.outcome in (Outcome.DELIVERED, Outcome.ACCEPTED):
        return True
    return read_result(body).kind is not Kind.NOTHING


def _end_to_end(exchange: Exchange) -> Headers:
    connection = exchange.headers.get("connection")
    named = {name.strip().lower().encode() for name in connection.split(",")} if connection else ()
    return [pair for pair in exchange.raw_headers if pair[0] not in _HOP_BY_HOP and pair[0] not in named]


@dataclass(slots=True)
class _Tape:
    """What has been passed on, as long as it is not too much."""

    size: int = 0
    _pieces: list[bytes] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.size <= RECORDED_BYTES_MAX

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.is_whole:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def bytes(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


@dataclass(slots=True)
class _LastEvent:
    """The end of a stream says whether the turn is over: its last events are enough, and only they are read."""

    _tail: bytes = b""

    def add(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-JUDGED_BYTES_MAX:]

    def read(self) -> Result:
        seen = Result(Kind.NOTHING)
        for event in self._tail.replace(b"\r\n", b"\n").split(b"\n\n")[-8:]:
            data = _data(event)
            if data:
                seen = seen.then(read_result(data))
        return seen


@dataclass(slots=True)
class _FirstTask:
    """A stream is of one task, and its first event that names it says which: the rest is not read for it."""

    told: TaskKnown | None
    _rest: bytes = b""

    def add(self, chunk: bytes) -> None:
        if self.told is None:
            return
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = _data(event)
            task_id = read_result(data).task_id if data else None
            if task_id is not None:
                self.told(task_id)
                self.told = None
                return
        if len(self._rest) > RECORDED_BYTES_MAX:
            self.told = None


def _data(event: bytes) -> bytes:
    lines = (line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines)
