"""Claims: what goes to the agents next, and what is with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from uuid import UUID

import asyncpg

from services.queue import decide
from services.queue.decide import Floors, Head, Item, Workspace
from services.queue.store.statements import PRIORITY_OF, SQL, columns
from services.queue.store.workspaces import clock, read
from shared.database import Connection


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
    wanted = columns((name, spare[name], workspaces[name].floors[decide.REST_LANE]) for name in sorted(spare))
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
    wanted = columns(
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


async def running(connection: Connection, workspaces: Iterable[Workspace]) -> list[asyncpg.Record]:
    """Read what these workspaces' agents are being delivered."""
    wanted = [(each.workspace_id, each.running) for each in workspaces if each.running]
    return await connection.fetch(SQL["running_items"], *columns(wanted)) if wanted else []


async def find_lost(
    connection: Connection, owner: str, silent_s: float, now: datetime | None, *, after: UUID | None, most: int
) -> list[Item]:
    """A page of the rows whose owner is silent, as the items they are, in the order of their ids."""
    rows = await connection.fetch(SQL["lost_items"], owner, silent_s, now, after, most)
    workspaces = await read(connection, {row["workspace_id"] for row in rows})
    return [_item(row, workspaces[row["workspace_id"]]) for row in rows]


def item_of(row: asyncpg.Record) -> Item:
    """A row that is already ours, as the item it is."""
    workspace = Workspace(
        row["workspace_id"], url=row["url"], agent_authorization=row["agent_authorization"],
        incarnation=row["incarnation"], ceiling_s=row["ceiling_s"], checkpoint_grace_s=row["checkpoint_grace_s"],
        stop_grace_s=row["stop_grace_s"],
    )  # fmt: skip
    return _item(row, workspace)


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
        grace_s=workspace.checkpoint_grace_s + workspace.stop_grace_s,
        rev=row["rev"],
        priority=PRIORITY_OF[row["priority"]],
        enqueued_at=row["enqueued_epoch"],
        incarnation=workspace.incarnation,
    )
