"""Who is asked to make room before its ceiling: for a tick that waits, and for CRITICAL (policies §5).

These are requests: nothing follows from them. Each is made once for each thing that waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.scheduler.decide.says import Directive, Reason
from services.scheduler.decide.sessions import Ask, Rules, Session, State

ASKS_MAX = 100
"""Early requests to one session; who did not hear a hundred will not hear the next."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A tick that waits: which, since when, and how often its schedule fires."""

    about: str
    fire_at: datetime
    period_s: float | None
    """None: it fires only once."""


def early(
    session: Session,
    rules: Rules,
    now: datetime,
    *,
    ticks: Sequence[Waiting] = (),
    critical_since: datetime | None = None,
) -> tuple[Session, tuple[Directive, ...]]:
    """The requests that are due, and the session that has been asked."""
    if session.state is not State.RUNNING or len(session.asks) >= ASKS_MAX:
        return session, ()
    age = now - session.started_at
    wanted: list[tuple[Reason, str]] = []
    if critical_since is not None and age >= timedelta(seconds=rules.critical_preempt_after_s):
        wanted.append(("critical_waiting", critical_since.isoformat()))
    if yields_to_ticks(session, rules, now):
        wanted += [("tick_waiting", tick.about) for tick in ticks if _waits_long(tick, rules, now)]
    known = {(ask.reason, ask.about) for ask in session.asks}
    deadline_at = now + timedelta(seconds=rules.checkpoint_grace_s)
    new = [each for each in wanted if each not in known][: ASKS_MAX - len(session.asks)]
    asks = tuple(Ask(reason, about, deadline_at, now) for reason, about in new)
    says = tuple(Directive("checkpoint", ask.reason, ask.about, deadline_at) for ask in asks)
    return (replace(session, asks=(*session.asks, *asks)), says) if asks else (session, ())


def yields_to_ticks(session: Session, rules: Rules, now: datetime) -> bool:
    """Whether a tick that waits may ask it: of others nobody need know what waits."""
    if session.state is not State.RUNNING or len(session.asks) >= ASKS_MAX:
        return False
    if now - session.started_at < timedelta(seconds=rules.session_min_s):
        return False
    match rules.tick_preempts:
        case "all":
            return True
        case "ticks":
            return session.kind == "foreign" or session.schedule_id is not None
        case "none":
            return False


def _waits_long(tick: Waiting, rules: Rules, now: datetime) -> bool:
    period_s = rules.tick_preempt_after_s if tick.period_s is None else tick.period_s
    return now - tick.fire_at >= timedelta(seconds=min(period_s, rules.tick_preempt_after_s))
