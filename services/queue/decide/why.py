"""Why an item waits, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.queue.decide.workspace import Closed, Workspace, closed, gate_until, taken
from shared.facts import Priority

_MINUTE_S, _HOUR_S, _SHORT_S = 60, 3600, 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the line knows of an item that waits. Times are seconds since 1970."""

    position: int
    """From 1."""
    priority: Priority = Priority.TASK
    rank_ms: int = 0
    not_before: float | None = None
    """Of the item itself: asked for by its caller, or after a failed attempt."""
    awaits_prompt: bool = False
    """It is a tick, and what its schedule says now has not come yet."""
    attempts: int = 0
    session_began: float | None = None
    """When the longest delivery that runs there began."""


def why(workspace: Workspace, item: Waiting, now: float) -> tuple[str, dict[str, Any]]:
    """Say why an item waits: one sentence, and the same in fields (durations in seconds)."""
    in_use, reason = taken(workspace, now), closed(workspace, now)
    fields: dict[str, Any] = {
        "ahead": item.position - 1,
        "reason": _reason(workspace, item, reason, in_use, now),
        "in_use": in_use,
        "max_concurrent_tasks": workspace.max_concurrent,
    }
    parts = [_words(workspace, item, reason, in_use, now)]
    if reason is None and item.session_began is not None:
        fields["session_running_s"] = round(now - item.session_began, 1)
        fields["session_ceiling_s"] = workspace.ceiling_s or None
        limit = f" of {_span(workspace.ceiling_s)}" if workspace.ceiling_s else ""
        parts[0] += f", its session runs for {_span(now - item.session_began)}{limit}"
    passable_s = item.rank_ms / 1000 - now
    if item.priority is Priority.INFO and passable_s > 0:
        fields["passable_s"] = round(passable_s, 1)
        parts.append(f"in {_span(passable_s)} a newer TASK can no longer overtake it")
    if workspace.waiting_critical and item.priority is not Priority.CRITICAL:
        fields["critical_ahead"] = workspace.waiting_critical
        parts.append(f"CRITICAL goes first ({workspace.waiting_critical} of it here)")
    place = "next in line" if item.position <= 1 else f"{item.position}{_ordinal(item.position)} in line"
    return f"{place}: {'; '.join(parts)}", fields


def _reason(workspace: Workspace, item: Waiting, reason: Closed | None, in_use: int, now: float) -> str:
    if reason is not None:
        return reason.value
    if item.awaits_prompt:
        return "awaits_prompt"
    if item.not_before is not None and item.not_before > now:
        return "not_before"
    return "at_capacity" if in_use >= workspace.max_concurrent else "in_line"


def _words(  # noqa: PLR0911 - a sentence each
    workspace: Workspace, item: Waiting, reason: Closed | None, in_use: int, now: float
) -> str:
    match reason:
        case Closed.REMOVED:
            return "the workspace was removed"
        case Closed.PAUSED:
            since = f" for {_span(now - workspace.paused_at)}" if workspace.paused_at else ""
            return f"the workspace has been paused{since}, and its clocks stand still"
        case Closed.OFFLINE:
            return _DOWN[workspace.status or "offline"]
        case Closed.NO_URL:
            return "its agent has not registered yet"
        case Closed.GATE:
            left_s = (gate_until(workspace, now) or now) - now
            return f"its session is being ended: nothing begins before it is over, or for another {_span(left_s)}"
        case Closed.BUSY:
            return f"its agent said it is busy and is asked again in {_span((workspace.not_before or now) - now)}"
        case None if item.not_before is not None and item.not_before > now:
            if item.awaits_prompt:
                return "it waits for the newest prompt of its schedule, which is on its way"
            said = "after a failed attempt it waits" if item.attempts else "it waits"
            return f"{said} for another {_span(item.not_before - now)}"
        case None:
            return f"its agent is at {in_use}/{workspace.max_concurrent}"


_DOWN = {
    "offline": "its agent is dead and is being started again",
    "restarting": "its agent has been started again and has not been heard yet",
    "gave_up": "its agent has died too often: an operator must look",
}


def _span(seconds: float) -> str:
    """A length of time as people say it: `80 s`, `12 m`, `3 h 20 m`."""
    if seconds < _SHORT_S:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} m"
    hours, rest = divmod(round(seconds / _MINUTE_S), 60)
    return f"{hours} h {rest} m" if rest else f"{hours} h"


def _ordinal(number: int) -> str:
    if 10 <= number % 100 <= 20:  # noqa: PLR2004 - 11th, 12th, 13th
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
