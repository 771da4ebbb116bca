"""How a session comes to its end: the state machine of policies §5.

A session is a delivery, a live forward, or a stretch of activity that neither explains (foreign). Nothing here ends it:
only its owner's word, a kill that was carried out, or another life of the agent does. What is decided is what to say to
whom, and when to look again. Deadlines are moments that are written once; who comes late keeps them or gives more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal
from uuid import UUID

from services.scheduler.decide.kills import Closing, Flight, Held, held_by
from services.scheduler.decide.says import Directive, Gate, Kill, Reason, Say, Stop, StopReason, StopToo

NEAR = 0.75
"""The part of its ceiling after which a session is told that it nears."""
LEAD_S = 0.5
"""How much earlier than the agent its holder hears of a stop: the one writes it down, the other may answer at once."""


class State(StrEnum):
    RUNNING = "running"
    CHECKPOINT_SENT = "checkpoint_sent"
    STOP_SENT = "stop_sent"
    KILL_ORDERED = "kill_ordered"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a workspace allows its sessions, in seconds (5-policies, ws)."""

    ceiling_s: float = 1800.0
    """0: none."""
    checkpoint_grace_s: float = 120.0
    stop_grace_s: float = 30.0
    session_min_s: float = 600.0
    tick_preempts: Literal["ticks", "all", "none"] = "ticks"
    """Which sessions a waiting tick asks to make room: those that a tick began and foreign ones, all, or none."""
    tick_preempt_after_s: float = 900.0
    critical_preempt_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How often what has no answer yet is said again, in seconds."""

    repeat_s: float = 10.0
    gate_s: float = 120.0
    """How long the gate stays closed when nobody says so again."""
    gate_repeat_s: float = 5.0
    late_repeat_s: float = 1.0
    """The same where a kill waits for a fresh word of the gate."""
    fresh_s: float = 10.0
    """How old a word of the gate may be that licenses a kill."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A checkpoint that was asked for; once for each thing that it is `about`."""

    reason: Reason
    about: str
    deadline_at: datetime
    said_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session's row."""

    session_id: str
    workspace_id: str
    kind: Literal["delivery", "forward", "foreign"]
    incarnation: int
    started_at: datetime
    schedule_id: UUID | None = None
    """The schedule whose tick began it."""
    ceiling_s: float | None = None
    """Its own; None: the workspace's."""
    state: State = State.RUNNING
    deadline_at: datetime | None = None
    """Of the state: when the checkpoint is over, when the stop is, when the order to kill is."""
    stop_reason: StopReason | None = None
    said_at: datetime | None = None
    gate_said_at: datetime | None = None
    asks: tuple[Ask, ...] = ()
    closing: Closing | None = None
    """The gate's last word."""
    orders: int = 0
    """Orders to kill, so far."""
    unenforceable: bool = False
    """Nobody can end its container."""
    noted_at: datetime
    """When the snapshot was true that it was first, or again, seen in."""
    rev: int = 1
    ended_at: datetime | None = None
    """Its state is then the one that it ended in."""


@dataclass(frozen=True, slots=True)
class Step:
    """The session as it is from now on, what is said, and when to look again."""

    session: Session
    says: tuple[Say, ...]
    due_at: datetime | None


# ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────────────


def step(
    session: Session, rules: Rules, now: datetime, *, siblings: Sequence[Session] = (), pace: Pace = Pace()
) -> Step:
    """Take the steps that are due.

    `siblings`: the other open sessions of its workspace. A step that is taken late gives the grace that follows whole.
    """
    match session.state:
        case State.RUNNING:
            return _running(session, rules, now, pace)
        case State.CHECKPOINT_SENT:
            return _checkpoint_sent(session, rules, now, pace)
        case State.STOP_SENT:
            return _stop_sent(session, rules, now, siblings, pace)
        case State.KILL_ORDERED:
            return _kill_ordered(session, rules, now, siblings, pace)


def ceiling_at(session: Session, rules: Rules) -> datetime | None:
    """When it reaches its ceiling; None: it has none."""
    ceiling_s = rules.ceiling_s if session.ceiling_s is None else session.ceiling_s
    return session.started_at + timedelta(seconds=ceiling_s) if ceiling_s else None


def is_over(session: Session, rules: Rules, now: datetime) -> bool:
    """Whether it may be ended for its own sake: it is over its ceiling, or an operator stopped it."""
    ends_at = ceiling_at(session, rules)
    return session.stop_reason == "operator" or (ends_at is not None and now >= ends_at)


