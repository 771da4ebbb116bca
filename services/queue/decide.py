"""The policies of the queue: what may be delivered, and what becomes of an item once its delivery has ended.

Values in, values out: no clock, no I/O. Times are seconds since 1970. The tables: tests/unit/test_queue_decide.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal
from uuid import UUID

from shared.capacity import FORWARDS_FRESH_S, Beat, counts_as_ended, in_use
from shared.facts import ItemStatus

_KEPT_ENDS_MAX = 64


@dataclass(frozen=True, slots=True)
class Forwards:
    """One proxy's live forwards in a workspace, from its last beat."""

    rev: int
    at: float
    running: tuple[tuple[str, str, float], ...] = ()
    """(session, hex of the key's hash, started)"""
    ended: tuple[tuple[float, float, bool], ...] = ()
    """(started, ended, whether it was answered): what came back busy or was not delivered is left out"""


Place = tuple[int, int]
"""Where an item stands in the line of its workspace: (lane, rank_ms), the lowest first."""


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
    paused: bool = False
    removed: bool = False
    incarnation: int = 0
    beat_rev: int = 0
    beat_at: float | None = None
    beat_active: int = 0
    beat_cadence_s: float = 30.0
    waiting: int = 0
    running: int = 0
    started_since: int = 0
    ended_since: int = 0
    recent_ended: tuple[tuple[float, float], ...] = ()
    """(begun, ended) of our newest deliveries that are over; ended 0: it may still run there."""
    forwards: Mapping[str, Forwards] = field(default_factory=dict)
    not_before: float | None = None
    busy_streak: int = 0
    floor: Place = (0, 0)
    """Nothing that waits lies below it: a claim begins here and meets nothing that has died before."""
    rev: int = 0
    version: tuple[int, int] | None = field(default=None, compare=False)
    """Where the version of the row that was locked stands (ctid)."""


class Closed(Enum):
    """Why a workspace takes no delivery at all, whatever its capacity."""

    REMOVED = "removed"
    PAUSED = "paused"
    NO_URL = "no_url"
    BUSY = "busy"


