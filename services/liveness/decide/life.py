"""One agent as liveness knows it, and how the registry's word and the agent's own change that.

Facts of an older incarnation change nothing, and neither do those that come twice or late (D-S25). All moments are
ours, by the database's clock; what an agent's or a proxy's clock says is only ever compared with itself (D-S24).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from services.liveness.decide.window import Gaps, learn, window_s
from shared.facts import EvidenceKind, WorkspaceEvidence, WorkspaceHeartbeat, WorkspaceRegistered


class Status(StrEnum):
    """What is believed, and told."""

    ONLINE = "online"
    SUSPECT = "suspect"
    OFFLINE = "offline"
    RESTARTING = "restarting"
    WEDGED = "wedged"
    PAUSED = "paused"
    GAVE_UP = "gave_up"
    REMOVED = "removed"


DOWN = frozenset({Status.OFFLINE, Status.RESTARTING})
"""Declared dead; what was heard before that says nothing any more."""


@dataclass(frozen=True, slots=True)
class Life:
    """A row of agents."""

    workspace_id: str
    rev: int
    incarnation: int
    runtime: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    expects_beats: bool = True
    restart_wedged: bool = False
    cordoned: bool = False
    paused: bool = False
    desired: str = "running"
    removed: bool = False
    cadence_s: float = 30.0
    beat_rev: int = 0
    beats: int = 0
    gap_mean_s: float = 0.0
    gap_deviation_s: float = 0.0
    beat_at: datetime | None = None
    heard_at: datetime | None = None
    active: int = 0
    progress: float | None = None
    progress_at: datetime | None = None
    status: Status = Status.ONLINE
    reason: str = ""
    status_rev: int = 0
    status_at: datetime | None = None
    suspected_at: datetime | None = None
    suspected_last_at: datetime | None = None
    suspicions: int = 0
    blind_since: datetime | None = None
    known: bool = False
    """Its driver has seen it, or started it."""
    container_id: str | None = None
    started_at: datetime | None = None
    boot_until: datetime | None = None
    next_check_at: datetime | None = None
    fence: int = 0
    restarts: int = 0
    backoffs: int = 0
    unheard: int = 0
    restarted_at: datetime | None = None
    forgiven_at: datetime | None = None

    @property
    def window_s(self) -> float:
        """How long after it was last heard it counts as recently heard."""
        return window_s(Gaps(self.beats, self.gap_mean_s, self.gap_deviation_s), self.cadence_s)

    @property
    def gaps(self) -> Gaps:
        return Gaps(self.beats, self.gap_mean_s, self.gap_deviation_s)


def believed(life: Life, status: Status, reason: str) -> Life:
    """The same life under another belief; the moment and the number of a change are the store's to write."""
    return life if (life.status, life.reason) == (status, reason) else replace(life, status=status, reason=reason)


def unsuspected(life: Life) -> Life:
    """Forget every suspicion."""
    if life.suspicions == 0 and life.status is not Status.SUSPECT:
        return life
    forgotten = replace(life, suspected_at=None, suspected_last_at=None, suspicions=0)
    return believed(forgotten, Status.ONLINE, "") if life.status is Status.SUSPECT else forgotten


def registered(
    life: Life | None, fact: WorkspaceRegistered, *, driver: str | None, now: datetime, by_agent: bool
) -> Life | None:
    """Take over the registry's word. `by_agent`: an agent spoke (WorkspaceRegistered). None: it is not new."""
    if life is not None and (life.removed or fact.rev <= life.rev):
        return None
    before = life or Life(fact.workspace_id, 0, fact.incarnation, cadence_s=fact.heartbeat_interval_s)
    if fact.incarnation > before.incarnation:
        before = reborn(before, fact.incarnation, now)
    elif by_agent:
        before = heard(before, now)
    after = replace(
        before,
        rev=fact.rev,
        runtime=dict(fact.runtime),
        driver=driver,
        expects_beats=fact.settings.get("heartbeat") != "none",
        restart_wedged=fact.settings.get("restart_wedged") is True,
        cordoned=fact.settings.get("cordoned") is True,
        paused=fact.paused,
        desired=fact.desired,
        cadence_s=fact.heartbeat_interval_s,
    )
    if (after.driver, after.runtime) != (before.driver, before.runtime):
        after = replace(after, known=False, container_id=None, started_at=None, boot_until=None, blind_since=None)
    if after.paused:
        after = believed(after, Status.PAUSED, "it was paused by its owner or an operator")
    elif after.status is Status.PAUSED:
        after = believed(after, Status.ONLINE, "")
    elif driver is None:
        # Nobody can look any more, and what is down would never be sent to again.
        after = believed(unsuspected(after), Status.ONLINE, "")
    return replace(after, next_check_at=now if driver is not None else None)


