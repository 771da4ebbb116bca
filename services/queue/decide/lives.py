"""The lives of an agent: which of them is over, and what becomes of deliveries that went to one that is.

Who is dead is liveness' to say. A life that is declared dead gets nothing more; what it had in hand gets the stop grace
to come to an end by itself, as broken connections do.
"""

from __future__ import annotations

from dataclasses import replace

from services.queue.decide.workspace import DOWN, Workspace

_OF_THE_REGISTRY = frozenset({"paused", "removed"})
"""Words that say nothing about a life."""
_HEARD_LATE_S = 10.0
"""A new life may take messages for this long before we hear of it. Longer than a connection may take to be made, so
that what began before has left us, and went to the old one."""


def begin_life(workspace: Workspace, incarnation: int, at: float) -> Workspace:
    """Another process speaks for this agent: what the last one said of itself is void, and so is that it was busy."""
    if incarnation <= workspace.incarnation:
        return workspace
    return replace(
        workspace,
        incarnation=incarnation,
        life_at=at,
        beat_rev=0,
        beat_at=None,
        beat_active=0,
        not_before=None,
        busy_streak=0,
    )


def hear_status(workspace: Workspace, *, rev: int, incarnation: int, status: str, now: float) -> Workspace:
    """Apply liveness' word about a life; an older one, or one about an older life, changes nothing (D-S25)."""
    if rev <= workspace.status_rev or incarnation < workspace.incarnation:
        return workspace
    heard = replace(begin_life(workspace, incarnation, now), status_rev=rev, rev=workspace.rev + 1)
    if status in _OF_THE_REGISTRY:
        return heard
    dies_now = workspace.dead_at is None or incarnation > workspace.dead_incarnation
    if status in DOWN:
        dead_at = now if dies_now else workspace.dead_at
        return replace(heard, status=status, dead_incarnation=incarnation, dead_at=dead_at)
    if dies_now:
        return replace(heard, status=status)
    # The very life that was declared dead goes on: it was heard in time, or it keeps its number through a restart.
    return replace(heard, status=status, dead_incarnation=0, dead_at=None)


def is_outlived(
    *,
    life: int,
    incarnation: int,
    dead_incarnation: int,
    dead_age_s: float | None,
    led_s: float | None,
    grace_s: float,
    is_followed: bool,
) -> bool:
    """Whether nothing can come any more of a delivery to this life, so that its owner hangs up.

    `led_s`: how long it ran before the newest life was heard of. `is_followed`: a task is asked for, so a new life is
    asked, which may have it or not.
    """
    is_dead = dead_age_s is not None and life <= dead_incarnation
    if incarnation > life:
        return not is_followed and (is_dead or (led_s is not None and led_s >= _HEARD_LATE_S))
    return is_dead and dead_age_s is not None and dead_age_s >= grace_s
