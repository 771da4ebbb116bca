"""The route of a message, before any byte of it goes to the agent: the table of policies §1 as one pure function.

Values in, a verdict out: no clock, no I/O. Moments are seconds since 1970 by this replica's clock. The specification is
`tests/unit/test_proxy_decide.py`; the first row that is true decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal

from shared.facts import Priority

RESERVED_PREFIXES = ("system:", "webhook:", "channel:", "test:")
"""Names of callers that only Bide itself may use (A-P-06)."""
OVERLOAD_RETRY_S = 30
"""Retry-After of a full line where no turn was measured yet: what waits is measured in turns, not in milliseconds."""
OVERLOAD_RETRY_MAX_S = 600
"""Whoever is told to stay away for longer is not told when there is room after all."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """One row of the registry."""

    workspace_id: str
    owner_caller: str
    url: str
    token_hash: bytes
    incarnation: int
    rev: int
    agent_authorization: str | None = None
    agent_card: str | None = None
    runtime: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    max_concurrent: int = 1
    heartbeat_interval_s: float = 30.0
    desired: Literal["running", "stopped"] = "running"
    paused: bool = False
    pause_note: str | None = None
    boot_id: str | None = None
    registered_boot: str | None = None
    """The process that registered last; None: it named no boot id."""
    boots_past: tuple[str, ...] = ()
    booted_at: float | None = None
    removed: bool = False

    @property
    def is_unregistered(self) -> bool:
        """Whether another process beats than the one that registered: the url may lead nowhere (A-L-11)."""
        return self.registered_boot is not None and self.registered_boot != self.boot_id


def said_s(workspace: Workspace, name: str, default_s: float) -> float:
    """A time that a workspace may set itself."""
    said = workspace.settings.get(name)
    return float(said) if said is not None else default_s


class Presence(Enum):
    """What the registry says of the workspace that is called."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    REMOVED = "removed"


class Standing(Enum):
    """What the caller's credentials are worth."""

    GOOD = "good"
    NONE = "none"
    UNKNOWN = "unknown"
    MISMATCH = "mismatch"
    FORGED = "forged"
    UNSURE = "unsure"
    """The token is not in this replica's copy, and Postgres does not answer."""


class InFlight(Enum):
    """Whether the same caller's same key is under way on this replica."""

    NO = "no"
    SAME = "same"
    OTHER_BODY = "other_body"


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


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Head:
    """What is known before the body is read."""

    presence: Presence = Presence.KNOWN
    standing: Standing = Standing.GOOD
    hops: int | None = 0
    """None: the header is no number."""
    hops_max: int = 16
    rate_wait_s: float = 0.0
    """Until this caller may call again; 0: now."""


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Share:
    """Who holds what of the messages that wait."""

    depth: int = 0
    """Last known, and our own keeps since."""
    depth_max: int = 1000
    callers: int = 0
    """Of them by this caller."""
    others: int = 0
    turn_s: float | None = None
    """How long a delivery takes here; None: nobody has measured one."""


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Arrival:
    """Everything that the route of one message depends on."""

    head: Head = field(default_factory=Head)
    fault: Refuse | None = None
    """What reading the body found: too large, not JSON-RPC, a bad value."""
    priority: Priority = Priority.TASK
    may_critical: bool = False
    critical_wait_s: float = 0.0
    """Until this caller's quota of CRITICAL messages has one more; 0: it has, or this message is none."""
    in_flight: InFlight = InFlight.NO
    keyed: bool = False
    repeated: bool = False
    known: bool | None = None
    """Whether its key or id stands for an item of this caller. None: that was not asked yet."""
    key_running: bool = False
    limited_wait: bool = False
    to_itself: bool = False
    queue_first: bool = False
    share: Share = field(default_factory=Share)
    backlog: int = 0
    """Messages that wait, also our own keeps that nobody has yet shown as drained."""
    copied_at: float | None = None
    """When the copy of backlog and gate was true; None: there never was one."""
    copy_stale_s: float = 20.0
    paused: bool = False
    status: str | None = None
    """The last word of liveness, if it has spoken."""
    gate_closed: bool = False
    has_url: bool = True
    not_before: float | None = None
    in_use: int = 0
    in_use_max: int = 1
    now: float = 0.0


