"""The contracts of the bus, and only they: what services tell each other.

The class name is the routing key (`WorkspaceHeartbeat` travels as `workspace.heartbeat`). A fact states what happened,
with the `rev` of the thing it speaks about; a reader applies only a higher rev, so that nothing depends on order
between batches, queues or replicas. Readers ignore unknown fields; a change adds an optional field; a break is a new
name. `tests/unit/facts.schema.json` is the snapshot that a change shows up in.

A message on the bus is a batch of facts of one type: `shared/batches.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal, TypeVar
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator
from uuid_utils.compat import uuid7

WorkspaceId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
"""sha256 of a string that a caller chose: the only form in which such a string is a key (4-data)."""
Count = Annotated[int, Field(ge=0)]


_AHEAD_MAX_S = 86_400.0


def _now() -> datetime:
    return datetime.now(UTC)


class Priority(StrEnum):
    CRITICAL = "CRITICAL"
    TASK = "TASK"
    INFO = "INFO"


class Part(BaseModel):
    """A value inside a fact."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_bytes="base64", val_json_bytes="base64")


class Fact(Part):
    """What every fact carries."""

    fact_id: UUID = Field(default_factory=uuid7)
    """uuid7: its time says which part of the inbox remembers it."""
    occurred_at: AwareDatetime = Field(default_factory=_now)
    workspace_id: WorkspaceId
    rev: Count
    """Revision of what the fact speaks about; grows with every change of it."""

    @field_validator("fact_id")
    @classmethod
    def _is_uuid7(cls, fact_id: UUID) -> UUID:
        if fact_id.version != 7:  # noqa: PLR2004 - the version that carries a time
            raise ValueError("a fact_id is a uuid7: the inbox forgets by its time")
        if (fact_id.int >> 80) / 1000 > time.time() + _AHEAD_MAX_S:
            raise ValueError("a fact_id from the future: the clock that made it is wrong by more than a day")
        return fact_id


FactT = TypeVar("FactT", bound=Fact)

_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


def routing_key(kind: type[Fact]) -> str:
    """`WorkspaceHeartbeat` → `workspace.heartbeat`."""
    return _BOUNDARY.sub(".", kind.__name__).lower()


# ── a session, wherever it is spoken of ──────────────────────────────────────────────────────────────────────────────


class Running(Part):
    """A delivery or a live forward that is under way."""

    session_id: str
    key_hash: Digest | None = None
    started_at: AwareDatetime
    ceiling_s: Annotated[float, Field(ge=0)] | None = None
    """Of its own, as its schedule says; None: its workspace's. 0: no ceiling."""
    schedule_id: UUID | None = None
    """The schedule whose tick it is."""


class Ended(Part):
    """A live forward that ended in the last 60 s."""

    session_id: str
    outcome: str
    started_at: AwareDatetime
    ended_at: AwareDatetime


# ── proxy ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProxyBeat(Fact):
    """One proxy's live forwards in one workspace. `rev` numbers the beats of this proxy.

    Of the fleet (`workspace_id` "-"), every few seconds, it says only that this proxy lives.
    """

    proxy_id: str
    forwards: tuple[Running, ...] = ()
    ended: tuple[Ended, ...] = ()
    gate_generation: Count = 0
    """The youngest closing of the gate that this proxy has seen."""
    gate_until: AwareDatetime | None = None
    """Until when this proxy begins no forward there, whatever else it hears; None: it knows of no closed gate."""


class MessageBusy(Fact):
    """A message that must be kept. Confirmed by the broker before its caller is told 202."""

    queue_id: UUID
    caller_id: str
    caller_hash: Digest
    key_hash: Digest
    body_hash: Digest
    explicit_key: bool = False
    """The caller sent an Idempotency-Key: it outlives the item."""
    reason: str
    priority: Priority = Priority.TASK
    method: str
    body: bytes
    context_id: str | None = None
    not_before: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    hops: Count = 0
    id_is_new: bool = False
    """The proxy made the id for this very message: it need not be looked for."""
    retry_of: UUID | None = None
    """The item that ended badly and that this one repeats."""
    beat: ProxyBeat | None = None
    """This proxy's own forwards in the workspace, applied before the claim (3-bus, topology)."""
    reply_to: str | None = None
    """Queue that ItemKept goes to."""


class WorkspaceRegistered(Fact):
    """An agent (or another life of it) is reachable."""

    incarnation: Count
    url: str
    max_concurrent_tasks: Annotated[int, Field(ge=1)] = 1
    heartbeat_interval_s: Annotated[float, Field(gt=0)] = 30.0
    capabilities: Sequence[str] = ()
    settings: dict[str, str | int | float | bool | None] = {}
    agent_authorization: str | None = None
    paused: bool = False
    desired: Literal["running", "stopped"] = "running"
    runtime: dict[str, str] = {}


class WorkspaceChanged(WorkspaceRegistered):
    """The registry's newest word about a workspace. Both are whole: whichever has the higher rev says it all."""


class WorkspaceRemoved(Fact):
    """Nobody will answer here again."""


class Acknowledged(Part):
    """A directive that the agent has taken, and what it says of it."""

    directive_id: UUID
    result: str = ""


class WorkspaceHeartbeat(Fact):
    """What an agent said of itself. `rev` is the receive time in µs; an older incarnation is ignored."""

    incarnation: Count
    active_tasks: Count
    max_concurrent_tasks: Annotated[int, Field(ge=1)] | None = None
    cadence_s: Annotated[float, Field(gt=0)] = 30.0
    progress: float | None = None
    uptime_s: float | None = None
    runtime_state: str | None = None
    acknowledged: tuple[Acknowledged, ...] = ()


