"""A workspace as the queue sees it: what may be delivered there, and what changes that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from services.queue.decide.line import CRITICAL_LANE, Floors, Place
from shared.capacity import FORWARDS_FRESH_S, Beat, counts_as_ended, in_use
from shared.facts import Priority

DOWN = frozenset({"offline", "restarting", "gave_up"})
"""Words of liveness for a life that is over."""
UNSAID = ("ceiling_s", "checkpoint_grace_s", "stop_grace_s")
"""Bounds of a turn that are the service's own where a workspace says nothing."""

_KEPT_ENDS_MAX = 64
_TURNS_MAX = 20


@dataclass(frozen=True, slots=True)
class Forwards:
    """One proxy's live forwards in a workspace, from its last beat."""

    rev: int
    at: float
    running: tuple[tuple[str, str, float], ...] = ()
    """(session, hex of the key's hash, started)"""
    ended: tuple[tuple[float, float, bool], ...] = ()
    """(started, ended, whether it was answered): what came back busy or was not delivered is left out"""
    generation: int = 0
    """The youngest closing of the gate that this proxy has seen."""
    gate_until: float | None = None
    """Until when it begins no forward there, whatever else it hears."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One session in the gate, by the last word about it."""

    rev: int
    until: float
    left: bool = False
    """It has left, which is remembered until then."""


@dataclass(slots=True)  # not frozen, for the same reason as a message: several are made for each item of a turn
class Workspace:
    """The queue's row of a workspace, under its lock. Nobody changes one: `replace` makes the next."""

    workspace_id: str
    registry_rev: int = 0
    url: str | None = None
    agent_authorization: str | None = None
    max_concurrent: int = 1
    at_most_once: bool = False
    give_up_after_s: float = 86400.0
    ceiling_s: float = 1800.0
    checkpoint_grace_s: float = 120.0
    stop_grace_s: float = 30.0
    unsaid: tuple[str, ...] = UNSAID
    """Which of these three are the service's own."""
    paused: bool = False
    removed: bool = False
    incarnation: int = 0
    life_at: float | None = None
    """When this life of the agent was first heard of."""
    status: str | None = None
    """The last word of liveness about its life."""
    status_rev: int = 0
    dead_incarnation: int = 0
    """The last life that was declared dead: with what came before it, nothing will come of it."""
    dead_at: float | None = None
    """When we heard that."""
    beat_rev: int = 0
    beat_at: float | None = None
    beat_active: int = 0
    beat_cadence_s: float = 30.0
    paused_at: float | None = None
    """Since when both clocks of what waits stand still."""
    waiting: int = 0
    waiting_critical: int = 0
    """Of `waiting`; what is neither CRITICAL nor INFO is TASK."""
    waiting_info: int = 0
    running: int = 0
    started_since: int = 0
    ended_since: int = 0
    recent_ended: tuple[tuple[float, float], ...] = ()
    """(begun, ended) of our newest deliveries that are over; ended 0: it may still run there."""
    forwards: Mapping[str, Forwards] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """The sessions that are being ended: while one is in it nothing begins here."""
    gate_generation: int = 0
    """How often the gate went from open to closed."""
    ever_active: bool = False
    """The agent's beats have shown more than 0 once: that one shows 0 means something."""
    not_before: float | None = None
    busy_streak: int = 0
    floors: Floors = (0, 0)
    served_critical: bool = False
    """What was claimed last was CRITICAL."""
    turns_s: tuple[float, ...] = ()
    """How long the newest answered deliveries took."""
    rev: int = 0
    version: tuple[int, int] | None = field(default=None, compare=False)
    """Where the version of the row that was locked stands (ctid)."""


class Closed(Enum):
    """Why a workspace takes no delivery at all, whatever its capacity."""

    REMOVED = "removed"
    PAUSED = "paused"
    OFFLINE = "offline"
    """Its agent is dead, and no other life of it has been heard."""
    NO_URL = "no_url"
    GATE = "gate"
    BUSY = "busy"


