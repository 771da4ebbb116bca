"""The only SQL of queue: one method per step, rows in and out as frozen values.

Every method works in the caller's transaction, so that a whole turn (finish, requeue, claim) is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from services.queue import decide
from services.queue.decide import Finish, Floors, Forwards, Head, Item, Place, Requeue, Workspace
from shared.database import Connection, load_queries
from shared.facts import MessageBusy, Priority

SQL = load_queries(Path(__file__).parent / "queries.sql")
PRIORITIES = {Priority.CRITICAL: 100, Priority.TASK: 50, Priority.INFO: 10}
PRIORITY_OF = {number: priority for priority, number in PRIORITIES.items()}


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that finished or went back: what the counters must know. `was` is its status before."""

    queue_id: UUID
    workspace_id: str
    was: str
    rev: int
    dispatched_at: float
    priority: Priority
    place: Place | None = None
    """Where it waits again."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A delivery that has ended, and its fate."""

    item: Item
    fate: Finish | Requeue
    answer: bytes | None = None
    error: str | None = None
    wait_s: float = 0.0


async def clock(connection: Connection, now: datetime | None) -> float:
    return float(await connection.fetchval(SQL["read_clock"], now))


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
    result = await connection.execute(SQL["save_counters"], *_columns(rows))
    assert result == f"UPDATE {len(changed)}", "a row that we hold was not where we locked it"