class EvidenceKind(StrEnum):
    ANSWERED = "answered"
    BUSY = "busy"
    REFUSED = "refused"
    RESET = "reset"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server_error"


class WorkspaceEvidence(Fact):
    """One observation about an agent's life, made by whoever talked to it."""

    incarnation: Count
    kind: EvidenceKind


# ── queue ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ItemKept(Fact):
    """The row is written. Told to the proxy that promised it."""

    queue_id: UUID
    depth: Count
    position: Count
    duplicate_of: UUID | None = None
    conflict: bool = False


class ItemStatus(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELED = "canceled"
    SUPERSEDED = "superseded"


class ItemChanged(Fact):
    queue_id: UUID
    status: ItemStatus
    reason: str | None = None
    delivery_no: Count = 0
    position: Count | None = None
    answer: bytes | None = None
    """Up to 64 KiB; a larger one is asked for."""
    answer_bytes: Count | None = None
    superseded_by: UUID | None = None


class DeliveryEvent(Fact):
    """One event of an agent's stream. `seq` counts within the item; a gap is read from `a2a_events`."""

    queue_id: UUID
    delivery_no: Count
    seq: Count
    event: bytes


class Backlog(Part):
    """What waits and runs in a workspace, at revision `rev` of it."""

    waiting: Count
    in_use: Count
    gate_generation: Count = 0
    """How often the gate has been closed."""
    gate_until: AwareDatetime | None = None
    """No session may begin before; None: the gate is open."""
    not_before: AwareDatetime | None = None
    running: tuple[Running, ...] = ()
    critical_waiting_since: AwareDatetime | None = None
    waiting_by_priority: dict[Priority, Count] = {}
    oldest_at: AwareDatetime | None = None
    """Since when the first in line waits."""
    turn_s: float | None = None
    """How long a delivery takes here: the median of the last 20 that were answered."""


class WorkspaceBacklog(Backlog, Fact):
    """The backlog of one workspace has changed."""


class NamedBacklog(Backlog):
    """One workspace of a snapshot, with what only the scheduler asks for: all that its agent is known to do."""

    workspace_id: WorkspaceId
    rev: Count
    incarnation: Count = 0
    forwards: tuple[Running, ...] = ()
    """Live forwards of the proxies that live."""
    foreign: Count = 0
    """Tasks that the agent has in hand and that neither deliveries nor live forwards explain."""
    beat_at: AwareDatetime | None = None
    """When the newest heartbeat came in."""


FLEET = "-"
"""The `workspace_id` of a fact that speaks of all of them."""


class BacklogSnapshot(Fact):
    """Part `part` (from 0) of `parts` of all backlogs. Where no part names a workspace nothing waits, runs or is shut.

    `occurred_at` is when it was read; `rev` counts the snapshots of this replica of queue.
    """

    workspace_id: WorkspaceId = FLEET
    snapshot_id: UUID
    part: Count
    parts: Annotated[int, Field(ge=1)]
    backlogs: Sequence[NamedBacklog] = ()


class QueueQuery(Fact):
    """A question or a command for the queue service; answered with QueryAnswered to `reply_to`.

    A command (`cancel`, `retry`, `promote`, `cancel_many`, `replay`) answers after its commit, may be sent again, and
    is refused after `expires_at`. `cancel_many` ends what waits in a workspace and matches; `dead_letters` lists what
    was set aside, `replay` publishes one of it again. `snapshot` asks for a BacklogSnapshot at once; one serves all who
    asked meanwhile.
    """

    query_id: UUID
    verb: Literal[
        "item", "list", "cancel", "answer", "known", "snapshot",
        "retry", "promote", "cancel_many", "dead_letters", "replay",
    ]  # fmt: skip
    queue_id: UUID | None = None
    older_than_s: Annotated[float, Field(ge=0)] | None = None
    """With `cancel_many`: only what has waited for longer."""
    count_only: bool = False
    """With `cancel_many`: say how many there are, and end none."""
    dead_letter: Digest | None = None
    """With `replay`: which."""
    key_hash: Digest | None = None
    """With `known`: an explicit key, which may stand for an item as the id may."""
    caller_hash: Digest | None = None
    """Only items of this caller; None: an operator, who sees all."""
    status: str | None = None
    priority: Priority | None = None
    cursor: str | None = None
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    expires_at: AwareDatetime
    reply_to: str


class QueryAnswered(Fact):
    """The answer: `status` as HTTP has it (200, 404, 409), `body` a JSON object as 2-http shapes it."""

    query_id: UUID
    status: int
    body: bytes


# ── scheduler ────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    """End the container that this session runs in; of no effect once it is another life's, or after `expires_at`."""

    session_id: str
    incarnation: Count
    order_id: UUID
    expires_at: AwareDatetime


class KillDone(Fact):
    session_id: str
    incarnation: Count
    order_id: UUID
    result: Literal["applied", "stale", "already_ended", "not_killable"]


# ── liveness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class WorkspaceStatus(Fact):
    incarnation: Count
    status: Literal["online", "busy", "suspect", "offline", "restarting", "wedged", "paused", "gave_up", "removed"]
    reason: str


class LivenessQuery(Fact):
    """A question or a command about an agent's life; answered with QueryAnswered to `reply_to`.

    A command (`restart`, `resume`) answers after its commit, may be sent again, and is refused after `expires_at`.
    `show` tells what is believed and why, `history` the evidence and the restarts, newest first.
    """

    query_id: UUID
    verb: Literal["show", "history", "restart", "resume"]
    note: str = ""
    by: str
    """Who says it, as it is shown."""
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    expires_at: AwareDatetime
    reply_to: str
