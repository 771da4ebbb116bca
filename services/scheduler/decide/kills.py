"""When a container may be ended for a session's sake: what else would die with it (policies §5, I6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta


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


def may_kill(
    session_id: str,
    closing: Closing,
    flights: Mapping[str, Flight],
    ceiling_s: float,
    now: datetime,
    *,
    noted_at: datetime,
    graced_until: datetime,
    fresh_s: float,
) -> bool:
    """Whether the session `session_id` runs on, and whatever dies with it is over its own ceiling as well.

    `flights` are the open sessions of the workspace as far as they are known, with this one; `ceiling_s` is the
    workspace's, for those that are not. `noted_at`: a session that was thought gone has left the gate, so no word of
    before it was seen again counts. `graced_until`: only a heartbeat from after it shows that the agent goes on (where
    none comes for as long as its cadence, that is no reason to wait).
    """
    fresh = timedelta(seconds=fresh_s)
    if closing.at < max(now - fresh, noted_at) or closing.until <= now:
        return False
    heard = closing.beat_at is not None and closing.beat_at > graced_until
    if not heard and now < graced_until + timedelta(seconds=closing.cadence_s):
        return False
    own = flights[session_id]
    if not (closing.foreign if own.is_foreign else any(each.session_id == session_id for each in closing.in_flight)):
        return False
    if closing.foreign and not any(each.is_foreign for each in flights.values()):
        return False  # nobody knows yet since when that goes on
    known_over = all(each.is_over for each in flights.values())
    return known_over and all(_is_over(each, flights, ceiling_s, now) for each in closing.in_flight)


def _is_over(began: Began, flights: Mapping[str, Flight], ceiling_s: float, now: datetime) -> bool:
    known = flights.get(began.session_id)
    if known is not None:
        return known.is_over
    own_s = ceiling_s if began.ceiling_s is None else began.ceiling_s
    return own_s > 0 and now >= began.started_at + timedelta(seconds=own_s)
