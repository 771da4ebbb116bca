"""When a container may be ended for a session's sake: what else would die with it (policies §5, I6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Began:
    """A delivery or a live forward that is in flight."""

    session_id: str
    started_at: datetime
    ceiling_s: float | None = None
    """Its own; None: the workspace's."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The gate is closed: at `at`, this was in flight, and nothing begins before `until`."""

    generation: int
    at: datetime
    until: datetime
    in_flight: tuple[Began, ...] = ()
    foreign: int = 0
    beat_at: datetime | None = None
    cadence_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Flight:
    """What the scheduler knows of a session of the workspace."""

    is_foreign: bool
    is_over: bool
    """Over its own ceiling, or stopped by an operator."""
    has_ceiling: bool = True


class Hold(StrEnum):
    """What an order to kill waits for. The first three last until somebody does something; the others pass."""

    OWN_CEILING = "own_ceiling"
    """Its own was raised after it was stopped."""
    BELOW_CEILING = "below_ceiling"
    """Something else would die with it, below its own ceiling."""
    NO_CEILING = "no_ceiling"
    """Something else would die with it, and has none."""
    GATE = "gate"
    """A fresh word of the gate that stays closed for a while."""
    HEARTBEAT = "heartbeat"
    """The first one from after the grace, or a cadence without any."""
    ENDED = "ended"
    """The gate no longer has it in flight: it is about to be known as ended."""
    FOREIGN = "foreign"
    """Nobody knows yet since when foreign work goes on."""


@dataclass(frozen=True, slots=True)
class Held:
    """Why no kill may be ordered."""

    hold: Hold
    session_id: str | None = None
    """What else would die with it."""


def held_by(
    session_id: str,
    closing: Closing | None,
    flights: Mapping[str, Flight],
    ceiling_s: float,
    now: datetime,
    *,
    noted_at: datetime,
    graced_until: datetime,
    fresh_s: float,
) -> Held | None:
    """Why the container of session `session_id` may not be ended; None: it runs on, and all that dies with it is over.

    `flights` are the open sessions of the workspace as far as they are known, with this one; `ceiling_s` is the
    workspace's, for those that are not. `noted_at`: a session that was thought gone has left the gate, so no word of
    before it was seen again counts. `graced_until`: only a heartbeat from after it shows that the agent goes on (where
    none comes for as long as its cadence, that is no reason to wait).
    """
    return (
        _known_below(session_id, flights)
        or _unsaid(closing, now, noted_at=noted_at, graced_until=graced_until, fresh_s=fresh_s)
        or _else_in_flight(session_id, closing, flights, ceiling_s, now)
    )


def _known_below(session_id: str, flights: Mapping[str, Flight]) -> Held | None:
    if not flights[session_id].is_over:
        return Held(Hold.OWN_CEILING)
    for name, each in sorted(flights.items()):
        if not each.is_over:
            return Held(Hold.BELOW_CEILING if each.has_ceiling else Hold.NO_CEILING, name)
    return None


def _unsaid(
    closing: Closing | None, now: datetime, *, noted_at: datetime, graced_until: datetime, fresh_s: float
) -> Held | None:
    if closing is None or closing.at < max(now - timedelta(seconds=fresh_s), noted_at) or closing.until <= now:
        return Held(Hold.GATE)
    heard = closing.beat_at is not None and closing.beat_at > graced_until
    if not heard and now < graced_until + timedelta(seconds=closing.cadence_s):
        return Held(Hold.HEARTBEAT)
    return None


def _else_in_flight(
    session_id: str, closing: Closing | None, flights: Mapping[str, Flight], ceiling_s: float, now: datetime
) -> Held | None:
    assert closing is not None, "without its word it is held"
    is_foreign = flights[session_id].is_foreign
    if not (closing.foreign if is_foreign else any(each.session_id == session_id for each in closing.in_flight)):
        return Held(Hold.ENDED)
    if closing.foreign and not any(each.is_foreign for each in flights.values()):
        return Held(Hold.FOREIGN)
    for began in closing.in_flight:
        own_s = ceiling_s if began.ceiling_s is None else began.ceiling_s
        if began.session_id not in flights and not (own_s and now >= began.started_at + timedelta(seconds=own_s)):
            return Held(Hold.BELOW_CEILING if own_s else Hold.NO_CEILING, began.session_id)
    return None