def closed(workspace: Workspace, now: float) -> Closed | None:
    """Say why nothing is delivered; None: the capacity decides."""
    if workspace.removed:
        return Closed.REMOVED
    if workspace.paused:
        return Closed.PAUSED
    if workspace.url is None:
        return Closed.NO_URL
    if workspace.not_before is not None and workspace.not_before > now:
        return Closed.BUSY
    return None


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
    begun_after: int = 0,
) -> Workspace:
    """Apply a heartbeat; an older one, or one of an older incarnation, changes nothing.

    `begun_after`: our running deliveries that began after the beat came in, while it was on its way to us. Some may
    have ended again meanwhile: of those, too, both the begin and the end are counted.
    """
    if incarnation < workspace.incarnation or (incarnation == workspace.incarnation and rev <= workspace.beat_rev):
        return workspace
    recent = tuple(each for each in workspace.recent_ended if each[0] > at or counts_as_ended(each[1], at))
    heard = replace(
        workspace,
        incarnation=incarnation,
        beat_rev=rev,
        beat_at=at,
        beat_active=active,
        beat_cadence_s=cadence_s,
        max_concurrent=maximum or workspace.max_concurrent,
        started_since=begun_after + sum(begun > at for begun, _ in recent),
        ended_since=sum(counts_as_ended(end, at) for _, end in recent),
        recent_ended=recent,
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


def keep(workspace: Workspace, place: Place) -> Workspace:
    """Account for an item that waits from now on."""
    return replace(workspace, waiting=workspace.waiting + 1, floor=min(workspace.floor, place), rev=workspace.rev + 1)


def begin(workspace: Workspace, items: int, first: Place) -> Workspace:
    """Account for `items` that were claimed; `first` stood first in the line then, claimed or passed over."""
    return replace(
        workspace,
        waiting=workspace.waiting - items,
        running=workspace.running + items,
        started_since=workspace.started_since + items,
        floor=first,
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
    workspace: Workspace, ending: Ending, *, begun_at: float, now: float, back_at: Place | None = None
) -> Workspace:
    """Account for one delivery that has ended; `back_at`: its item waits again, there."""
    after_beat = workspace.beat_at is None or begun_at > workspace.beat_at
    ended = replace(workspace, running=workspace.running - 1, rev=workspace.rev + 1)
    if back_at is not None:
        ended = keep(ended, back_at)
    newest = max(1, min(_KEPT_ENDS_MAX, ended.max_concurrent))
    match ending:
        case Ending.ANSWERED:
            recent = (*ended.recent_ended, (begun_at, now))[-newest:]
            return replace(ended, ended_since=ended.ended_since + 1, recent_ended=recent)
        case Ending.NEITHER:
            return replace(ended, started_since=max(0, ended.started_since - 1)) if after_beat else ended
        case Ending.UNKNOWN:
            return replace(ended, recent_ended=(*ended.recent_ended, (begun_at, 0.0))[-newest:])


# ── what becomes of an item ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Item:
    """A claimed item, as its owner holds it."""

    queue_id: UUID
    workspace_id: str
    delivery_no: int
    method: str
    body: bytes
    attempts: int
    deaths: int
    dispatched_at: float
    hops: int
    agent_task_id: str | None
    cancel_requested: bool
    url: str
    agent_authorization: str | None
    at_most_once: bool
    ceiling_s: float
    rev: int


Reply = Literal[
    "delivered",
    "busy",
    "not_delivered",
    "preempted",
    "failed_attempt",
    "refused",
    "unknown",
    "answer_lost",
    "answer_too_large",
    "ceiling",
    "owner_died",
    "written_back",
]
"""What came back (policies §2, without `accepted`, which is followed), or what became of the owner."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The item ends here."""

    status: ItemStatus
    reason: str | None
    ending: Ending
    attempts: int = 0
    """Whether this delivery itself counts against the limit: 1 or 0."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """The same row, the same rank, again."""

    reason: str
    ending: Ending
    attempts: int = 0
    deaths: int = 0
    row_wait: bool = False
    """It waits out a failed attempt of its own."""
    closes: bool = False
    """The workspace is closed for a while."""


Fate = Finish | Requeue


def fate(
    reply: Reply,
    *,
    attempts: int,
    deaths: int,
    at_most_once: bool,
    cancel_requested: bool,
    attempts_max: int = 5,
    deaths_max: int = 3,
) -> Fate:
    """Say what becomes of an item whose delivery came back as `reply` (the table of policies §2 and §3).

    `attempts` and `deaths` are those before this delivery.
    """
    decided = _fate(reply, attempts, deaths, at_most_once=at_most_once, limits=(attempts_max, deaths_max))
    if isinstance(decided, Requeue) and cancel_requested:
        # A row that would return to the queue with a cancel on it ends instead.
        return Finish(ItemStatus.CANCELED, "canceled", decided.ending, decided.attempts)
    return decided


_FATES: Mapping[Reply, Fate] = {
    "delivered": Finish(ItemStatus.COMPLETED, None, Ending.ANSWERED),
    "answer_lost": Finish(ItemStatus.COMPLETED, "answer_lost", Ending.ANSWERED),
    "answer_too_large": Finish(ItemStatus.COMPLETED, "answer_too_large", Ending.ANSWERED),
    "refused": Finish(ItemStatus.FAILED, "refused", Ending.ANSWERED),
    "ceiling": Finish(ItemStatus.FAILED, "ceiling", Ending.UNKNOWN),
    "busy": Requeue("busy", Ending.NEITHER, closes=True),
    "not_delivered": Requeue("not_delivered", Ending.NEITHER, closes=True),
    "preempted": Requeue("preempted", Ending.ANSWERED, row_wait=True),
    "written_back": Requeue("written_back", Ending.UNKNOWN),
    "failed_attempt": Requeue("failed_attempt", Ending.ANSWERED, attempts=1, row_wait=True),
    "unknown": Requeue("unknown", Ending.UNKNOWN, attempts=1, deaths=1, row_wait=True),
    "owner_died": Requeue("owner_died", Ending.UNKNOWN, attempts=1),
}


def may_go_back(reply: Reply) -> bool:
    """Whether an item with this reply can return to the queue."""
    return isinstance(_FATES[reply], Requeue)


def _fate(reply: Reply, attempts: int, deaths: int, *, at_most_once: bool, limits: tuple[int, int]) -> Fate:
    attempts_max, deaths_max = limits
    decided = _FATES[reply]
    if isinstance(decided, Finish):
        return decided
    if at_most_once and reply in {"unknown", "owner_died"}:
        return Finish(ItemStatus.FAILED, "delivery_unknown", decided.ending, decided.attempts)
    if decided.deaths and deaths + decided.deaths >= deaths_max:
        return Finish(ItemStatus.FAILED, "poison", decided.ending, decided.attempts)
    # The death of our own replica says nothing about the message: it never fails one.
    if decided.row_wait and attempts + decided.attempts >= attempts_max:
        return Finish(ItemStatus.FAILED, "attempts", decided.ending, decided.attempts)
    return decided


_PAUSE_MIN_S = 0.05
"""An agent that asks to be asked again at once is not asked in a loop."""


def busy_wait_s(streak: int, *, retry_after_s: float | None, base_s: float, cap_s: float, jitter: float) -> float:
    """How long a workspace stays closed: what it asked for, else full jitter over base doubling to cap.

    `jitter` is a random number from 0 to 1; `streak` counts the busy answers in a row from 0.
    """
    if retry_after_s is not None:
        return min(max(_PAUSE_MIN_S, retry_after_s), cap_s)
    return max(_PAUSE_MIN_S, jitter * min(cap_s, base_s * float(2 ** min(streak, 20))))


# ── what a person is told ────────────────────────────────────────────────────────────────────────────────────────────

_WORDS = {
    Closed.REMOVED: "the workspace was removed",
    Closed.PAUSED: "the workspace is paused",
    Closed.NO_URL: "its agent has not registered yet",
    Closed.BUSY: "its agent said it is busy",
}


def why(workspace: Workspace, position: int, now: float) -> str:
    """Say in one sentence why an item waits."""
    reason = closed(workspace, now)
    place = "next in line" if position <= 1 else f"{position}{_ordinal(position)} in line"
    if reason is not None:
        return f"{place}: {_WORDS[reason]}"
    return f"{place}: its agent is at {taken(workspace, now)}/{workspace.max_concurrent}"


def _ordinal(number: int) -> str:
    if 10 <= number % 100 <= 20:  # noqa: PLR2004 - 11th, 12th, 13th
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


RANK_SLACK_MS = 10_000
"""How long before its fact a message may have come in: a live forward that bounces is kept only after its attempt."""


def rank(queue_id: UUID, fact_id: UUID) -> int:
    """The rank of a TASK message: the millisecond in which its body was read, so that first in is first out.

    That is the queue_id's, but a caller may bring one back and would choose its place: it is believed only within
    RANK_SLACK_MS of the fact, which our proxy made.
    """
    return max(queue_id.int >> 80, (fact_id.int >> 80) - RANK_SLACK_MS)
