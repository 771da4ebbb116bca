"""Sessions as they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from services.scheduler import decide
from services.scheduler.decide import Held, Hold, Pace, Rules, Session, State
from services.scheduler.shapes import iso

_MINUTE_S, _HOUR_S, _SHORT_S = 60, 3600, 90
_HELD = {
    Hold.OWN_CEILING: "its ceiling was raised after it was stopped: an operator's stop ends it",
    Hold.BELOW_CEILING: "the kill waits for {} below its ceiling",
    Hold.NO_CEILING: "the kill waits for {}, which has no ceiling",
    Hold.GATE: "the kill waits for the gate's word of what else is in flight",
    Hold.HEARTBEAT: "the kill waits for a heartbeat from after the grace",
    Hold.ENDED: "nothing of it is in flight any more",
    Hold.FOREIGN: "the kill waits until it is known since when the agent's other work goes on",
}


def shown(
    session: Session,
    rules: Rules,
    now: datetime,
    *,
    among: Sequence[Session],
    pace: Pace,
    bounces: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The session of the HTTP face, `among` the open ones of its workspace; `bounces`: its schedules that bounce."""
    siblings = [each for each in among if each.session_id != session.session_id]
    held = decide.kill_held(session, rules, now, siblings=siblings, pace=pace)
    ceiling_s = rules.ceiling_s if session.ceiling_s is None else session.ceiling_s
    following = decide.next_step(session, rules)
    return {
        "session_id": session.session_id,
        "kind": session.kind,
        "started_at": iso(session.started_at),
        "running_s": round(max(0.0, (now - session.started_at).total_seconds()), 3),
        "ceiling_s": ceiling_s,
        "state": session.state.value,
        "stop_reason": session.stop_reason,
        "next_step": following[0] if following else None,
        "next_step_at": iso(following[1]) if following else None,
        "schedule_id": str(session.schedule_id) if session.schedule_id else None,
        "summary": _summary(session, ceiling_s, following, held, now=now, bounces=bounces),
    }


def _summary(
    session: Session,
    ceiling_s: float,
    following: tuple[str, datetime | None] | None,
    held: Held | None,
    *,
    now: datetime,
    bounces: Sequence[Mapping[str, Any]],
) -> str:
    """One sentence for each thing that somebody who looks would ask."""
    said = [f"running for {span((now - session.started_at).total_seconds())} in one session"]
    said[0] += f" (ceiling {span(ceiling_s)})" if ceiling_s else " (no ceiling)"
    if session.unenforceable:
        said.append("it is over its ceiling, and nobody can end its container")
    elif session.state is not State.RUNNING:
        said.append(
            {
                State.CHECKPOINT_SENT: "it was asked to save and end its turn",
                State.STOP_SENT: "it was told to stop, and nothing else begins meanwhile",
                State.KILL_ORDERED: "its container is being ended",
            }[session.state]
        )
    if held is not None:
        said.append(_HELD[held.hold].format(held.session_id))
    elif following is not None and following[1] is not None:
        left_s = (following[1] - now).total_seconds()
        said.append(f"{following[0]} {'follows' if left_s <= 0 else f'in {span(left_s)}'}")
    said += [f"schedule {each['name']} has bounced {each['bounces']} times" for each in bounces if each["bounces"]]
    return "; ".join(said)


def span(seconds: float) -> str:
    """A length of time as people say it: `80 s`, `12 m`, `3 h 20 m`."""
    if seconds < _SHORT_S:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} m"
    hours, rest = divmod(round(seconds / _MINUTE_S), 60)
    return f"{hours} h {rest} m" if rest else f"{hours} h"