def closed(workspace: Workspace, now: float) -> Closed | None:  # noqa: PLR0911 - one for each reason, in its order
    """Say why nothing is delivered; None: the capacity decides."""
    if workspace.removed:
        return Closed.REMOVED
    if workspace.paused:
        return Closed.PAUSED
    if workspace.status in DOWN and workspace.dead_incarnation >= workspace.incarnation:
        return Closed.OFFLINE
    if workspace.url is None:
        return Closed.NO_URL
    if workspace.gates and gate_until(workspace, now) is not None:
        return Closed.GATE
    if workspace.not_before is not None and workspace.not_before > now:
        return Closed.BUSY
    return None


def gate_until(workspace: Workspace, now: float) -> float | None:
    """Until when the gate is closed if nobody renews it; None: it is open."""
    return max((gate.until for gate in workspace.gates.values() if gate.until > now and not gate.left), default=None)


def taken(workspace: Workspace, now: float) -> int:
    """Tasks the agent has in hand: its own count, our deliveries, the live forwards of living proxies."""
    beat_at = workspace.beat_at if workspace.beat_at is not None else float("-inf")
    running, started, ended = workspace.running, workspace.started_since, workspace.ended_since
    for proxy in workspace.forwards.values():
        if now - proxy.at >= FORWARDS_FRESH_S:
            continue
        running += len(proxy.running)
        started += sum(begun > beat_at for _, _, begun in proxy.running)
        started += sum(begun > beat_at for begun, _, _ in proxy.ended)
        ended += sum(counts_as_ended(end, beat_at) for _, end, answered in proxy.ended if answered)
    beat = None
    if workspace.beat_at is not None:
        beat = Beat(workspace.beat_active, workspace.beat_at, workspace.beat_cadence_s)
    return in_use(now=now, beat=beat, running=running, started_since=started, ended_since=ended)


def spare(workspace: Workspace, now: float) -> int:
    """How many items may be delivered now."""
    if closed(workspace, now) is not None:
        return 0
    return max(0, min(workspace.max_concurrent - taken(workspace, now), workspace.waiting))


def by_priority(workspace: Workspace) -> dict[Priority, int]:
    """How many items of each priority wait."""
    tasks = workspace.waiting - workspace.waiting_critical - workspace.waiting_info
    counts = {
        Priority.CRITICAL: workspace.waiting_critical,
        Priority.TASK: tasks,
        Priority.INFO: workspace.waiting_info,
    }
    return {priority: count for priority, count in counts.items() if count}


def place_told(workspace: Workspace, priority: Priority) -> int:
    """The place of a message of this priority that was kept last: at the latest, for TASK may pass some INFO."""
    return workspace.waiting_critical if priority is Priority.CRITICAL else workspace.waiting


