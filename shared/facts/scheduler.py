"""What scheduler tells and is asked, and the answers about sessions that are for it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field

from shared.facts.fact import Count, Fact, Priority
from shared.facts.session import Running


class ScheduleQuery(Fact):
    """A question or a command about schedules or sessions; answered with QueryAnswered to `reply_to`.

    A command (`create`, `patch`, `delete`, `run`, `pause`, `resume`; `checkpoint` and `stop`, about the sessions of a
    workspace) answers after its commit, may be sent again, and is refused after `expires_at`. `sessions` shows what
    runs in a workspace, or ("-") in those that `body` names as `workspaces`, and which of their schedules bounce.
    Where it names none: in all in which something runs.
    """

    query_id: UUID
    verb: Literal[
        "list", "show", "fires", "preview", "create", "patch", "delete", "run", "pause", "resume",
        "sessions", "checkpoint", "stop",
    ]  # fmt: skip
    schedule_id: UUID | None = None
    """With `create` the id that the new one gets: said twice, it is one."""
    body: bytes = b"{}"
    """The JSON object that the caller sent."""
    if_match: Count | None = None
    """Only if the schedule still has this rev."""
    by: str
    """Who says it, as it is shown."""
    cursor: str | None = None
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    expires_at: AwareDatetime
    reply_to: str


class ScheduleChanged(Fact):
    """What a schedule says now. `rev` is the schedule's."""

    schedule_id: UUID
    prompt: str
    name: str = ""
    paused: bool = False
    deleted: bool = False


class ScheduleApplied(Fact):
    """The queue holds this rev of the schedule: whatever is dispatched from now on has its prompt."""

    schedule_id: UUID
    withdrawn: Count = 0


class ScheduleTick(Fact):
    """A fire. `rev` is the schedule's."""

    schedule_id: UUID
    fire_at: AwareDatetime
    queue_id: UUID
    """The item that it becomes, if it becomes one."""
    merged_count: Annotated[int, Field(ge=1)] = 1
    """Fires that it stands for: more than one after an outage."""
    first_missed_at: AwareDatetime | None = None
    priority: Priority = Priority.TASK
    overlap: Literal["queue_one", "queue_all", "skip"] = "queue_one"
    context: Literal["fresh", "same"] = "fresh"
    ceiling_s: float | None = None


class TickSettled(Fact):
    """What became of a fire, said once; of one that was merged into another, when it was."""

    schedule_id: UUID
    fire_at: AwareDatetime
    outcome: Literal["delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled"]
    reason: str | None = None
    queue_id: UUID | None = None
    merged_into: AwareDatetime | None = None
    """The fire whose item stands for it."""
    began_at: AwareDatetime | None = None
    """When its delivery began, if it did."""


class DirectiveKind(StrEnum):
    CHECKPOINT = "checkpoint"
    STOP = "stop"


class SessionDirective(Fact):
    """What is asked of an agent. Said again every 10 s, under the same `directive_id`, until it is past.

    `rev` is the session's.
    """

    directive_id: UUID
    session_id: str
    incarnation: Count
    kind: DirectiveKind
    reason: Literal["ceiling_near", "tick_waiting", "critical_waiting", "ceiling", "restart", "operator"]
    deadline: AwareDatetime | None = None
    """By when; None: at once."""


class SessionStop(Fact):
    """Whoever holds this session asks its agent to cancel it. Said again every 10 s until the session has ended."""

    session_id: str
    incarnation: Count
    reason: str


class SessionGate(Fact):
    """Close the gate for this session, keep it closed until `gate_until`, or let the session leave it.

    `rev` grows with each word about one session. Each that closes is answered with GateClosed, as soon as it is true.
    """

    session_id: str
    incarnation: Count
    closed: bool
    gate_until: AwareDatetime


class GateClosed(Fact):
    """No session begins in this workspace before `until`: every proxy that lives has seen the gate closed.

    `rev` is the workspace's, `occurred_at` when it was true.
    """

    session_id: str
    incarnation: Count
    generation: Count
    until: AwareDatetime
    """The earliest moment until which one of the proxies, or the queue, keeps it closed by what it has heard."""
    in_flight: tuple[Running, ...] = ()
    """All deliveries and live forwards."""
    foreign: Count = 0
    beat_at: AwareDatetime | None = None
    cadence_s: float = 30.0


class SessionKill(Fact):
    """End the container that this session runs in; of no effect once it is another life's, or after `expires_at`.

    `occurred_at` is when it was ordered, by the database's clock: it means no container that was started after that.
    """

    session_id: str
    incarnation: Count
    order_id: UUID
    expires_at: AwareDatetime


class KillDone(Fact):
    session_id: str
    incarnation: Count
    order_id: UUID
    result: Literal["applied", "stale", "already_ended", "not_killable"]
