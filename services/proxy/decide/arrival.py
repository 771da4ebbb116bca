"""What is known of one message when its route is decided. Moments are seconds since 1970 by this replica's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from services.proxy.decide.head import Head
from services.proxy.decide.verdict import Refuse
from shared.facts import Priority


class InFlight(Enum):
    """Whether the same caller's same key is under way on this replica."""

    NO = "no"
    SAME = "same"
    OTHER_BODY = "other_body"


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
