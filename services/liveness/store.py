"""The only SQL of liveness: agents, evidence, restarts, orders, in and out as values, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from uuid import UUID

import asyncpg
import orjson

from services.liveness.decide.judge import Decision
from services.liveness.decide.life import Life, Status
from services.liveness.decide.seen import Observation
from shared import outbox
from shared.database import Connection, load_queries
from shared.facts import KillDone, SessionKill, WorkspaceStatus

SQL = load_queries(Path(__file__).parent / "queries.sql")
_COLUMNS = tuple(each.name for each in fields(Life))


@dataclass(frozen=True, slots=True)
class Restart:
    """A row of restarts, as far as its work goes."""

    restart_id: UUID
    workspace_id: str
    incarnation: int
    fence: int
    reason: str
    container_id: str | None
    driver: str
    phase: str
    tries: int
    began_at: datetime | None


def life_of(row: asyncpg.Record) -> Life:
    values = {name: row[name] for name in _COLUMNS}
    return Life(**{**values, "runtime": json.loads(row["runtime"]), "status": Status(row["status"])})


def restart_of(row: asyncpg.Record) -> Restart:
    return Restart(**{each.name: row[each.name] for each in fields(Restart)})


async def clock(connection: Connection, now: datetime | None = None) -> datetime:
    moment: datetime = await connection.fetchval(SQL["read_clock"], now)
    return moment


async def lock(connection: Connection, workspace_ids: Iterable[str]) -> dict[str, Life]:
    """Lock agents in key order; those that are not there are left out."""
    rows = await connection.fetch(SQL["lock_agents"], sorted(set(workspace_ids)))
    return {row["workspace_id"]: life_of(row) for row in rows}


async def save(connection: Connection, before: Mapping[str, Life], after: Sequence[Life], now: datetime) -> None:
    """Write agents that the caller holds; a changed belief gets its number and is told.

    Raises:
        asyncpg.SerializationError: one that was not there is there now; the transaction is to be repeated.
    """
    numbered = [_numbered(before.get(life.workspace_id), life, now) for life in after]
    changed = [life for life in numbered if life != before.get(life.workspace_id)]
    if not changed:
        return
    ordered = sorted(changed, key=lambda life: life.workspace_id)
    written = await connection.fetch(SQL["save_agents"], orjson.dumps(ordered).decode(), list(before))
    if len(written) < len(ordered):
        # Its registration and a change of it come by two queues, and nobody can lock a row that is not there yet.
        raise asyncpg.SerializationError("somebody else was the first to write down an agent")
    told = [life for life in ordered if life.status_rev > _status_rev(before.get(life.workspace_id))]
    if told:
        await outbox.add(connection, [status_of(life) for life in told])


def status_of(life: Life) -> WorkspaceStatus:
    return WorkspaceStatus(
        workspace_id=life.workspace_id, rev=life.status_rev, incarnation=life.incarnation, status=life.status.value,
        reason=life.reason,
    )  # fmt: skip


def _status_rev(life: Life | None) -> int:
    return life.status_rev if life is not None else 0


def _numbered(before: Life | None, life: Life, now: datetime) -> Life:
    was = (Status.ONLINE, "") if before is None else (before.status, before.reason)
    if (life.status, life.reason) == was:
        return life if life.status_at is not None else replace(life, status_at=now)
    return replace(life, status_rev=_status_rev(before) + 1, status_at=now)


def checked_at(life: Life, moment: datetime) -> Life:
    """The same, to be looked at then."""
    return replace(life, next_check_at=moment if life.driver is not None and not life.removed else None)


async def record(
    connection: Connection, life: Life, seen: Observation, decision: Decision, *, source: str, now: datetime
) -> None:
    """Keep one observation with its verdict and sentence."""
    await connection.execute(
        SQL["insert_evidence"], life.workspace_id, now, life.incarnation, source, seen.seen.value, seen.container_id,
        decision.verdict.value, decision.reason.value, decision.sentence,
    )  # fmt: skip


async def find_open(connection: Connection, workspace_id: str) -> Restart | None:
    row = await connection.fetchrow(SQL["find_open"], workspace_id)
    return restart_of(row) if row is not None else None


async def insert_order(connection: Connection, order: SessionKill, now: datetime) -> bool:
    """Whether the order was new."""
    new = await connection.fetchval(
        SQL["insert_order"], order.order_id, order.workspace_id, order.session_id, order.incarnation, order.rev,
        order.expires_at, now,
    )  # fmt: skip
    return new is not None


async def answer_order(connection: Connection, order_id: UUID, result: str, now: datetime) -> bool:
    """Answer an order, once; an expired one is only closed. Returns whether it was open."""
    row = await connection.fetchrow(SQL["answer_order"], order_id, result, now)
    if row is None:
        return False
    if result != "expired":
        done = KillDone.model_validate(
            {
                "workspace_id": row["workspace_id"],
                "rev": row["rev"],
                "session_id": row["session_id"],
                "incarnation": row["incarnation"],
                "order_id": order_id,
                "result": result,
            }
        )
        await outbox.add(connection, [done])
    return True
