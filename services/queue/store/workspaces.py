"""Rows of workspaces: locked, read, saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import asyncpg

from services.queue.decide import Forwards, Gate, Workspace, is_engaged
from services.queue.store.statements import SQL, columns
from shared.database import Connection


async def clock(connection: Connection, now: datetime | None) -> float:
    return float(await connection.fetchval(SQL["read_clock"], now))


async def begun_at(connection: Connection) -> float:
    """When this transaction began, by the database's clock: all that was committed before it is seen in it."""
    return float(await connection.fetchval(SQL["read_begun"]))


class Locked(dict[str, Workspace]):
    """Workspaces that the caller's transaction holds. `now` is the database's time once all of them were locked."""

    now: float = 0.0


async def lock(connection: Connection, workspace_ids: Iterable[str], now: datetime | None = None) -> Locked:
    """Lock the rows in key order; make those that are missing."""
    wanted = sorted(set(workspace_ids))
    rows = await connection.fetch(SQL["lock_workspaces"], wanted, now)
    if len(rows) < len(wanted):
        await connection.execute(SQL["ensure_workspaces"], wanted)
        rows = await connection.fetch(SQL["lock_workspaces"], wanted, now)
    locked = Locked((row["workspace_id"], _workspace(row)) for row in rows)
    locked.now = max((row["now_epoch"] for row in rows), default=0.0)
    return locked


async def set_bounds(
    connection: Connection, *, ceiling_s: float, checkpoint_grace_s: float, stop_grace_s: float
) -> None:
    """Take over what bounds a turn where a workspace says nothing itself."""
    await connection.execute(SQL["set_bounds"], ceiling_s, checkpoint_grace_s, stop_grace_s)


async def read(connection: Connection, workspace_ids: Iterable[str]) -> dict[str, Workspace]:
    rows = await connection.fetch(SQL["read_workspaces"], list(workspace_ids))
    return {row["workspace_id"]: _workspace(row) for row in rows}


async def read_active(connection: Connection) -> list[Workspace]:
    return [_workspace(row) for row in await connection.fetch(SQL["active_workspaces"])]


async def save(connection: Connection, before: Mapping[str, Workspace], after: Mapping[str, Workspace]) -> None:
    """Write the rows that changed; `before` is what `lock` gave. Once in a transaction: the rows have moved then."""
    changed = [_columns_of(workspace) for name, workspace in after.items() if workspace != before[name]]
    if not changed:
        return
    result = await connection.execute(SQL["save_workspaces"], json.dumps(changed))
    assert result == f"UPDATE {len(changed)}", "a row that we hold was not where we locked it"


async def save_counters(
    connection: Connection, before: Mapping[str, Workspace], after: Mapping[str, Workspace]
) -> None:
    """As `save`, where nothing has changed but what deliveries and kept messages change."""
    changed = [workspace for name, workspace in after.items() if workspace != before[name]]
    if not changed:
        return
    rows = (
        (
            each.version, each.workspace_id, each.waiting, each.waiting_critical, each.waiting_info, each.running,
            each.started_since, each.ended_since, _list(moment for pair in each.recent_ended for moment in pair),
            each.not_before, each.busy_streak, each.rev, *each.floors, each.served_critical, _list(each.turns_s),
        )
        for each in changed
    )  # fmt: skip
    result = await connection.execute(SQL["save_counters"], *columns(rows))
    assert result == f"UPDATE {len(changed)}", "a row that we hold was not where we locked it"


def _list(numbers: Iterable[float]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def _columns_of(workspace: Workspace) -> dict[str, Any]:
    return {
        **{name: getattr(workspace, name) for name in Workspace.__slots__},
        "recent_ended": [moment for each in workspace.recent_ended for moment in each],
        "forwards": {
            proxy_id: {
                "rev": each.rev, "at": each.at, "running": each.running, "ended": each.ended,
                "generation": each.generation, "gate_until": each.gate_until,
            }
            for proxy_id, each in workspace.forwards.items()
        },
        "gates": {name: [gate.rev, gate.until, gate.left] for name, gate in workspace.gates.items()},
        "engaged": is_engaged(workspace),
        "version": "({},{})".format(*(workspace.version or (0, 0))),
    }  # fmt: skip


def _workspace(row: asyncpg.Record) -> Workspace:
    computed = {
        "forwards", "beat_at", "not_before", "paused_at", "floors", "turns_s", "gates", "unsaid", "life_at", "dead_at",
    }  # fmt: skip
    values = {name: row[name] for name in Workspace.__slots__ if name not in computed}
    return Workspace(
        **{
            **values,
            "beat_at": row["beat_epoch"],
            "not_before": row["not_before_epoch"],
            "recent_ended": tuple(zip(row["recent_ended"][::2], row["recent_ended"][1::2], strict=False)),
            "paused_at": row["paused_epoch"],
            "life_at": row["life_epoch"],
            "dead_at": row["dead_epoch"],
            "unsaid": tuple(row["unsaid"]),
            "floors": tuple(row["floors"]),
            "turns_s": tuple(row["turns_s"]),
            "forwards": {name: _forwards(value) for name, value in json.loads(row["forwards"]).items()},
            "gates": {name: Gate(*value) for name, value in json.loads(row["gates"]).items()},
        }
    )


def _forwards(value: Mapping[str, Any]) -> Forwards:
    return Forwards(
        rev=value["rev"],
        at=value["at"],
        running=tuple((session, key, started) for session, key, started in value["running"]),
        ended=tuple((started, ended, counts) for started, ended, counts in value["ended"]),
        generation=value.get("generation", 0),
        gate_until=value.get("gate_until"),
    )


async def oldest(
    connection: Connection, lanes: Iterable[tuple[str, int]], *, may_go_at: datetime | None = None
) -> dict[tuple[str, int], datetime]:
    """Since when the first of each of these lanes waits, or the first whose own clock lets it go at that moment."""
    wanted = list(lanes)
    rows = await connection.fetch(SQL["oldest_items"], *columns(wanted), may_go_at) if wanted else []
    return {(row["workspace_id"], row["lane"]): row["enqueued_at"] for row in rows}


async def shift_clocks(connection: Connection, resumed: Mapping[str, float], now: float) -> None:
    """Give what waits in these workspaces the time back that it stood still since these moments."""
    if resumed:
        wanted = columns((name, since, now) for name, since in sorted(resumed.items()))
        await connection.execute(SQL["shift_clocks"], *wanted)
