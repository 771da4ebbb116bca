"""What proxy tells."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field

from shared.facts.fact import Count, Digest, Fact, Part, Priority
from shared.facts.session import Ended, Running


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
    settings: dict[str, str | int | float | bool | None] = {}  # noqa: RUF012 - pydantic copies it
    agent_authorization: str | None = None
    paused: bool = False
    desired: Literal["running", "stopped"] = "running"
    runtime: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it


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
