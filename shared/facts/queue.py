"""What queue tells, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field

from shared.facts.fact import Count, Digest, Fact, Part, Priority, WorkspaceId
from shared.facts.session import Running


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
    waiting_by_priority: dict[Priority, Count] = {}  # noqa: RUF012 - pydantic copies it
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
