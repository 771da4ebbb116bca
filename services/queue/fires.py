"""Ticks in a turn: the message that one becomes when it is claimed, and what the scheduler is told of its fires.

A tick waits without a body. It gets one at each claim, from what its schedule says then; a turn that claimed none, or
sent none back, asks nothing of all this.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from services.queue import decide, store
from services.queue.decide import Item, Schedule, Tick, Workspace
from services.queue.metrics import ENDED, TICKS
from services.queue.store import PRIORITY_OF, Ended, Fire, Prompt
from shared.database import Connection
from shared.facts import Fact, ItemChanged, ItemStatus, TickSettled
from shared.results import EXTENSION


async def with_prompts(connection: Connection, items: Sequence[Item]) -> list[Item]:
    """The items that were claimed, each tick of them with its message."""
    ticks = [item.queue_id for item in items if not item.body]
    if not ticks:
        return list(items)
    prompts = await store.read_prompts(connection, ticks)
    assert len(prompts) == len(ticks), "a tick was claimed before its prompt had come"
    bodies = {queue_id: message(prompt) for queue_id, prompt in prompts.items()}
    await store.save_bodies(connection, bodies)
    return [
        item if item.body else _with_prompt(item, bodies[item.queue_id], prompts[item.queue_id].tick.ceiling_s)
        for item in items
    ]


def _with_prompt(item: Item, body: bytes, ceiling_s: float | None) -> Item:
    return replace(item, body=body, ceiling_s=item.ceiling_s if ceiling_s is None else ceiling_s)


def message(prompt: Prompt) -> bytes:
    """The `message/send` that a tick is (2-http). The same tick is the same message id, however often it is sent."""
    tick = prompt.tick
    said = {
        "kind": "tick",
        "schedule_id": str(tick.schedule_id),
        "fire_at": _iso(tick.fire_at),
        "last_fire_at": _iso(tick.last_fire_at),
        "merged_count": tick.merged_count,
        "first_missed_at": _iso(tick.first_missed_at) if tick.first_missed_at else None,
        "rev": prompt.rev,
    }
    params = {
        "message": {
            "kind": "message",
            "role": "user",
            "messageId": str(tick.queue_id),
            "contextId": tick.context_id,
            "parts": [{"kind": "text", "text": prompt.text}],
            "metadata": {EXTENSION: said},
        }
    }
    request = {"jsonrpc": "2.0", "id": str(tick.queue_id), "method": "message/send", "params": params}
    return json.dumps(request).encode()


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def settled(
    workspace_id: str,
    queue_id: UUID | None,
    fire: Fire,
    status: ItemStatus,
    reason: str | None,
    *,
    began_at: float | None = None,
    merged_into: datetime | None = None,
) -> TickSettled:
    """What a fire came to, whose item has ended so."""
    outcome, why = decide.outcome(status, reason)
    TICKS.labels(outcome).inc()
    return TickSettled(
        workspace_id=workspace_id,
        rev=fire.rev,
        schedule_id=fire.schedule_id,
        fire_at=fire.fire_at,
        outcome=outcome,
        reason=why,
        queue_id=queue_id,
        merged_into=merged_into,
        began_at=datetime.fromtimestamp(began_at, UTC) if began_at is not None else None,
    )


@dataclass(frozen=True, slots=True)
class Instead:
    """What else is wanted of an item than that it goes back."""

    canceled_as: str | None = None
    stopped_for: str | None = None


NOTHING = Instead()


async def instead(connection: Connection, queue_ids: Sequence[UUID]) -> dict[UUID, Instead]:
    """Of items that have no real answer: it was told to stop, somebody canceled it, its schedule runs no more."""
    return {row["queue_id"]: _instead(row) for row in await store.ending_instead(connection, queue_ids)}


def _instead(row: asyncpg.Record) -> Instead:
    if row["stop_reason"] is not None:
        return Instead(stopped_for=row["stop_reason"])
    if row["canceled"]:
        return Instead("canceled")
    if row["agent_task_id"] is not None:  # it is not sent again, but followed
        return NOTHING
    schedule = Schedule(row["schedule_id"], row["rev"], paused=row["paused"], deleted=row["deleted"])
    return Instead(decide.withdrawn(schedule, row["rev_needed"]))


@dataclass(slots=True)
class Absorbed:
    """Ticks that another stands for from now on."""

    workspaces: dict[str, Workspace]
    facts: list[Fact] = field(default_factory=list)


async def absorb(connection: Connection, returned: Iterable[Ended], workspaces: Mapping[str, Workspace]) -> Absorbed:
    """Let a tick that has gone back stand for the newer one that waits of its schedule, which ends."""
    done = Absorbed(dict(workspaces))
    back = {(row.workspace_id, row.absorbs) for row in returned if row.absorbs is not None}
    if not back:
        return done
    waiting: dict[UUID, list[Tick]] = defaultdict(list)
    for tick in await store.find_ticks(connection, sorted(back)):
        if tick.waits and tick.coalesces:
            waiting[tick.schedule_id].append(tick)
    merged: list[Tick] = []
    ending: list[tuple[Tick, Tick]] = []
    for first, *others in waiting.values():
        if others:
            ending += [(each, first) for each in others]
            for each in others:
                first = decide.merged(first, each)  # noqa: PLW2901 - it grows
            merged.append(first)
    await store.merge_ticks(connection, merged, workspaces)
    by = {tick.queue_id: into for tick, into in ending}
    for row in await store.end(
        connection, [(each, "superseded", "absorbed", by[each].queue_id) for each in sorted(by)]
    ):
        name, into = row["workspace_id"], by[row["queue_id"]]
        done.workspaces[name] = decide.leave(done.workspaces[name], PRIORITY_OF[row["priority"]])
        ENDED.labels("superseded").inc()
        done.facts.append(
            ItemChanged(
                workspace_id=name, rev=row["rev"], queue_id=row["queue_id"], status=ItemStatus.SUPERSEDED,
                reason="absorbed", superseded_by=into.queue_id,
            )
        )  # fmt: skip
        fire = store.fire_of(row)
        assert fire is not None, "only ticks were looked for"
        done.facts.append(settled(name, into.queue_id, fire, ItemStatus.SUPERSEDED, None, merged_into=into.fire_at))
    return done
