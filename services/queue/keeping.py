"""Keeping messages: what of a batch is new, and what was known before under whichever id or key (I2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from services.queue import decide, store
from services.queue.decide import Workspace
from services.queue.metrics import ENDED, ENQUEUED
from services.queue.store import Known, key_of
from shared.database import Connection
from shared.facts import ItemChanged, ItemKept, ItemStatus, MessageBusy


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of a batch of messages."""

    new: set[UUID]
    duplicates: dict[UUID, UUID]
    """Proposed id → the id under which the same message is kept already."""
    conflicts: set[UUID]
    ended: list[ItemChanged]


def parts_of(facts: Sequence[MessageBusy]) -> list[list[MessageBusy]]:
    """Split a batch so that no id stands twice in a part: who brings one back meets what the part before has kept.

    In the order in which the messages were read; nearly always it is one part.
    """
    parts: list[dict[UUID, MessageBusy]] = []
    for fact in sorted(facts, key=lambda fact: (fact.queue_id, fact.fact_id)):
        part = next((part for part in parts if fact.queue_id not in part), None)
        if part is None:
            parts.append(part := {})
        part[fact.queue_id] = fact
    return [list(part.values()) for part in parts]


async def keep(
    connection: Connection, facts: Sequence[MessageBusy], workspaces: Mapping[str, Workspace], keep_s: float
) -> Kept:
    """Insert what is new; find the item of what is not. No id stands twice; the caller holds the workspaces' locks."""
    asked = [fact.queue_id for fact in facts if not fact.id_is_new]
    same_id = await store.find_ids(connection, asked) if asked else {}
    known: dict[UUID, Known] = {fact.queue_id: same_id[fact.queue_id] for fact in facts if fact.queue_id in same_id}
    explicit = [fact for fact in facts if fact.explicit_key and fact.queue_id not in known]
    held = await store.reserve_keys(connection, explicit, keep_s)
    known |= {fact.queue_id: held[key_of(fact)] for fact in explicit if held[key_of(fact)].queue_id != fact.queue_id}
    fresh = [fact for fact in facts if fact.queue_id not in known]
    new = await store.insert(connection, fresh, workspaces)
    met = [fact for fact in fresh if fact.queue_id not in new]
    active = await store.find_active(connection, met)
    known |= {fact.queue_id: active[key_of(fact)] for fact in met}
    return await _end_proposed(connection, facts, known, new)


async def _end_proposed(
    connection: Connection, facts: Sequence[MessageBusy], known: Mapping[UUID, Known], new: set[UUID]
) -> Kept:
    duplicates: dict[UUID, UUID] = {}
    conflicts: set[UUID] = set()
    ended: list[tuple[MessageBusy, str, str, UUID | None]] = []
    for fact in facts:
        first = known.get(fact.queue_id)
        if first is None:
            ENQUEUED.labels("new").inc()
        elif (first.body_hash, first.caller_hash, first.workspace_id) != (
            fact.body_hash,
            fact.caller_hash,
            fact.workspace_id,
        ):
            ENQUEUED.labels("conflict").inc()
            conflicts.add(fact.queue_id)
            if first.queue_id != fact.queue_id:
                ended.append((fact, "failed", "key_conflict", None))
        elif first.queue_id == fact.queue_id:
            ENQUEUED.labels("repeated").inc()
            duplicates[fact.queue_id] = first.queue_id
        else:
            ENQUEUED.labels("duplicate").inc()
            duplicates[fact.queue_id] = first.queue_id
            ended.append((fact, "superseded", "duplicate", first.queue_id))
    await store.insert_ended(connection, ended)
    for _, status, _, _ in ended:
        ENDED.labels(status).inc()
    changes = [
        ItemChanged(
            workspace_id=fact.workspace_id,
            rev=1,
            queue_id=fact.queue_id,
            status=ItemStatus(status),
            reason=reason,
            superseded_by=by,
        )
        for fact, status, reason, by in ended
    ]
    return Kept(new, duplicates, conflicts, changes)


def told_of(fact: MessageBusy, kept: Kept, workspace: Workspace) -> ItemKept:
    return ItemKept(
        workspace_id=fact.workspace_id,
        rev=1,
        queue_id=fact.queue_id,
        depth=workspace.waiting,
        position=decide.place_told(workspace, fact.priority),
        duplicate_of=kept.duplicates.get(fact.queue_id),
        conflict=fact.queue_id in kept.conflicts,
    )
