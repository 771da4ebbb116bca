"""The way of one forward: sent, judged, passed on."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from services.proxy.forward.ending import Back, Broken, Ending, Headers, LiveSink, Outgoing, Passed, Sink, TaskKnown
from services.proxy.forward.watching import JUDGED_BYTES_MAX, FirstTask, LastEvent, Tape
from shared.agents import AgentError, Agents, Exchange
from shared.outcomes import Answer, Fault, Outcome, Verdict
from shared.replies import classify
from shared.results import Kind, read_result

_BACK = frozenset({Outcome.BUSY, Outcome.NOT_DELIVERED, Outcome.PREEMPTED})
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server",
    }
)  # fmt: skip

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
    tape = Tape()
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


async def _pour(exchange: Exchange, sink: Sink, tape: Tape, headers: Headers, task_known: TaskKnown | None) -> Ending:
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
    tape, events, first = Tape(), LastEvent(), FirstTask(task_known)
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