def admit(head: Head) -> Refuse | None:
    """Say why the call is refused whatever its body holds; None: read the body."""
    match head.presence:
        case Presence.UNKNOWN:
            return Refuse(404, "workspace_unknown", "There is no such workspace. Check the id, or register it.", -32001)
        case Presence.REMOVED:
            return Refuse(410, "workspace_removed", "The workspace was removed. Take its address off your list.")
        case Presence.KNOWN:
            return refuse_standing(head.standing) or _refuse_hops(head) or _refuse_rate(head)


def refuse_standing(standing: Standing) -> Refuse | None:
    """Say why these credentials do not let the caller in; None: they do."""
    match standing:
        case Standing.GOOD:
            return None
        case Standing.NONE:
            return Refuse(401, "token_missing", "Send your token: Authorization: Bearer <token>.")
        case Standing.UNKNOWN:
            return Refuse(401, "token_unknown", "Nobody has this token. Use the one that register returned.")
        case Standing.MISMATCH:
            sentence = (
                "X-Workspace-ID names somebody else than the token does. Send the token's own id, or leave it out."
            )
            return Refuse(403, "caller_mismatch", sentence)
        case Standing.FORGED:
            names = ", ".join(RESERVED_PREFIXES)
            return Refuse(403, "caller_reserved", f"Names that begin with {names} are Bide's own. Use another name.")
        case Standing.UNSURE:
            sentence = "The token cannot be checked now: the registry does not answer. Send the request again."
            return Refuse(503, "token_unchecked", sentence, retry_after_s=1)


def _refuse_hops(head: Head) -> Refuse | None:
    if head.hops is None:
        return Refuse(400, "hops_unreadable", "X-Bide-Hops is a number. Pass on what you got, plus one.", -32600)
    if head.hops > head.hops_max:
        sentence = f"The message has passed more than {head.hops_max} hops. Look for agents that call in a circle."
        return Refuse(508, "too_many_hops", sentence)
    return None


def _refuse_rate(head: Head) -> Refuse | None:
    if head.rate_wait_s <= 0:
        return None
    sentence = "You call more often than this proxy takes from one caller. Send it again after Retry-After seconds."
    return Refuse(429, "rate_limited", sentence, retry_after_s=whole_s(head.rate_wait_s))


def whole_s(wait_s: float) -> int:
    """A Retry-After that is true: never before the moment, and never 0."""
    return max(1, math.ceil(wait_s))


def route(arrival: Arrival) -> Verdict | Ask:
    """Say what becomes of a message: the first row of §1 that is true."""
    return (
        admit(arrival.head)
        or arrival.fault
        or _refuse_priority(arrival)
        or _join(arrival)
        or _keep_known(arrival)
        or _ask_or_refuse(arrival)
        or _keep_by_wish(arrival)
        or _keep_by_state(arrival)
        or Forward(stale_copy=is_stale(arrival.copied_at, arrival.now, arrival.copy_stale_s))
    )


def _refuse_priority(arrival: Arrival) -> Refuse | None:
    if arrival.priority is Priority.CRITICAL and not arrival.may_critical:
        sentence = "CRITICAL needs the right of that name. Ask an operator for it, or send the message as TASK."
        return Refuse(403, "priority_not_allowed", sentence)
    return None


def _join(arrival: Arrival) -> Verdict | None:
    match arrival.in_flight:
        case InFlight.NO:
            return None
        case InFlight.SAME:
            return Attach()
        case InFlight.OTHER_BODY:
            sentence = "Another body is under way with this key. Use a new messageId, or send the same body."
            return Refuse(409, "key_in_flight", sentence, -32600)


def _keep_known(arrival: Arrival) -> Keep | None:
    """Rows of a message that is an item, or is running, already: it takes no new place."""
    if arrival.known:
        return _keep_named(arrival)
    return Keep(Reason.RUNNING) if arrival.key_running else None


def _keep_named(arrival: Arrival) -> Keep | None:
    if arrival.keyed:
        return Keep(Reason.KEYED)
    return Keep(Reason.REPEATED) if arrival.repeated else None


