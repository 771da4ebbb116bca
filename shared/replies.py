"""What came back from an agent, and what it means: the table of policies §2, for live forwards and deliveries alike.

Pure: values in, a verdict out; no clock, no I/O. The rows are asked in the order of the table and the first that is
true decides, but for the marks `busy` and `preempted`, which an agent sets on purpose and which outrank all.
Nothing that the agent wrote gets into a verdict's words: a body may hold a prompt. Reading JSON is `shared/results.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from shared.facts import EvidenceKind
from shared.outcomes import Answer, Fault, NoAnswer, Outcome, Verdict
from shared.results import FINAL_STATES, Kind, Result, read_result

__all__ = ["Answer", "Fault", "NoAnswer", "Outcome", "Result", "Verdict", "classify", "read_result", "retry_after_s"]

RETRY_AFTER_MAX_S = 3600.0
"""An agent that asks for more is asked again after this."""


_WORDS = {
    Fault.ADDRESS_REFUSED: "its address is one that we never connect to",
    Fault.REQUEST_REFUSED: "the request holds a header that must not be sent",
    Fault.NO_CONNECTION: "no connection was free in time on our side",
    Fault.DNS: "its name could not be resolved",
    Fault.CONNECTION_REFUSED: "it refused the connection",
    Fault.UNREACHABLE: "no route leads to it",
    Fault.CONNECT_TIMEOUT: "it did not take the connection in time",
    Fault.TLS: "no TLS session could be made with it",
    Fault.EOF: "it closed the connection",
    Fault.RESET: "the connection was reset",
    Fault.IDLE_TIMEOUT: "it sent nothing and showed no life for too long",
    Fault.TOTAL_TIMEOUT: "it did not end within the longest time that a turn may take",
    Fault.MALFORMED: "what it sent is not HTTP/1.1",
    Fault.TOO_LARGE: "its answer is larger than what can be kept",
    Fault.HUNG_UP: "we hung up",
}

_SUSPICIONS = {
    Fault.DNS: EvidenceKind.REFUSED,
    Fault.CONNECTION_REFUSED: EvidenceKind.REFUSED,
    Fault.UNREACHABLE: EvidenceKind.REFUSED,
    Fault.TLS: EvidenceKind.REFUSED,
    Fault.CONNECT_TIMEOUT: EvidenceKind.TIMEOUT,
    Fault.IDLE_TIMEOUT: EvidenceKind.TIMEOUT,
    Fault.EOF: EvidenceKind.RESET,
    Fault.RESET: EvidenceKind.RESET,
}


def classify(what: Answer | NoAnswer, *, now: datetime, streamed: bool = False, seen: Result | None = None) -> Verdict:
    """Say which row of §2 this is.

    `streamed`: the answer was an event stream, which ended cleanly (no fault) or not; `seen` is then what its events
    said, folded with `Result.then`. `now` is for a Retry-After that is a date.
    """
    if isinstance(what, NoAnswer):
        return _no_answer(what)
    read = read_result(what.body) if what.body is not None else None
    result = (seen if streamed else read) or Result(Kind.NOTHING)
    verdict = (
        _marked(what, result)
        or _by_status(what)
        or _by_error(what, result)
        or _by_result(what, result, streamed=streamed)
    )
    verdict.status = what.status
    verdict.evidence = verdict.evidence or _life(what.fault)
    verdict.retry_after_s = retry_after_s(what.headers, now)
    verdict.agent_task_id = result.task_id
    verdict.context_id = result.context_id
    verdict.task_state = result.state
    return verdict


def _no_answer(what: NoAnswer) -> Verdict:
    why, evidence = _WORDS[what.fault], _SUSPICIONS.get(what.fault)
    if what.sent:
        text = f"Unknown: the message was sent and no answer came, {why}. The agent may have taken it."
        return Verdict(Outcome.UNKNOWN, what.fault, text, evidence=evidence)
    if what.fault is Fault.REQUEST_REFUSED:
        return Verdict(Outcome.REFUSED, what.fault, f"Refused: nothing was sent, {why}. Correct the request.")
    text = f"Not delivered: nothing was sent to the agent, {why}."
    return Verdict(Outcome.NOT_DELIVERED, what.fault, text, evidence=evidence)


def _marked(what: Answer, result: Result) -> Verdict | None:
    if result.error_mark == "busy":
        return Verdict(
            Outcome.BUSY, "marked_busy", f"Busy: the agent answered {what.status} and says so.",
            evidence=EvidenceKind.BUSY,
        )  # fmt: skip
    if result.error_mark == "preempted" or (result.preempted and _is_success(what.status)):
        text = f"Preempted: the agent answered {what.status} and gave the message back unfinished."
        return Verdict(Outcome.PREEMPTED, "preempted", text)
    return None


def _by_status(what: Answer) -> Verdict | None:
    """The rows that the status decides alone; None: the body has the word."""
    status = what.status
    if status == 429 or (status == 503 and "retry-after" in what.headers):  # noqa: PLR2004
        text = f"Busy: the agent answered {status}."
        return Verdict(Outcome.BUSY, "come_again", text, evidence=EvidenceKind.BUSY)
    if status in {502, 503, 504} or 520 <= status <= 529:  # noqa: PLR2004
        text = f"Busy: {status} came instead of the agent's answer; it may be down."
        return Verdict(Outcome.BUSY, "unavailable", text, evidence=EvidenceKind.SERVER_ERROR)
    if status in {401, 403, 404, 410}:
        text = f"Failed attempt: the agent answered {status}; its credential or its URL may have changed."
        return Verdict(Outcome.FAILED_ATTEMPT, "not_let_in", text)
    if 300 <= status < 400:  # noqa: PLR2004
        text = f"Failed attempt: the agent answered {status}. Redirects are never followed; register the final URL."
        return Verdict(Outcome.FAILED_ATTEMPT, "redirect", text)
    if not 200 <= status < 500:  # noqa: PLR2004
        return Verdict(Outcome.FAILED_ATTEMPT, "server_error", f"Failed attempt: the agent answered {status}.")
    return None


def _by_error(what: Answer, result: Result) -> Verdict | None:
    """JSON-RPC errors, and what is left of 4xx."""
    code = result.error_code
    of_rpc = code is not None and -32768 <= code <= -32000  # noqa: PLR2004 - what JSON-RPC keeps for itself
    if result.kind is Kind.ERROR and (of_rpc or _is_success(what.status)):
        named = "an error without a code" if code is None else f"JSON-RPC error {code}"
        if code is not None and (code == -32700 or -32602 <= code <= -32600 or -32009 <= code <= -32001):  # noqa: PLR2004
            text = f"Refused: the agent answered {what.status} with {named}. Sending it again would not help."
            return Verdict(Outcome.REFUSED, "rpc_refused", text)
        text = f"Failed attempt: the agent answered {what.status} with {named}."
        return Verdict(Outcome.FAILED_ATTEMPT, "rpc_error", text)
    if not _is_success(what.status):
        text = f"Refused: the agent answered {what.status}. Sending it again would not help."
        return Verdict(Outcome.REFUSED, "client_error", text)
    return None


def _by_result(what: Answer, result: Result, *, streamed: bool) -> Verdict:
    """A 2xx without an error. A 202 is one like any other: only its result says whether the turn is over (A-Q-01)."""
    status = what.status
    if what.fault is Fault.TOO_LARGE:
        text = f"Delivered: the agent answered {status}, but {_WORDS[what.fault]}."
        return Verdict(Outcome.ANSWER_TOO_LARGE, "too_large", text)
    if result.kind is Kind.MESSAGE or result.state in FINAL_STATES:
        named = "a message" if result.kind is Kind.MESSAGE else f"a task that is {result.state}"
        text = f"Delivered: the agent answered {status} with {named}."
        just_now = what.fault in {None, Fault.EOF, Fault.RESET}
        return Verdict(
            Outcome.DELIVERED, str(result.kind), text, evidence=EvidenceKind.ANSWERED if just_now else None
        )  # fmt: skip
    if result.kind in {Kind.TASK, Kind.UPDATE} or streamed:
        return _unfinished(what, result)
    if what.fault is not None:
        text = f"Delivered, answer lost: the agent answered {status}, then {_WORDS[what.fault]}."
        return Verdict(Outcome.ANSWER_LOST, what.fault, text)
    if result.kind is Kind.OTHER:
        return Verdict(Outcome.DELIVERED, "result", f"Delivered: the agent answered {status} with a result.")
    trouble = result.trouble or "it holds neither a result nor an error"
    text = f"Failed attempt: the agent answered {status}, but not in JSON-RPC: {trouble}."
    return Verdict(Outcome.FAILED_ATTEMPT, "not_an_answer", text)


def _unfinished(what: Answer, result: Result) -> Verdict:
    """The agent has the message. Without a task id nobody can follow it, and after a head nothing is sent twice."""
    if result.task_id is not None:
        text = f"Accepted: the agent answered {what.status} and works on it."
        return Verdict(Outcome.ACCEPTED, "unfinished", text)
    ended = "without ending it" if what.fault is None else f"then {_WORDS[what.fault]}"
    text = f"Delivered, answer lost: the agent answered {what.status} and named no task, {ended}; nobody can follow it."
    return Verdict(Outcome.ANSWER_LOST, what.fault or "no_task_id", text)


def _is_success(status: int) -> bool:
    return 200 <= status < 300  # noqa: PLR2004


def _life(fault: Fault | None) -> EvidenceKind | None:
    """A head had come; what says whether it lives now is how the body ended, perhaps hours later."""
    if fault is None or fault in {Fault.TOO_LARGE, Fault.MALFORMED}:
        return EvidenceKind.ANSWERED
    return _SUSPICIONS.get(fault)


_SECONDS = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds until the agent wants to be asked again, 0 … RETRY_AFTER_MAX_S; None: it did not say so readably.

    A date is taken relative to the answer's own Date, so that a wrong clock of the agent does not matter.
    """
    said = headers.get("retry-after", "").strip()
    if not said:
        return None
    if _SECONDS.fullmatch(said):
        return min(float(said), RETRY_AFTER_MAX_S)
    if _DIGITS.fullmatch(said):
        return RETRY_AFTER_MAX_S
    until = _date(said)
    if until is None:
        return None
    seconds = (until - (_date(headers.get("date", "")) or now)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def _date(said: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(said)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
