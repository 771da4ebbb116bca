"""Which sessions have begun and which have gone, from what the queue's snapshot shows (policies §5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from services.scheduler.decide.sessions import Session

BEATS = 2
"""So many heartbeats in a row show foreign work, or so many snapshots none, before it is believed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A session in a snapshot."""

    session_id: str
    kind: Literal["delivery", "forward"]
    workspace_id: str
    incarnation: int
    started_at: datetime
    ceiling_s: float | None = None
    schedule_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What a snapshot changes."""

    begun: tuple[Session, ...]
    gone: tuple[Session, ...]
    """Their owners no longer have them."""
    outlived: tuple[Session, ...]
    """Their agent has another life."""
    lingering: tuple[Session, ...]
    """Their owners gave them up, for nobody can end their container, and the agent still has something in hand."""


def compare(
    known: Iterable[Session],
    seen: Sequence[Seen],
    incarnations: Mapping[str, int],
    at: datetime,
    *,
    unexplained: Mapping[str, int],
    note_after_s: float,
) -> News:
    """Hold the open sessions that are `known`, foreign ones left out, against a snapshot that was true `at`.

    Those of less than `note_after_s` are not noted: most end before anybody could ask about them. What was noted by a
    later snapshot cannot be missing in this one. `unexplained`: how many tasks of each workspace nothing explains.
    """
    there = {each.session_id: each for each in seen}
    open_ids: set[str] = set()
    gone: list[Session] = []
    outlived: list[Session] = []
    lingering: list[Session] = []
    for session in known:
        open_ids.add(session.session_id)
        if incarnations.get(session.workspace_id, 0) > session.incarnation:
            outlived.append(session)
        elif session.kind != "foreign" and session.session_id not in there and session.noted_at < at:
            still_busy = session.unenforceable and unexplained.get(session.workspace_id, 0) > 0
            (lingering if still_busy else gone).append(session)
    old_enough = at - timedelta(seconds=note_after_s)
    begun = tuple(
        Session(
            session_id=each.session_id, workspace_id=each.workspace_id, kind=each.kind, incarnation=each.incarnation,
            started_at=each.started_at, schedule_id=each.schedule_id, ceiling_s=each.ceiling_s, noted_at=at,
        )
        for each in seen
        if each.session_id not in open_ids and each.started_at <= old_enough
    )  # fmt: skip
    return News(begun, tuple(gone), tuple(outlived), tuple(lingering))


@dataclass(frozen=True, slots=True)
class Activity:
    """What heartbeats have shown of foreign work in a workspace."""

    workspace_id: str
    incarnation: int = 0
    beats: int = 0
    """Beats in a row that showed some."""
    nones: int = 0
    """Snapshots in a row that showed none."""
    beat_at: datetime | None = None
    since: datetime | None = None
    """The first of those beats."""
    number: int = 0
    """Foreign sessions there, so far."""


def foreign(
    activity: Activity, is_open: bool, *, count: int, beat_at: datetime | None, incarnation: int, at: datetime
) -> tuple[Activity, Session | None, bool]:
    """Take in one snapshot: the activity from now on, the session that has begun, and whether the open one has ended.

    `count` are the tasks that nothing explains. A session that only one beat shows is none: tasks begin and end while
    a beat travels.
    """
    if not count:
        nones = activity.nones + 1
        rest = replace(activity, beats=0, nones=nones, since=None, beat_at=beat_at or activity.beat_at)
        return rest, None, is_open and nones >= BEATS
    if incarnation > activity.incarnation:
        activity = replace(activity, incarnation=incarnation, beats=0, since=None, beat_at=None)
    is_new = beat_at is not None and (activity.beat_at is None or beat_at > activity.beat_at)
    beats = activity.beats + is_new
    more = replace(
        activity, beats=beats, nones=0, beat_at=beat_at if is_new else activity.beat_at,
        since=(activity.since or beat_at) if is_new else activity.since,
    )  # fmt: skip
    since = more.since
    if is_open or beats < BEATS or since is None:
        return more, None, False
    more = replace(more, number=more.number + 1)
    begun = Session(
        session_id=f"foreign:{more.workspace_id}:{incarnation}:{more.number}",
        workspace_id=more.workspace_id,
        kind="foreign",
        incarnation=incarnation,
        started_at=since,
        noted_at=at,
    )
    return more, begun, False
