"""What becomes of a fire: the table of policies §4 for what the queue knows, and which fires an item stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal
from uuid import UUID

from services.queue.decide.workspace import Closed, Workspace, closed, taken
from shared.facts import ItemStatus

Overlap = Literal["queue_one", "queue_all", "skip"]
Outcome = Literal["delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the queue holds of a schedule: its copy, at revision `rev`."""

    schedule_id: UUID
    rev: int
    paused: bool = False
    deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """An item that stands for fires of a schedule."""

    queue_id: UUID
    workspace_id: str
    schedule_id: UUID
    fire_at: datetime
    """The fire that it became the item of."""
    last_fire_at: datetime
    first_missed_at: datetime | None = None
    merged_count: int = 1
    rev: int
    """The schedule's, which its prompt must have at least."""
    waits: bool = True
    """It is in line; else its agent has it, or may have."""
    coalesces: bool = True
    """It may come to stand for others, while it waits."""
    context_id: str
    ceiling_s: float | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """The fire becomes an item."""


@dataclass(frozen=True, slots=True)
class Merge:
    """The fire is told with one that waits."""

    into: Tick


@dataclass(frozen=True, slots=True)
class Settle:
    """The fire becomes nothing, and that is said."""

    outcome: Outcome
    reason: str


Admission = Keep | Merge | Settle


def admit(
    tick: Tick,
    overlap: Overlap,
    *,
    schedule: Schedule | None,
    others: Sequence[Tick],
    removed: bool = False,
    has_room: bool = True,
) -> Admission:
    """Say what becomes of a fire; `others`: what waits and runs of its schedule, `has_room`: it could begin now."""
    if removed:
        return Settle("canceled", "workspace_removed")
    if schedule is not None and (reason := withdrawn(schedule, tick.rev)) is not None:
        return Settle("canceled", reason)
    if overlap == "skip":
        if others:
            return Settle("skipped", "waiting" if any(each.waits for each in others) else "running")
        return Keep() if has_room else Settle("skipped", "in_use")
    if overlap == "queue_one":
        into = next((each for each in others if each.waits and each.coalesces), None)
        return Merge(into) if into is not None else Keep()
    return Keep()


def withdrawn(schedule: Schedule, rev: int) -> str | None:
    """Why a tick of this rev does not begin any more; None: it does.

    A pause is older than a tick of a higher rev: somebody resumed the schedule meanwhile, and word of it is on its way.
    """
    if schedule.deleted:
        return "schedule_deleted"
    return "schedule_paused" if schedule.paused and schedule.rev >= rev else None


def has_room(workspace: Workspace, now: float) -> bool:
    """Whether a tick would not have to wait for what its agent does, or for who stands in line before it."""
    if closed(workspace, now) in {Closed.BUSY, Closed.GATE}:
        return False
    return taken(workspace, now) + workspace.waiting < workspace.max_concurrent


def merged(into: Tick, tick: Tick) -> Tick:
    """The one as it stands for both. Whichever has the newer rev says how it is to be run."""
    newer = tick if tick.rev > into.rev else into
    return replace(
        into,
        merged_count=into.merged_count + tick.merged_count,
        first_missed_at=min(_first(into), _first(tick)),
        last_fire_at=max(into.last_fire_at, tick.last_fire_at),
        rev=newer.rev,
        context_id=newer.context_id,
        ceiling_s=newer.ceiling_s,
    )


def _first(tick: Tick) -> datetime:
    return tick.first_missed_at or tick.fire_at


def outcome(status: ItemStatus, reason: str | None) -> tuple[Outcome, str | None]:
    """What the end of its item is for a fire, and why."""
    match status:
        case ItemStatus.COMPLETED:
            return "delivered", reason
        case ItemStatus.FAILED if reason == "ceiling":
            return "ceiling", None
        case ItemStatus.FAILED:
            return "failed", reason
        case ItemStatus.EXPIRED:
            return "failed", "expired"
        case ItemStatus.CANCELED:
            return "canceled", reason
        case ItemStatus.SUPERSEDED:
            return "coalesced", None
        case ItemStatus.QUEUED | ItemStatus.DISPATCHED:
            raise ValueError(f"an item that is {status} has not ended")
