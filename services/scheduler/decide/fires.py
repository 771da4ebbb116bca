"""What is due and what becomes of it (policies §4). Pure: moments in, verdicts out; the clock is the caller's.

A fire is named by its nominal moment, the one that the rule says. It is due later by the schedule's jitter. What comes
next is computed from the nominal moment and never from now, so that nothing drifts and nothing is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol
from uuid import UUID

from shared.facts import Priority

MOMENTS_MAX = 10_000
"""Moments of one schedule that one turn goes through: a week of minutes. The rest is the next turn's."""
WINDOW_MIN_S = 60.0
WINDOW_MAX_S = 86_400.0
_NONE = timedelta()

Outcome = Literal["delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled"]
OUTCOMES: tuple[Outcome, ...] = ("delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled")

CATCH_UP = "catch_up"
"""Why a fire was coalesced here and not in the queue: its moment passed while nobody looked. It is no bounce."""


class Rule(Protocol):
    """When a schedule fires."""

    def next(self, after: datetime) -> datetime | None:
        """The first moment later than `after`; None: there is none."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A living schedule's row."""

    schedule_id: UUID
    workspace_id: str
    name: str
    cron: str | None
    every_s: int | None
    at: datetime | None
    timezone: str
    anchor_at: datetime
    prompt: str
    context: Literal["fresh", "same"]
    overlap: Literal["queue_one", "queue_all", "skip"]
    priority: Priority
    catchup_window_s: float | None
    jitter_s: float
    ceiling_s: float | None
    ends_at: datetime | None
    remaining_runs: int | None
    paused: bool
    pause_note: str | None
    paused_by_error: str | None
    next_fire_at: datetime | None
    rev: int


@dataclass(frozen=True, slots=True)
class Several:
    """Moments that come to the same end together."""

    first: datetime
    last: datetime
    count: int


@dataclass(frozen=True, slots=True)
class Due:
    """What becomes of the moments that are due."""

    fire: datetime | None
    """The one that runs, for itself and for `merged`."""
    merged: Several | None
    missed: Several | None
    next_fire_at: datetime | None
    remaining_runs: int | None
    looked_at: int
    """Moments gone through: what it cost."""


def due(schedule: Schedule, rule: Rule, now: datetime, *, moments_max: int = MOMENTS_MAX) -> Due:
    """Share out the moments that are due: within the window they run once, as the newest; older ones are missed.

    Where there are more than `moments_max`, what is missed among them goes first and the rest stays due.
    """
    jitter = offset(schedule.schedule_id, schedule.jitter_s)
    moments, following = _moments(schedule, rule, now - jitter, moments_max)
    if not moments:
        return Due(None, None, None, schedule.next_fire_at, schedule.remaining_runs, 0)
    oldest = now - jitter - _window(schedule, moments[-1], following)
    missed = [moment for moment in moments if moment < oldest]
    caught = moments[len(missed) :]
    cut = len(moments) == moments_max
    if cut and missed and caught:
        following, caught = caught[0], []
    remaining = schedule.remaining_runs
    if caught and remaining is not None:
        remaining -= 1
    return Due(
        fire=caught[-1] if caught else None,
        merged=_several(caught[:-1]),
        missed=_several(missed),
        next_fire_at=bounded(following, schedule.ends_at, remaining),
        remaining_runs=remaining,
        looked_at=len(moments),
    )


def overdue(schedule: Schedule, rule: Rule, now: datetime) -> Several | None:
    """The moments that were due and that nobody had looked at when the schedule was changed: they will not run."""
    moments, _ = _moments(schedule, rule, now - offset(schedule.schedule_id, schedule.jitter_s), MOMENTS_MAX)
    return _several(moments)


def first_fire(schedule: Schedule, rule: Rule, now: datetime) -> datetime | None:
    """The next moment of a schedule that is new, resumed or has another rule: what has passed never fires."""
    if schedule.paused:
        return None
    return bounded(rule.next(now), schedule.ends_at, schedule.remaining_runs)