def _list(numbers: Iterable[float]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def _columns_of(workspace: Workspace) -> dict[str, Any]:
    return {
        **{name: getattr(workspace, name) for name in Workspace.__slots__},
        "recent_ended": [moment for each in workspace.recent_ended for moment in each],
        "forwards": {
            proxy_id: {"rev": each.rev, "at": each.at, "running": each.running, "ended": each.ended}
            for proxy_id, each in workspace.forwards.items()
        },
        "version": "({},{})".format(*(workspace.version or (0, 0))),
    }


def _workspace(row: asyncpg.Record) -> Workspace:
    computed = {"forwards", "beat_at", "not_before", "paused_at", "floors", "turns_s"}
    values = {name: row[name] for name in Workspace.__slots__ if name not in computed}
    return Workspace(
        **{
            **values,
            "beat_at": row["beat_epoch"],
            "not_before": row["not_before_epoch"],
            "recent_ended": tuple(zip(row["recent_ended"][::2], row["recent_ended"][1::2], strict=False)),
            "paused_at": row["paused_epoch"],
            "floors": tuple(row["floors"]),
            "turns_s": tuple(row["turns_s"]),
            "forwards": {name: _forwards(value) for name, value in json.loads(row["forwards"]).items()},
        }
    )


def _forwards(value: Mapping[str, Any]) -> Forwards:
    return Forwards(
        rev=value["rev"],
        at=value["at"],
        running=tuple((session, key, started) for session, key, started in value["running"]),
        ended=tuple((started, ended, counts) for started, ended, counts in value["ended"]),
    )


# ── keeping ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Known:
    """An item that is there already. `body_hash` tells whether it is the same message."""

    queue_id: UUID
    workspace_id: str
    caller_hash: bytes
    body_hash: bytes


async def find_ids(connection: Connection, queue_ids: Sequence[UUID]) -> dict[UUID, Known]:
    return {row["queue_id"]: Known(**row) for row in await connection.fetch(SQL["find_ids"], queue_ids)}


Key = tuple[str, bytes, bytes]


def key_of(fact: MessageBusy) -> Key:
    return (fact.workspace_id, fact.caller_hash, fact.key_hash)


async def reserve_keys(connection: Connection, facts: Sequence[MessageBusy], keep_s: float) -> dict[Key, Known]:
    """Take the explicit keys of `facts`; return those that somebody had before, with what they stand for."""
    if not facts:
        return {}
    first = {key_of(fact): fact for fact in reversed(facts)}  # of two with the same key in one batch
    columns = _columns((*key_of(fact), fact.queue_id, fact.body_hash) for fact in first.values())
    await connection.execute(SQL["insert_keys"], *columns, keep_s)
    return await _keyed(connection, "find_keys", facts)


async def find_active(connection: Connection, facts: Sequence[MessageBusy]) -> dict[Key, Known]:
    return await _keyed(connection, "find_active_keys", facts) if facts else {}


async def _keyed(connection: Connection, query: str, facts: Sequence[MessageBusy]) -> dict[Key, Known]:
    rows = await connection.fetch(SQL[query], *_columns(key_of(fact) for fact in facts))
    return {
        (row["workspace_id"], row["caller_hash"], row["key_hash"]): Known(
            row["queue_id"], row["workspace_id"], row["caller_hash"], row["body_hash"]
        )
        for row in rows
    }


def place_of(fact: MessageBusy) -> Place:
    """Where the item of this message stands in the line."""
    return (decide.lane(fact.priority), decide.rank(fact.queue_id, fact.fact_id, fact.priority))


async def insert(
    connection: Connection, facts: Sequence[MessageBusy], workspaces: Mapping[str, Workspace]
) -> set[UUID]:
    """Insert items; return the ids that were new (the others met an active item with their key)."""
    if not facts:
        return set()
    rows = (
        (
            fact.queue_id, fact.workspace_id, fact.caller_id, fact.caller_hash, fact.key_hash, fact.body_hash,
            PRIORITIES[fact.priority], *place_of(fact),
            fact.method, fact.body, fact.reason, fact.context_id, fact.hops,
            fact.not_before, fact.expires_at, workspaces[fact.workspace_id].give_up_after_s, fact.retry_of,
        )
        for fact in facts
    )  # fmt: skip
    return {row["queue_id"] for row in await connection.fetch(SQL["insert_items"], *_columns(rows))}


async def insert_ended(connection: Connection, ended: Sequence[tuple[MessageBusy, str, str, UUID | None]]) -> None:
    """Write proposed ids that never became items: `(fact, status, reason, superseded_by)`."""
    if not ended:
        return
    rows = (
        (
            fact.queue_id, fact.workspace_id, fact.caller_id, fact.caller_hash, fact.key_hash, fact.body_hash,
            PRIORITIES[fact.priority], status, reason, fact.method, fact.body, fact.context_id, by,
        )
        for fact, status, reason, by in sorted(ended, key=lambda each: each[0].queue_id)
    )  # fmt: skip
    await connection.execute(SQL["insert_finished"], *_columns(rows))


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


# ── delivering ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Claimed:
    """What was claimed in one workspace, in its order, and where its lanes begin now."""

    items: Sequence[Item]
    floors: Floors
    served_critical: bool = False
    starved: int = 0
    """How many of them went before a CRITICAL that waited."""


async def claim(
    connection: Connection,
    spare: Mapping[str, int],
    workspaces: Mapping[str, Workspace],
    owner: str,
    now: datetime | None,
    *,
    starvation_limit_s: float,
) -> dict[str, Claimed]:
    """Claim up to `spare` items of each workspace, in order. The caller holds the workspaces' locks."""
    plain = {name: room for name, room in spare.items() if not workspaces[name].waiting_critical}
    mixed = {name: room for name, room in spare.items() if name not in plain}
    claimed = await _claim_rest(connection, plain, workspaces, owner, now) if plain else {}
    if mixed:
        claimed |= await _claim_mixed(connection, mixed, workspaces, owner, now, starvation_limit_s)
    return claimed


async def _claim_rest(
    connection: Connection,
    spare: Mapping[str, int],
    workspaces: Mapping[str, Workspace],
    owner: str,
    now: datetime | None,
) -> dict[str, Claimed]:
    """One statement, where no CRITICAL waits."""
    wanted = _columns((name, spare[name], workspaces[name].floors[decide.REST_LANE]) for name in sorted(spare))
    rows = await connection.fetch(SQL["claim_items"], *wanted, owner, now)
    rows.sort(key=_in_line)
    return {
        name: Claimed(
            [_item(row, workspaces[name]) for row in mine],
            (workspaces[name].floors[decide.CRITICAL_LANE], mine[0]["first_rank"]),
        )
        for name, mine in _by_workspace(rows)
    }


async def _claim_mixed(  # noqa: PLR0917 - as its caller
    connection: Connection,
    spare: Mapping[str, int],
    workspaces: Mapping[str, Workspace],
    owner: str,
    now: datetime | None,
    starvation_limit_s: float,
) -> dict[str, Claimed]:
    """Look at the heads of both lanes, decide whose turn it is, claim those."""
    wanted = _columns(
        (name, spare[name], lane, workspaces[name].floors[lane])
        for name in sorted(spare)
        for lane in (decide.CRITICAL_LANE, decide.REST_LANE)
    )
    moment = await clock(connection, now)
    heads: dict[str, tuple[list[Head], list[Head]]] = {name: ([], []) for name in spare}
    floors = {name: list(workspaces[name].floors) for name in spare}
    for row in await connection.fetch(SQL["line_heads"], *wanted, now):
        name, lane = row["workspace_id"], row["lane"]
        heads[name][lane].append(Head(row["place"], lane, row["enqueued_epoch"]))
        floors[name][lane] = row["first_rank"]
    chosen = {
        name: decide.turns(
            *heads[name], room=spare[name], served_critical=workspaces[name].served_critical, now=moment,
            starvation_limit_s=starvation_limit_s,
        )
        for name in spare
    }  # fmt: skip
    places = [head.version for mine in chosen.values() for head in mine]
    rows = await connection.fetch(SQL["claim_places"], places, owner, now)
    rows.sort(key=_in_line)
    return {
        name: Claimed(
            [_item(row, workspaces[name]) for row in mine],
            (floors[name][0], floors[name][1]),
            served_critical=chosen[name][-1].lane == decide.CRITICAL_LANE,
            starved=_starved(chosen[name], len(heads[name][decide.CRITICAL_LANE])),
        )
        for name, mine in _by_workspace(rows)
    }


def _starved(chosen: Sequence[Head], critical: int) -> int:
    """Turns of the rest that were taken while CRITICAL waited."""
    passed = 0
    for head in chosen:
        if head.lane == decide.CRITICAL_LANE:
            critical -= 1
        elif critical > 0:
            passed += 1
    return passed


def _in_line(row: asyncpg.Record) -> tuple[str, int, int, UUID]:
    return (row["workspace_id"], row["lane"], row["rank_ms"], row["queue_id"])


def _by_workspace(rows: Iterable[asyncpg.Record]) -> Iterator[tuple[str, list[asyncpg.Record]]]:
    for name, mine in groupby(rows, key=itemgetter("workspace_id")):
        yield name, list(mine)


async def oldest(connection: Connection, lanes: Iterable[tuple[str, int]]) -> dict[tuple[str, int], datetime]:
    """Since when the first of each of these lanes waits."""
    wanted = list(lanes)
    rows = await connection.fetch(SQL["oldest_items"], *_columns(wanted)) if wanted else []
    return {(row["workspace_id"], row["lane"]): row["enqueued_at"] for row in rows}


async def shift_clocks(connection: Connection, resumed: Mapping[str, float], now: float) -> None:
    """Give what waits in these workspaces the time back that it stood still since these moments."""
    if resumed:
        wanted = _columns((name, since, now) for name, since in sorted(resumed.items()))
        await connection.execute(SQL["shift_clocks"], *wanted)


async def running(connection: Connection, workspaces: Iterable[Workspace]) -> list[asyncpg.Record]:
    """Read what these workspaces' agents are being delivered."""
    wanted = [(each.workspace_id, each.running) for each in workspaces if each.running]
    return await connection.fetch(SQL["running_items"], *_columns(wanted)) if wanted else []


async def find_lost(
    connection: Connection, owner: str, silent_s: float, now: datetime | None, *, after: UUID | None, most: int
) -> list[Item]:
    """A page of the rows whose owner is silent, as the items they are, in the order of their ids."""
    rows = await connection.fetch(SQL["lost_items"], owner, silent_s, now, after, most)
    workspaces = await read(connection, {row["workspace_id"] for row in rows})
    return [_item(row, workspaces[row["workspace_id"]]) for row in rows]


def item_of(row: asyncpg.Record) -> Item:
    """A row that is already ours, as the item it is."""
    return _item(row, Workspace(row["workspace_id"], url=row["url"], agent_authorization=row["agent_authorization"]))


def _item(row: asyncpg.Record, workspace: Workspace) -> Item:
    return Item(
        queue_id=row["queue_id"],
        workspace_id=row["workspace_id"],
        delivery_no=row["delivery_no"],
        method=row["method"],
        body=row["body"],
        attempts=row["attempts"],
        deaths=row["deaths"],
        dispatched_at=row["dispatched_epoch"],
        hops=row["hops"],
        agent_task_id=row["agent_task_id"],
        cancel_requested=row["cancel_at"] is not None,
        url=workspace.url or "",
        agent_authorization=workspace.agent_authorization,
        at_most_once=workspace.at_most_once,
        ceiling_s=workspace.ceiling_s,
        rev=row["rev"],
        priority=PRIORITY_OF[row["priority"]],
        enqueued_at=row["enqueued_epoch"],
    )


async def canceled(connection: Connection, queue_ids: Sequence[UUID]) -> set[UUID]:
    """Those that somebody wants canceled."""
    rows = await connection.fetch(SQL["canceled_items"], queue_ids) if queue_ids else []
    return {row["queue_id"] for row in rows}


async def finish(connection: Connection, settled: Sequence[Settled]) -> dict[UUID, Ended]:
    """End items, fenced; return those that really ended."""
    rows = [
        (
            each.item.queue_id, each.item.delivery_no, each.fate.status.value, each.fate.reason, each.fate.attempts,
            each.answer, each.error,
        )
        for each in settled
        if isinstance(each.fate, Finish)
    ]  # fmt: skip
    if not rows:
        return {}
    found = await connection.fetch(SQL["finish_items"], *_columns(rows))
    return {
        row["queue_id"]: Ended(
            row["queue_id"],
            row["workspace_id"],
            row["status"],
            row["rev"],
            row["dispatched_epoch"] or 0.0,
            PRIORITY_OF[row["priority"]],
        )
        for row in found
    }


async def requeue(connection: Connection, settled: Sequence[Settled]) -> dict[UUID, Ended]:
    """Send items back to their place, fenced; return those that went."""
    rows = [
        (
            each.item.queue_id, each.item.delivery_no, each.fate.attempts, each.fate.deaths,
            # Where the workspace waits its row does not: a beat that opens it must find the same one first.
            each.wait_s if each.fate.row_wait else 0.0,
            each.fate.reason, each.error,
        )
        for each in settled
        if isinstance(each.fate, Requeue)
    ]  # fmt: skip
    if not rows:
        return {}
    found = await connection.fetch(SQL["requeue_items"], *_columns(rows))
    return {
        row["queue_id"]: Ended(
            row["queue_id"],
            row["workspace_id"],
            "dispatched",
            0,
            row["dispatched_epoch"],
            PRIORITY_OF[row["priority"]],
            place=(row["lane"], row["rank_ms"]),
        )
        for row in found
    }