def _ask_or_refuse(arrival: Arrival) -> Refuse | Ask | None:
    """Whoever brings an id or a key that stands for nothing takes a new place, like everybody."""
    refuse = _refuse_depth(arrival) or _refuse_quota(arrival)
    if refuse is not None and arrival.known is None and (arrival.keyed or arrival.repeated):
        return Ask()
    return refuse


def _refuse_depth(arrival: Arrival) -> Refuse | None:
    share = arrival.share
    if share.depth >= share.depth_max:
        sentence = (
            f"{share.depth} messages wait for this workspace, and it takes {share.depth_max}. Send it again later."
        )
        return Refuse(429, "queue_full", sentence, retry_after_s=place_frees_in_s(share.turn_s, arrival.in_use_max))
    if share.others and share.depth > share.depth_max / 2 and share.callers > share.depth_max / 2:
        sentence = "More than half of what may wait here is yours, and others wait too. Send it again later."
        retry_after_s = place_frees_in_s(share.turn_s, arrival.in_use_max)
        return Refuse(429, "share_exceeded", sentence, retry_after_s=retry_after_s)
    return None


def place_frees_in_s(turn_s: float | None, max_concurrent: int) -> int:
    """Say after how many seconds a place in a full line frees: turns run beside each other, and each end frees one."""
    if turn_s is None:
        return OVERLOAD_RETRY_S
    return whole_s(min(turn_s / max_concurrent, OVERLOAD_RETRY_MAX_S))


def _refuse_quota(arrival: Arrival) -> Refuse | None:
    if arrival.critical_wait_s <= 0:
        return None
    sentence = (
        "You have sent all CRITICAL messages of this minute. Send it as TASK, or again after Retry-After seconds."
    )
    return Refuse(429, "critical_quota", sentence, retry_after_s=whole_s(arrival.critical_wait_s))


def takes_place(arrival: Arrival, verdict: Verdict) -> bool:
    """Whether it is one more message for the agent: it joined nothing, and is no item and nothing that runs already."""
    return isinstance(verdict, (Keep, Forward)) and not arrival.known and not arrival.key_running


def _keep_by_wish(arrival: Arrival) -> Keep | None:
    """Rows that the caller or the workspace's settings ask for. Behind the depth: they take a place like any other."""
    named = _keep_named(arrival)
    if named is not None:
        return named
    if arrival.limited_wait:
        return Keep(Reason.LIMITED_WAIT)
    if arrival.to_itself:
        return Keep(Reason.SELF)
    return Keep(Reason.QUEUE_FIRST) if arrival.queue_first else None


DOWN = frozenset({"offline", "restarting", "gave_up"})
"""Words of liveness for a life that is over."""
_HELD: Mapping[str | None, Reason] = {
    "paused": Reason.PAUSED,
    "offline": Reason.OFFLINE,
    "restarting": Reason.RESTARTING,
    "gave_up": Reason.GAVE_UP,
}


def _keep_by_state(arrival: Arrival) -> Keep | None:
    reason = _why_held(arrival)
    return Keep(reason) if reason is not None else None


def _why_held(arrival: Arrival) -> Reason | None:  # noqa: PLR0911 - one for each row of the table, in its order
    if arrival.backlog > 0:
        return Reason.BACKLOG
    if arrival.copied_at is None:
        return Reason.NO_COPY
    if arrival.paused:
        return Reason.PAUSED
    if arrival.status in _HELD:
        return _HELD[arrival.status]
    if arrival.gate_closed:
        return Reason.GATE_CLOSED
    if not arrival.has_url:
        return Reason.NO_URL
    if arrival.not_before is not None and arrival.not_before > arrival.now:
        return Reason.NOT_BEFORE
    return Reason.AT_CAPACITY if arrival.in_use >= arrival.in_use_max else None


def is_outlived(*, life: int, incarnation: int, dead_incarnation: int, dead_age_s: float, grace_s: float) -> bool:
    """Whether nothing can come any more of a forward to this life: it was declared dead, and its grace is over.

    At once where another life has been heard: nobody has to wait for the old one then.
    """
    return life <= dead_incarnation and (incarnation > life or dead_age_s >= grace_s)


def is_stale(copied_at: float | None, now: float, copy_stale_s: float) -> bool:
    """Whether a copy of the backlog is so old that it no longer holds anything back; where there is none, no."""
    return copied_at is not None and now - copied_at > copy_stale_s
