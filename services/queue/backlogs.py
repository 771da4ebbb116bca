"""What waits and runs in workspaces, as proxies and the scheduler are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.queue import decide, store
from services.queue.decide import Forwards, Workspace
from shared.database import Connection
from shared.facts import Running, WorkspaceBacklog


async def read_backlogs(
    connection: Connection, workspaces: Mapping[str, Workspace], now: float
) -> list[WorkspaceBacklog]:
    """Say of each workspace what waits and runs."""
    return [
        WorkspaceBacklog(workspace_id=name, rev=workspaces[name].rev, **backlog)
        for name, backlog in (await backlogs(connection, workspaces, now)).items()
    ]


async def backlogs(
    connection: Connection, workspaces: Mapping[str, Workspace], now: float
) -> dict[str, dict[str, Any]]:
    """The members of a `Backlog` for each workspace."""
    if not workspaces:
        return {}  # each question costs its round trip while rows are locked
    critical = [(name, decide.CRITICAL_LANE) for name, each in workspaces.items() if each.waiting_critical]
    # One that is to be delivered tomorrow shall pre-empt nobody today.
    oldest = await store.oldest(connection, critical, may_go_at=moment(now))
    running: dict[str, list[Running]] = {name: [] for name in workspaces}
    for row in await store.running(connection, workspaces.values()):
        running[row["workspace_id"]].append(delivery(row))
    return {
        name: _backlog(workspace, running[name], now)
        | {"critical_waiting_since": oldest.get((name, decide.CRITICAL_LANE))}
        for name, workspace in workspaces.items()
    }


def delivery(row: asyncpg.Record) -> Running:
    """One of `store.running`."""
    return Running(
        session_id=f"{row['queue_id']}:{row['delivery_no']}",
        key_hash=row["key_hash"],
        started_at=row["started_at"],
        ceiling_s=row["ceiling_s"],
        schedule_id=row["schedule_id"],
    )


def forwards(said: Iterable[Forwards]) -> list[Running]:
    """The live forwards that these proxies have told of."""
    return [
        Running(session_id=session, key_hash=bytes.fromhex(key) or None, started_at=moment(began))
        for each in said
        for session, key, began in each.running
    ]


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _backlog(workspace: Workspace, running: list[Running], now: float) -> dict[str, Any]:
    shut = workspace.not_before is not None and workspace.not_before > now
    until = decide.gate_until(workspace, now)
    return {
        "waiting": workspace.waiting,
        "in_use": decide.taken(workspace, now),
        "gate_generation": workspace.gate_generation,
        "gate_until": moment(until) if until is not None else None,
        "not_before": workspace.not_before if shut else None,
        "running": running,
        "waiting_by_priority": decide.by_priority(workspace),
        "turn_s": decide.turn_s(workspace),
    }
