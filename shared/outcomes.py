"""The words for how talking to an agent went: what was seen on the wire, and what policies §2 makes of it.

Seen: `Answer` or `NoAnswer`, with a `Fault`. Made of it by `shared/replies.py`: a `Verdict` with one `Outcome`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shared.facts import EvidenceKind


class Outcome(StrEnum):
    """The classes of §2."""

    DELIVERED = "delivered"
    ACCEPTED = "accepted"
    BUSY = "busy"
    NOT_DELIVERED = "not_delivered"
    PREEMPTED = "preempted"
    FAILED_ATTEMPT = "failed_attempt"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    ANSWER_LOST = "answer_lost"
    ANSWER_TOO_LARGE = "answer_too_large"


class Fault(StrEnum):
    """What broke an exchange, wherever it stood."""

    ADDRESS_REFUSED = "address_refused"
    REQUEST_REFUSED = "request_refused"
    NO_CONNECTION = "no_connection"
    DNS = "dns"
    CONNECTION_REFUSED = "connection_refused"
    UNREACHABLE = "unreachable"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    EOF = "eof"
    RESET = "reset"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    HUNG_UP = "hung_up"


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Answer:
    """A head came. `body` is None where it did not come whole (`fault` says why) or was a stream."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes | None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """No head came. `sent`: whether a byte of the request may have left."""

    sent: bool
    fault: Fault


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Verdict:
    """What the outcome means, and what to tell whom."""

    outcome: Outcome
    reason: str
    """One word of a small set: for logs, metrics and the row."""
    text: str
    """A sentence for people; whoever shows it adds which agent."""
    status: int | None = None
    evidence: EvidenceKind | None = None
    """None: it says nothing about the agent's life (the fault was ours)."""
    retry_after_s: float | None = None
    agent_task_id: str | None = None
    context_id: str | None = None
    task_state: str | None = None