def edited(before: Schedule, after: Schedule, rule: Rule, now: datetime) -> datetime | None:
    """The next moment after an edit: another rule begins now, any other change leaves the calendar as it was."""
    if before.next_fire_at is None or timing(before) != timing(after):
        return first_fire(after, rule, now)
    return None if after.paused else bounded(before.next_fire_at, after.ends_at, after.remaining_runs)


def timing(schedule: Schedule) -> tuple[object, ...]:
    """The columns that are the rule."""
    return (schedule.cron, schedule.every_s, schedule.at, schedule.timezone)


def bounded(moment: datetime | None, ends_at: datetime | None, remaining_runs: int | None) -> datetime | None:
    """`moment`, unless the schedule is over by then. Its end is the last moment at which it may fire."""
    if moment is None or remaining_runs == 0 or (ends_at is not None and moment > ends_at):
        return None
    return moment


def offset(schedule_id: UUID, jitter_s: float) -> timedelta:
    """How much later than its moments a schedule is due: always the same part of its jitter, on every replica."""
    if not jitter_s:
        return _NONE
    part = int.from_bytes(hashlib.sha256(schedule_id.bytes).digest()[:6]) / (1 << 48)
    return timedelta(milliseconds=int(part * jitter_s * 1000))


def upcoming(schedule: Schedule, rule: Rule, now: datetime, count: int) -> list[datetime]:
    """The next moments, as if each of them ran; of a paused schedule, those that it would have if it went on now."""
    left = count if schedule.remaining_runs is None else min(count, schedule.remaining_runs)
    moment = schedule.next_fire_at or bounded(rule.next(now), schedule.ends_at, schedule.remaining_runs)
    found: list[datetime] = []
    while moment is not None and len(found) < left:
        found.append(moment)
        moment = bounded(rule.next(moment), schedule.ends_at, None)
    return found


def ran_at(outcome: Outcome, fire_at: datetime, began_at: datetime | None) -> datetime | None:
    """When a fire that ended so really ran; None: it did not, whatever its outcome says."""
    if outcome in {"coalesced", "skipped", "missed"}:
        return None
    return began_at or (fire_at if outcome in {"delivered", "ceiling"} else None)


def gives_back(outcome: Outcome, ran: datetime | None) -> bool:
    """Whether a fire that ended so has taken none of the remaining runs: they count runs, not bounces."""
    return ran is None and outcome in {"coalesced", "skipped", "canceled"}


def bounced(outcome: Outcome, fire_at: datetime, merged_into: datetime | None) -> list[datetime]:
    """The fires that, by this one's end, found their agent busy: itself, and the one that waits for both."""
    if outcome not in {"coalesced", "skipped"}:
        return []
    return [fire_at] if merged_into is None else [fire_at, merged_into]


def _moments(
    schedule: Schedule, rule: Rule, until: datetime, moments_max: int
) -> tuple[list[datetime], datetime | None]:
    """The moments up to `until`, at most `moments_max`, and the one that follows them."""
    moments: list[datetime] = []
    moment = schedule.next_fire_at
    last = until if schedule.ends_at is None else min(until, schedule.ends_at)
    while moment is not None and moment <= last and len(moments) < moments_max:
        moments.append(moment)
        following = rule.next(moment)
        if following is not None and following <= moment:
            raise ValueError(f"the rule says that {following} comes after {moment}")
        moment = following
    return moments, moment


def _window(schedule: Schedule, newest: datetime, following: datetime | None) -> timedelta:
    """How late a fire may run: as the schedule says, else one period within bounds; what comes only once, a day."""
    if schedule.catchup_window_s is not None:
        return timedelta(seconds=schedule.catchup_window_s)
    period_s = WINDOW_MAX_S if following is None else (following - newest).total_seconds()
    return timedelta(seconds=min(max(period_s, WINDOW_MIN_S), WINDOW_MAX_S))


def _several(moments: Sequence[datetime]) -> Several | None:
    return Several(moments[0], moments[-1], len(moments)) if moments else None
