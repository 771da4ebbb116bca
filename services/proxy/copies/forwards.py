"""One message on its way through this replica, and until when it may be."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from services.proxy.copies.bounds import Bounds
from shared.settings import STOP_HEARD_S, TURN_SLACK_S


@dataclass(slots=True)
class LiveForward:
    """One message on its way through this replica."""

    workspace_id: str
    session_id: str
    """What its agent got as X-Bide-Session, and what beats name it by."""
    key_hash: bytes
    started_at: float
    method: str = ""
    """As its caller wrote it: the dialect in which its agent is asked to cancel it."""
    task_id: str | None = None
    """The agent's own Task for it, once it has named one."""
    stop_reason: str | None = None
    """Why it was told to stop; None: it was not."""
    is_canceled: bool = False
    """Its agent was asked to cancel it, or is being asked."""
    incarnation: int = 0
    """The life of the agent that it went to."""
    hang_up: asyncio.Timeout | None = None
    """Ends it at once."""
    bounds: Bounds | None = None
    """What bounds it; None: nothing."""
    begun: float = field(default_factory=time.monotonic)
    until: float = float("inf")
    """When it is let go, in `time.monotonic()` seconds."""

    def __post_init__(self) -> None:
        if self.bounds is not None:
            self.until = self.begun + self.bounds.longest_s

    def bound(self, bounds: Bounds) -> None:
        """Take over its ceiling as it is now; a lowered one leaves the time in which a session is ended (C-K9)."""
        if bounds == self.bounds:
            return
        self.bounds = bounds
        self.until = max(self.begun + bounds.longest_s, time.monotonic() + bounds.grace_s + TURN_SLACK_S)

    def hear_stop(self, reason: str) -> None:
        """It is said to end, perhaps again.

        While it is being said the longest turn does not count: what ends the session knows better (policies §2).
        """
        self.stop_reason = self.stop_reason or reason
        self.until = max(self.until, time.monotonic() + STOP_HEARD_S)
