"""The table of policies §1 as one pure function: the first row that is true decides."""

from __future__ import annotations

from collections.abc import Mapping

from services.proxy.decide.arrival import Arrival, InFlight
from services.proxy.decide.head import admit
from services.proxy.decide.place import ask_or_refuse
from services.proxy.decide.verdict import Ask, Attach, Forward, Keep, Reason, Refuse, Verdict
from shared.facts import Priority

_HELD: Mapping[str | None, Reason] = {
    "paused": Reason.PAUSED,
    "offline": Reason.OFFLINE,
    "restarting": Reason.RESTARTING,
    "gave_up": Reason.GAVE_UP,
}


def route(arrival: Arrival) -> Verdict | Ask:
    """Say what becomes of a message: the first row of §1 that is true."""
    return (
        admit(arrival.head)
        or arrival.fault
        or _refuse_priority(arrival)
        or _join(arrival)
        or _keep_known(arrival)
        or ask_or_refuse(arrival)
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


def is_stale(copied_at: float | None, now: float, copy_stale_s: float) -> bool:
    """Whether a copy of the backlog is so old that it no longer holds anything back; where there is none, no."""
    return copied_at is not None and now - copied_at > copy_stale_s
