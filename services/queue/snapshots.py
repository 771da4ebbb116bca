"""All backlogs at one moment, for whoever has missed a change of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from uuid_utils.compat import uuid7

from services.queue import decide, store
from services.queue.backlogs import backlogs, forwards, moment
from services.queue.decide import Workspace
from services.queue.metrics import DEPTH, GATES_CLOSED, OLDEST
from shared.database import Pool
from shared.facts import BacklogSnapshot, NamedBacklog, Priority

_PART = 200


async def read_snapshot(pool: Pool, *, rev: int) -> list[BacklogSnapshot]:
    """Every backlog at one moment, in parts, at least one; sets the gauges of what waits."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        now = await store.begun_at(connection)
        active = await store.read_active(connection)
        workspaces = {each.workspace_id: each for each in active if decide.is_named(each, now)}
        found = await backlogs(connection, workspaces, now)
        oldest = await store.oldest(
            connection, [(name, lane) for name in workspaces for lane in (decide.CRITICAL_LANE, decide.REST_LANE)]
        )
    for (name, _), at in oldest.items():
        found[name]["oldest_at"] = min(at, found[name].get("oldest_at", at))
    _measure(workspaces.values(), oldest, now)
    named = [_named(workspaces[name], backlog, now) for name, backlog in found.items()]
    parts = [named[at : at + _PART] for at in range(0, len(named), _PART)] or [[]]
    snapshot_id = uuid7()
    return [
        BacklogSnapshot(
            rev=rev, occurred_at=moment(now), snapshot_id=snapshot_id, part=number, parts=len(parts), backlogs=part
        )
        for number, part in enumerate(parts)
    ]


def _named(workspace: Workspace, backlog: Mapping[str, Any], now: float) -> NamedBacklog:
    return NamedBacklog(
        workspace_id=workspace.workspace_id,
        rev=workspace.rev,
        incarnation=workspace.incarnation,
        forwards=forwards(decide.live_forwards(workspace, now)),
        foreign=decide.foreign(workspace, now),
        beat_at=moment(workspace.beat_at) if workspace.beat_at is not None else None,
        **backlog,
    )


def _measure(workspaces: Iterable[Workspace], oldest: Mapping[tuple[str, int], datetime], now: float) -> None:
    """Set the gauges of what waits in all workspaces."""
    depth = Counter[Priority]()
    closed = 0
    for workspace in workspaces:
        depth.update(decide.by_priority(workspace))
        closed += decide.gate_until(workspace, now) is not None
    GATES_CLOSED.set(closed)
    for priority in Priority:
        DEPTH.labels(priority.value).set(depth[priority])
    for lane, word in ((decide.CRITICAL_LANE, "critical"), (decide.REST_LANE, "rest")):
        ages = [now - at.timestamp() for (_, each), at in oldest.items() if each == lane]
        OLDEST.labels(word).set(max(ages, default=0.0))