def turn_s(workspace: Workspace) -> float | None:
    """How long a delivery takes here: the median of the newest."""
    return sorted(workspace.turns_s)[len(workspace.turns_s) // 2] if workspace.turns_s else None


def paused(workspace: Workspace, now: float, *, is_paused: bool) -> tuple[Workspace, float | None]:
    """Pause or go on; with the moment since which the clocks of what waits stood still, if they go on now."""
    if is_paused:
        return replace(workspace, paused=True, paused_at=workspace.paused_at or now), None
    return replace(workspace, paused=False, paused_at=None), workspace.paused_at


# ── what changes a workspace ─────────────────────────────────────────────────────────────────────────────────────────


def hear_beat(
    workspace: Workspace,
    *,
    rev: int,
    at: float,
    active: int,
    cadence_s: float,
    incarnation: int,
    maximum: int | None,
    now: float,
    begun_after: int = 0,
) -> Workspace:
    """Apply a heartbeat; an older one, or one of an older incarnation, changes nothing.

    `at` is by the clock of the proxy that it came to, `now` by ours, which gates go by. `begun_after`: our running
    deliveries that began after the beat came in, while it was on its way to us. Some may have ended again meanwhile:
    of those, too, both the begin and the end are counted.
    """
    if incarnation < workspace.incarnation or (incarnation == workspace.incarnation and rev <= workspace.beat_rev):
        return workspace
    # All of them stay: the first beat of a new life may have come in before the last one of the old life.
    recent = workspace.recent_ended
    heard = replace(
        workspace,
        incarnation=incarnation,
        life_at=at if incarnation > workspace.incarnation else workspace.life_at,
        beat_rev=rev,
        beat_at=at,
        beat_active=active,
        beat_cadence_s=cadence_s,
        max_concurrent=maximum or workspace.max_concurrent,
        started_since=begun_after + sum(begun > at for begun, _ in recent),
        ended_since=sum(counts_as_ended(end, at) for _, end in recent),
        ever_active=workspace.ever_active or active > 0,
        gates={name: gate for name, gate in workspace.gates.items() if gate.until > now},
        rev=workspace.rev + 1,
    )
    # A beat that shows room opens a workspace that answered busy.
    return replace(heard, not_before=None, busy_streak=0) if active < heard.max_concurrent else heard


def hear_forwards(workspace: Workspace, proxy_id: str, forwards: Forwards) -> Workspace:
    """Apply a proxy's beat; an older one changes nothing. Proxies long silent are forgotten."""
    known = workspace.forwards.get(proxy_id)
    if known is not None and forwards.rev <= known.rev:
        return workspace
    living = {name: each for name, each in workspace.forwards.items() if forwards.at - each.at < 4 * FORWARDS_FRESH_S}
    # Also when it has none left: an older beat that comes late, with a kept message, must not bring them back.
    return replace(workspace, forwards={**living, proxy_id: forwards}, rev=workspace.rev + 1)


def keep(workspace: Workspace, place: Place, priority: Priority) -> Workspace:
    """Account for an item that waits from now on."""
    return _count(workspace, priority, 1, floors=lowered(workspace.floors, place))


def leave(workspace: Workspace, priority: Priority) -> Workspace:
    """Account for an item that has ended while it waited."""
    return _count(workspace, priority, -1)


def lowered(floors: Floors, place: Place) -> Floors:
    """The floors, once something waits at this place."""
    critical, rest = floors
    lane, rank_ms = place
    return (min(critical, rank_ms), rest) if lane == CRITICAL_LANE else (critical, min(rest, rank_ms))


def _count(workspace: Workspace, priority: Priority, change: int, **more: Any) -> Workspace:
    return replace(
        workspace,
        waiting=workspace.waiting + change,
        waiting_critical=workspace.waiting_critical + change * (priority is Priority.CRITICAL),
        waiting_info=workspace.waiting_info + change * (priority is Priority.INFO),
        rev=workspace.rev + 1,
        **more,
    )


def begin(
    workspace: Workspace, priorities: Sequence[Priority], floors: Floors, *, served_critical: bool = False
) -> Workspace:
    """Account for items that were claimed; `floors` are where the lanes begin now."""
    items = len(priorities)
    return replace(
        workspace,
        waiting=workspace.waiting - items,
        waiting_critical=workspace.waiting_critical - priorities.count(Priority.CRITICAL),
        waiting_info=workspace.waiting_info - priorities.count(Priority.INFO),
        running=workspace.running + items,
        started_since=workspace.started_since + items,
        floors=floors,
        served_critical=served_critical,
        rev=workspace.rev + 1,
    )


class Ending(Enum):
    """How a delivery that has ended counts against the agent's capacity."""

    ANSWERED = "answered"
    NEITHER = "neither"
    """Busy, not delivered: as if it had not begun."""
    UNKNOWN = "unknown"
    """It may still run there: begun, and not ended."""


def end(
    workspace: Workspace,
    ending: Ending,
    *,
    begun_at: float,
    now: float,
    back_at: Place | None = None,
    priority: Priority = Priority.TASK,
) -> Workspace:
    """Account for one delivery that has ended; `back_at`: its item waits again, there."""
    after_beat = workspace.beat_at is None or begun_at > workspace.beat_at
    ended = replace(workspace, running=workspace.running - 1, rev=workspace.rev + 1)
    if back_at is not None:
        ended = keep(ended, back_at, priority)
    newest = max(1, min(_KEPT_ENDS_MAX, ended.max_concurrent))
    match ending:
        case Ending.ANSWERED:
            recent = (*ended.recent_ended, (begun_at, now))[-newest:]
            turns_s = (*ended.turns_s, max(0.0, now - begun_at))[-_TURNS_MAX:]
            return replace(ended, ended_since=ended.ended_since + 1, recent_ended=recent, turns_s=turns_s)
        case Ending.NEITHER:
            return replace(ended, started_since=max(0, ended.started_since - 1)) if after_beat else ended
        case Ending.UNKNOWN:
            return replace(ended, recent_ended=(*ended.recent_ended, (begun_at, 0.0))[-newest:])
