"""What a driver saw of an agent: an enum, never a boolean and an error. An error says nothing about death (A-L-01)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Seen(StrEnum):
    """Only STOPPED and NOT_FOUND speak of death."""

    RUNNING = "running"
    STOPPED = "stopped"
    NOT_FOUND = "not_found"
    TRANSITION = "transition"
    """Created, restarting, paused or being removed: somebody is at it."""
    UNKNOWN = "unknown"
    """The engine did not answer, or not readably."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at one agent, through its driver."""

    seen: Seen
    container_id: str | None = None
    """What was seen; another life of the agent is another id."""
    started_at: datetime | None = None
    why: str = ""
    """For people: what the engine said."""

    @property
    def speaks_of_death(self) -> bool:
        return self.seen in {Seen.STOPPED, Seen.NOT_FOUND}
