"""What becomes of an item once its delivery has ended: the tables of policies §2 and §3."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from services.queue.decide.workspace import Ending
from shared.facts import ItemStatus, Priority


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
    grace_s: float
    """What it may outlast its ceiling by: both graces."""
    rev: int
    priority: Priority = Priority.TASK
    enqueued_at: float = 0.0
    incarnation: int = 0
    """The life of the agent that it was claimed for."""


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
    "abandoned",
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
    canceled_as: str = "canceled",
    stopped_for: str | None = None,
    task_canceled: bool = False,
    critical_waits: bool = False,
    attempts_max: int = 5,
    deaths_max: int = 3,
) -> Fate:
    """Say what becomes of an item whose delivery came back as `reply` (the table of policies §2 and §3).

    `attempts` and `deaths` are those before this delivery; `canceled_as`: why an item that is to be canceled ends;
    `stopped_for`: why it was told to stop, if it was; `task_canceled`: what came back is a Task that was canceled;
    `critical_waits`: a CRITICAL message was why it ended.
    """
    decided = _fate(reply, attempts, deaths, at_most_once=at_most_once, limits=(attempts_max, deaths_max))
    if stopped_for is not None and may_have_been_stopped(reply, task_canceled=task_canceled):
        # Whatever it looks like, we ended it: sent again it would only be the same session once more.
        return _stopped(reply, decided, stopped_for)
    if reply == "preempted" and not critical_waits and isinstance(decided, Requeue):
        # Nobody asked for it, and nobody goes first: as a busy one, or it would be offered again in a loop.
        decided = replace(decided, closes=True)
    if isinstance(decided, Requeue) and cancel_requested:
        # A row that would return to the queue with a cancel on it ends instead.
        return Finish(ItemStatus.CANCELED, canceled_as, decided.ending, decided.attempts)
    return decided


_FATES: Mapping[Reply, Fate] = {
    "delivered": Finish(ItemStatus.COMPLETED, None, Ending.ANSWERED),
    "answer_lost": Finish(ItemStatus.COMPLETED, "answer_lost", Ending.ANSWERED),
    "answer_too_large": Finish(ItemStatus.COMPLETED, "answer_too_large", Ending.ANSWERED),
    "refused": Finish(ItemStatus.FAILED, "refused", Ending.ANSWERED),
    "ceiling": Finish(ItemStatus.FAILED, "ceiling", Ending.UNKNOWN),
    "abandoned": Finish(ItemStatus.FAILED, "abandoned", Ending.UNKNOWN),
    "busy": Requeue("busy", Ending.NEITHER, closes=True),
    "not_delivered": Requeue("not_delivered", Ending.NEITHER, closes=True),
    "preempted": Requeue("preempted", Ending.ANSWERED),
    "written_back": Requeue("written_back", Ending.UNKNOWN),
    "failed_attempt": Requeue("failed_attempt", Ending.ANSWERED, attempts=1, row_wait=True),
    "unknown": Requeue("unknown", Ending.UNKNOWN, attempts=1, deaths=1, row_wait=True),
    "owner_died": Requeue("owner_died", Ending.UNKNOWN, attempts=1),
}


_REAL: Collection[Reply] = ("delivered", "answer_too_large")
"""What an agent that comes to an end by itself sends: it completes the item, also after a stop."""


def may_have_been_stopped(reply: Reply, *, task_canceled: bool = False) -> bool:
    """Whether a stop decides what becomes of an item with this reply; a real answer outranks it."""
    return task_canceled or reply not in _REAL


def _stopped(reply: Reply, decided: Fate, stopped_for: str) -> Finish:
    if stopped_for == "operator":
        return Finish(ItemStatus.CANCELED, "stopped", decided.ending, decided.attempts)
    reason = "abandoned" if reply == "abandoned" else "ceiling"
    return Finish(ItemStatus.FAILED, reason, decided.ending, decided.attempts)


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