def gone(life: Life | None, workspace_id: str, rev: int) -> Life | None:
    """It was removed from the registry, for ever (A-L-08, D-S18). None: it is not new."""
    if life is not None and (life.removed or rev <= life.rev):
        return None
    after = unsuspected(life or Life(workspace_id, 0, 0))
    after = replace(after, rev=rev, removed=True, next_check_at=None)
    return believed(after, Status.REMOVED, "it was removed")


def reborn(life: Life, incarnation: int, now: datetime) -> Life:
    """Another process speaks for this agent: what was known of the one before it counts for nothing.

    The container is the new life's if we started it ourselves; else its driver must say.
    """
    ours = life.boot_until is not None
    after = replace(
        unsuspected(life),
        incarnation=incarnation,
        beats=0,
        gap_mean_s=0.0,
        gap_deviation_s=0.0,
        beat_at=None,
        active=0,
        progress=None,
        progress_at=None,
        container_id=life.container_id if ours else None,
        started_at=life.started_at if ours else None,
        next_check_at=now if life.driver is not None else None,
    )
    after = replace(after, heard_at=now, boot_until=None, unheard=0)
    if life.status is Status.GAVE_UP:
        after = forgiven(after, now)
    return after if after.status in {Status.PAUSED, Status.REMOVED} else believed(after, Status.ONLINE, "")


def forgiven(life: Life, now: datetime) -> Life:
    """Hold no earlier restart against it: an operator, or another life after it was given up."""
    return replace(life, forgiven_at=now, backoffs=0, unheard=0)


def heard(life: Life, now: datetime) -> Life:
    """This incarnation has spoken or answered: it lives, whatever was believed (A-L-07, A-L-13)."""
    after = replace(life, heard_at=now, unheard=0)
    if life.status in DOWN and life.boot_until is not None:
        # An agent without a boot id keeps its incarnation through a restart.
        return believed(replace(after, boot_until=None), Status.ONLINE, "")
    if life.status in {Status.WEDGED, Status.GAVE_UP}:
        return believed(after, Status.ONLINE, "")
    return after


def beat(life: Life, fact: WorkspaceHeartbeat, now: datetime) -> Life | None:
    """Take a heartbeat. None: it is of an older incarnation, late, or doubled."""
    if life.removed or fact.incarnation < life.incarnation:
        return None
    if fact.incarnation > life.incarnation:
        life = reborn(life, fact.incarnation, now)
    elif fact.rev <= life.beat_rev:
        return None
    gaps = learn(life.gaps, None if life.beat_at is None else (now - life.beat_at).total_seconds())
    moved = fact.progress is not None and fact.progress != life.progress
    after = replace(
        heard(life, now),
        # At most as new as our clock: by a proxy's that is ahead, those of all others would be late (D-S24).
        beat_rev=min(fact.rev, int(now.timestamp() * 1e6)),
        beat_at=now,
        cadence_s=fact.cadence_s,
        beats=gaps.beats,
        gap_mean_s=gaps.mean_s,
        gap_deviation_s=gaps.deviation_s,
        active=fact.active_tasks,
        progress=fact.progress,
    )
    if moved or fact.active_tasks != life.active:
        after = replace(after, progress_at=now)
    return after


ALIVE_KINDS = frozenset({EvidenceKind.ANSWERED, EvidenceKind.BUSY, EvidenceKind.SERVER_ERROR})
"""The agent itself answered: busy and errors count as life (D-S22)."""
DOUBTS = frozenset({EvidenceKind.REFUSED, EvidenceKind.RESET, EvidenceKind.TIMEOUT, EvidenceKind.SERVER_ERROR})
"""Reason enough to look now."""


def evidence(life: Life, fact: WorkspaceEvidence, now: datetime) -> Life | None:
    """Take what somebody saw who talked to it. None: of another incarnation."""
    if life.removed or fact.incarnation != life.incarnation:
        return None
    after = heard(life, now) if fact.kind in ALIVE_KINDS and life.status not in DOWN else life
    if fact.kind in DOUBTS and life.driver is not None:
        after = replace(after, next_check_at=min(now, life.next_check_at or now))
    return after
