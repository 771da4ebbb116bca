"""What is said about a session, to whom (policies §5)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Reason = Literal["ceiling_near", "tick_waiting", "critical_waiting", "ceiling", "operator"]
StopReason = Literal["ceiling", "operator"]


@dataclass(frozen=True, slots=True)
class Directive:
    """Ask the agent. The same words about the same thing are the same directive, however often they are said."""

    kind: Literal["checkpoint", "stop"]
    reason: Reason
    about: str = ""
    deadline_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Whoever holds the session cancels it."""

    reason: StopReason


@dataclass(frozen=True, slots=True)
class StopToo:
    """So does whoever holds this other one: it dies of the kill, so that it must not be sent again (policies §2)."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Gate:
    """No new session until then; None: this session no longer asks for it."""

    until: datetime | None


@dataclass(frozen=True, slots=True)
class Kill:
    """End its container."""

    order: int
    expires_at: datetime


Say = Directive | Stop | StopToo | Gate | Kill
