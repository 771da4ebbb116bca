"""What becomes of a message: it is refused, joins its twin, is kept for a reason, or goes to its agent."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a message is kept; the word is the same in the item, the metric and the log."""

    KEYED = "keyed"
    REPEATED = "repeated"
    RUNNING = "running"
    LIMITED_WAIT = "limited_wait"
    SELF = "self"
    QUEUE_FIRST = "queue_first"
    BACKLOG = "backlog"
    NO_COPY = "no_copy"
    PAUSED = "paused"
    OFFLINE = "offline"
    RESTARTING = "restarting"
    GAVE_UP = "gave_up"
    GATE_CLOSED = "gate_closed"
    NO_URL = "no_url"
    NOT_BEFORE = "not_before"
    AT_CAPACITY = "at_capacity"
    BUSY = "busy"
    NOT_DELIVERED = "not_delivered"
    PREEMPTED = "preempted"


@dataclass(frozen=True, slots=True)
class Refuse:
    """The answer is an error. `rpc_code` is the JSON-RPC code where one is answered.

    `is_reply`: A2A's own answer to a call about a task, such as "no such task", and no trouble of ours. It goes out
    with HTTP 200: the official clients throw away unread what comes with any other status.
    """

    status: int
    code: str
    sentence: str
    rpc_code: int = -32603
    retry_after_s: int | None = None
    is_reply: bool = False


@dataclass(frozen=True, slots=True)
class Attach:
    """Wait for the answer of the call that is under way."""


@dataclass(frozen=True, slots=True)
class Keep:
    reason: Reason


@dataclass(frozen=True, slots=True)
class Forward:
    """`stale_copy`: order and gate hold only as far as this proxy knows."""

    stale_copy: bool = False


Verdict = Refuse | Attach | Keep | Forward


@dataclass(frozen=True, slots=True)
class Ask:
    """The depth would refuse it, but its key or id may stand for an item that has its place: the queue can tell."""
