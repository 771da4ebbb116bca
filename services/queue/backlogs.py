"""What waits and runs in workspaces, as proxies and the scheduler are told."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from services.queue import decide, store
from services.queue.decide import Workspace
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
    oldest = await store.oldest(connection, critical, may_go_at=datetime.fromtimestamp(now, UTC))
    running: dict[str, list[Running]] = {name: [] for name in workspaces}
    for row in await store.running(connection, workspaces.values()):
        session = f"{row['queue_id']}:{row['delivery_no']}"
        running[row["workspace_id"]].append(
            Running(session_id=session, key_hash=row["key_hash"], started_at=row["dispatched_at"])
        )
    return {
        name: _backlog(workspace, running[name], now)
        | {"critical_waiting_since": oldest.get((name, decide.CRITICAL_LANE))}
        for name, workspace in workspaces.items()
    }


def _backlog(workspace: Workspace, running: list[Running], now: float) -> dict[str, Any]:
    shut = workspace.not_before is not None and workspace.not_before > now
    return {
        "waiting": workspace.waiting,
        "in_use": decide.taken(workspace, now),
        "not_before": workspace.not_before if shut else None,
        "running": running,
        "waiting_by_priority": decide.by_priority(workspace),
        "turn_s": decide.turn_s(workspace),
    }
