"""The contracts of the bus, and only they: what services tell each other.

The class name is the routing key (`WorkspaceHeartbeat` travels as `workspace.heartbeat`). A fact states what happened,
with the `rev` of the thing it speaks about; a reader applies only a higher rev, so that nothing depends on order
between batches, queues or replicas. Readers ignore unknown fields; a change adds an optional field; a break is a new
name. `tests/unit/facts.schema.json` is the snapshot that a change shows up in.

A message on the bus is a batch of facts of one type: `shared/batches.py`.
"""

from shared.facts.fact import Count, Digest, Fact, FactT, Part, Priority, WorkspaceId, routing_key
from shared.facts.liveness import LivenessQuery, WorkspaceStatus
from shared.facts.proxy import (
    Acknowledged,
    EvidenceKind,
    MessageBusy,
    ProxyBeat,
    WorkspaceChanged,
    WorkspaceEvidence,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from shared.facts.queue import (
    FLEET,
    Backlog,
    BacklogSnapshot,
    DeliveryEvent,
    ItemChanged,
    ItemKept,
    ItemStatus,
    NamedBacklog,
    QueryAnswered,
    QueueQuery,
    WorkspaceBacklog,
)
from shared.facts.scheduler import (
    DirectiveKind,
    GateClosed,
    KillDone,
    ScheduleApplied,
    ScheduleChanged,
    ScheduleQuery,
    ScheduleTick,
    SessionDirective,
    SessionGate,
    SessionKill,
    SessionStop,
    TickSettled,
)
from shared.facts.session import Ended, Running

__all__ = [
    "FLEET",
    "Acknowledged",
    "Backlog",
    "BacklogSnapshot",
    "Count",
    "DeliveryEvent",
    "Digest",
    "DirectiveKind",
    "Ended",
    "EvidenceKind",
    "Fact",
    "FactT",
    "GateClosed",
    "ItemChanged",
    "ItemKept",
    "ItemStatus",
    "KillDone",
    "LivenessQuery",
    "MessageBusy",
    "NamedBacklog",
    "Part",
    "Priority",
    "ProxyBeat",
    "QueryAnswered",
    "QueueQuery",
    "Running",
    "ScheduleApplied",
    "ScheduleChanged",
    "ScheduleQuery",
    "ScheduleTick",
    "SessionDirective",
    "SessionGate",
    "SessionKill",
    "SessionStop",
    "TickSettled",
    "WorkspaceBacklog",
    "WorkspaceChanged",
    "WorkspaceEvidence",
    "WorkspaceHeartbeat",
    "WorkspaceId",
    "WorkspaceRegistered",
    "WorkspaceRemoved",
    "WorkspaceStatus",
    "routing_key",
]