def stop(session: Session, rules: Rules, now: datetime, reason: StopReason, pace: Pace = Pace()) -> Step:
    """Ask for its end, and that nothing begins there meanwhile.

    One that was stopped already keeps its grace; an operator's word holds whatever becomes of its ceiling.
    """
    if session.state in {State.STOP_SENT, State.KILL_ORDERED}:
        held = replace(session, stop_reason=reason, said_at=now)
        later = held.deadline_at if held.deadline_at is not None and held.deadline_at > now else None
        return Step(held, (Stop(reason), Directive("stop", reason)), _soonest(later, *_repeats(held, now, pace)))
    stopped = replace(
        session,
        state=State.STOP_SENT,
        stop_reason=reason,
        deadline_at=now + timedelta(seconds=rules.stop_grace_s),
        # The agent itself is told a moment later, and its holder once more: what it answers then is known as stopped.
        said_at=now - timedelta(seconds=pace.repeat_s - LEAD_S),
        gate_said_at=now,
    )
    says = (Stop(reason), Gate(now + timedelta(seconds=pace.gate_s)))
    return Step(stopped, says, _soonest(stopped.deadline_at, *_repeats(stopped, now, pace)))


def ask_by_hand(session: Session, rules: Rules, now: datetime, about: str, pace: Pace = Pace()) -> Step:
    """An operator asks it to save and end its turn; nothing follows from that."""
    grace = timedelta(seconds=rules.checkpoint_grace_s)
    asked = replace(session, asks=(*session.asks, Ask("operator", about, now + grace, now)))
    taken = step(asked, rules, now, pace=pace)
    return replace(taken, says=(Directive("checkpoint", "operator", about, now + grace), *taken.says))


def kill_refused(session: Session) -> Session:
    """Nobody can end its container: it is told so, and its gate stays closed while it runs.

    The word may come after the order's time, when the session is back at its stop; of one that was not even stopped it
    says nothing.
    """
    if session.state not in {State.STOP_SENT, State.KILL_ORDERED}:
        return session
    return replace(session, state=State.KILL_ORDERED, unenforceable=True, deadline_at=None)


def has_order(session: Session, now: datetime) -> bool:
    """Whether an order to kill may still be carried out: whatever runs there by then would die of it."""
    return session.state is State.KILL_ORDERED and session.deadline_at is not None and now < session.deadline_at


def revised(session: Session) -> Session:
    """The next revision of its row."""
    return replace(session, rev=session.rev + 1)


def next_step(session: Session, rules: Rules) -> tuple[str, datetime | None] | None:
    """What comes next if it goes on, and when at the earliest; None: nothing."""
    match session.state:
        case State.RUNNING:
            ends_at = ceiling_at(session, rules)
            return None if ends_at is None else ("checkpoint", ends_at)
        case State.CHECKPOINT_SENT:
            return "stop", session.deadline_at
        case State.STOP_SENT:
            return "kill", session.deadline_at
        case State.KILL_ORDERED if not session.unenforceable:
            return "kill", session.deadline_at
        case _:
            return None


def _running(session: Session, rules: Rules, now: datetime, pace: Pace) -> Step:
    ends_at = ceiling_at(session, rules)
    if ends_at is not None and now >= ends_at:
        deadline_at = now + timedelta(seconds=rules.checkpoint_grace_s)
        asked = replace(session, state=State.CHECKPOINT_SENT, deadline_at=deadline_at, said_at=now)
        return Step(asked, (_at_ceiling(deadline_at),), _soonest(deadline_at, now + timedelta(seconds=pace.repeat_s)))
    near_at = None
    if ends_at is not None:
        near_at = session.started_at + NEAR * (ends_at - session.started_at)
        if now >= near_at and not any(
            (ask.reason, ask.deadline_at) == ("ceiling_near", ends_at) for ask in session.asks
        ):
            near = Ask("ceiling_near", ends_at.isoformat(), ends_at, now - timedelta(seconds=pace.repeat_s))
            session = replace(session, asks=(*session.asks, near))
    asks, says = _ask_again(session.asks, ends_at, now, pace)
    again_at = [ask.said_at + timedelta(seconds=pace.repeat_s) for ask in asks if _stands(ask, ends_at, now)]
    waits = [moment for moment in (near_at, ends_at) if moment is not None and moment > now]
    return Step(replace(session, asks=asks), says, _soonest(*again_at, *waits))


def _at_ceiling(deadline_at: datetime) -> Directive:
    """Each ceiling that it reaches is another question: a raised one may be reached again."""
    return Directive("checkpoint", "ceiling", deadline_at.isoformat(), deadline_at)


def _stands(ask: Ask, ends_at: datetime | None, now: datetime) -> bool:
    """Whether it is still asked for: it is not past, and the ceiling that it speaks of is the session's."""
    return ask.deadline_at > now and (ask.reason != "ceiling_near" or ask.deadline_at == ends_at)


def _ask_again(
    asks: Sequence[Ask], ends_at: datetime | None, now: datetime, pace: Pace
) -> tuple[tuple[Ask, ...], tuple[Directive, ...]]:
    """Say again what stands; all asks stay, for none is made twice."""
    repeat = timedelta(seconds=pace.repeat_s)
    due = {ask for ask in asks if _stands(ask, ends_at, now) and now >= ask.said_at + repeat}
    says = tuple(Directive("checkpoint", ask.reason, ask.about, ask.deadline_at) for ask in asks if ask in due)
    return tuple(replace(ask, said_at=now) if ask in due else ask for ask in asks), says


