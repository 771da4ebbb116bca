"""Sessions as values, and the course of one, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from services.scheduler import decide
from services.scheduler.decide import Began, Closing, Directive, Gate, Kill, Pace, Rules, Say, Session, Stop, StopToo
from tests.unit.scheduler_kit import T0

MS = timedelta(milliseconds=1)
S = timedelta(seconds=1)
RULES = Rules(ceiling_s=100.0, checkpoint_grace_s=20.0, stop_grace_s=10.0)
PACE = Pace()


def session(**changes: Any) -> Session:
    plain = Session(
        session_id="q:1", workspace_id="w", kind="delivery", incarnation=1, started_at=T0, noted_at=T0 + 2 * S
    )
    return replace(plain, **changes)


def closing(moment: datetime, **changes: Any) -> Closing:
    """The gate is closed, this session is in flight, and a beat has just come."""
    plain = Closing(
        generation=1, at=moment, until=moment + 120 * S, in_flight=(Began("q:1", T0),), beat_at=moment, cadence_s=30.0
    )
    return replace(plain, **changes)


@dataclass
class Course:
    """A session, turn by turn: what it says at each, in words."""

    session: Session = field(default_factory=session)
    rules: Rules = RULES
    siblings: Sequence[Session] = ()
    due_at: datetime | None = None
    said: list[tuple[float, Say]] = field(default_factory=list)

    def turn(self, at_s: float) -> list[str]:
        taken = decide.step(self.session, self.rules, T0 + at_s * S, siblings=self.siblings, pace=PACE)
        self.session, self.due_at = taken.session, taken.due_at
        self.said += [(at_s, say) for say in taken.says]
        return [words(say) for say in taken.says]

    def until(self, at_s: float) -> list[tuple[float, str]]:
        """Look whenever the last look says, until this moment."""
        found: list[tuple[float, str]] = []
        while self.due_at is not None and (due_s := (self.due_at - T0).total_seconds()) <= at_s:
            found += [(due_s, word) for word in self.turn(due_s)]
        return found


def words(say: Say) -> str:
    match say:
        case Directive():
            return f"{say.kind} {say.reason}"
        case Stop():
            return f"cancel {say.reason}"
        case StopToo():
            return f"cancel {say.session_id}"
        case Gate():
            return "gate" if say.until is not None else "gate opens"
        case Kill():
            return f"kill {say.order}"