def _checkpoint_sent(session: Session, rules: Rules, now: datetime, pace: Pace) -> Step:
    if not is_over(session, rules, now):  # its ceiling was raised: it goes on
        return _running(replace(session, state=State.RUNNING, deadline_at=None), rules, now, pace)
    assert session.deadline_at is not None, "the state has one"
    if now >= session.deadline_at:
        return stop(session, rules, now, "ceiling", pace)
    says: tuple[Say, ...] = ()
    if session.said_at is None or now >= session.said_at + timedelta(seconds=pace.repeat_s):
        says = (_at_ceiling(session.deadline_at),)
        session = replace(session, said_at=now)
    assert session.said_at is not None, "it was said, or is now"
    return Step(session, says, _soonest(session.deadline_at, session.said_at + timedelta(seconds=pace.repeat_s)))


def _stop_sent(session: Session, rules: Rules, now: datetime, siblings: Sequence[Session], pace: Pace) -> Step:
    deadline_at = session.deadline_at
    assert deadline_at is not None, "the state has one"
    if now < deadline_at:
        return _say_stop_again(session, now, pace)
    if kill_held(session, rules, now, siblings=siblings, pace=pace) is not None:
        return _say_stop_again(session, now, pace)
    closing = session.closing
    assert closing is not None, "nothing is killed without its word"
    ordered = replace(session, state=State.KILL_ORDERED, deadline_at=closing.until, orders=session.orders + 1)
    again = _say_stop_again(ordered, now, pace)
    others = _not_stopped(session, closing, siblings)
    return replace(again, says=(*again.says, *map(StopToo, others), Kill(ordered.orders, closing.until)))


def _not_stopped(session: Session, closing: Closing, siblings: Sequence[Session]) -> list[str]:
    """What else is in flight and dies of the kill, over its ceiling but not yet told to stop."""
    stopped = {each.session_id for each in (session, *siblings) if each.stop_reason is not None}
    return sorted({each.session_id for each in closing.in_flight} - stopped)


def _kill_ordered(session: Session, rules: Rules, now: datetime, siblings: Sequence[Session], pace: Pace) -> Step:
    if session.deadline_at is not None and now >= session.deadline_at:  # nobody answered, and the order is void
        return _stop_sent(replace(session, state=State.STOP_SENT, deadline_at=now), rules, now, siblings, pace)
    return _say_stop_again(session, now, pace)


def kill_held(
    session: Session, rules: Rules, now: datetime, *, siblings: Sequence[Session] = (), pace: Pace = Pace()
) -> Held | None:
    """Why no kill is ordered though its stop is over; None: one may be, or it is not as far as that."""
    deadline_at = session.deadline_at
    if session.state is not State.STOP_SENT or deadline_at is None or now < deadline_at:
        return None
    return held_by(
        session.session_id, session.closing, _flights(session, siblings, rules, now), rules.ceiling_s, now,
        noted_at=session.noted_at, graced_until=deadline_at, fresh_s=pace.fresh_s,
    )  # fmt: skip


def _flights(session: Session, siblings: Sequence[Session], rules: Rules, now: datetime) -> dict[str, Flight]:
    return {
        each.session_id: Flight(
            is_foreign=each.kind == "foreign",
            is_over=is_over(each, rules, now),
            has_ceiling=ceiling_at(each, rules) is not None,
        )
        for each in (session, *siblings)
    }


def _say_stop_again(session: Session, now: datetime, pace: Pace) -> Step:
    assert session.stop_reason is not None, "it was stopped for a reason"
    says: list[Say] = []
    stop_at, gate_at = _repeats(session, now, pace)
    if now >= stop_at:
        says += [Stop(session.stop_reason), Directive("stop", session.stop_reason)]
        session = replace(session, said_at=now)
    if now >= gate_at:
        says.append(Gate(now + timedelta(seconds=pace.gate_s)))
        session = replace(session, gate_said_at=now)
    later = session.deadline_at if session.deadline_at is not None and session.deadline_at > now else None
    return Step(session, tuple(says), _soonest(later, *_repeats(session, now, pace)))


def _repeats(session: Session, now: datetime, pace: Pace) -> tuple[datetime, datetime]:
    """When the stop and when the gate are to be said again."""
    said_at, gate_said_at, deadline_at = session.said_at or now, session.gate_said_at or now, session.deadline_at
    # The kill waits for a word of the gate from after the grace.
    is_late = session.state is State.STOP_SENT and deadline_at is not None and now >= deadline_at
    gate_s = pace.late_repeat_s if is_late else pace.gate_repeat_s
    return said_at + timedelta(seconds=pace.repeat_s), gate_said_at + timedelta(seconds=gate_s)


def _soonest(*moments: datetime | None) -> datetime | None:
    return min((moment for moment in moments if moment is not None), default=None)
