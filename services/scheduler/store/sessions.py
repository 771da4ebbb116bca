"""Rows of sessions, of what was seen of foreign work, and of what workspaces allow, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from services.scheduler.decide import Activity, Ask, Began, Closing, Rules, Schedule, Session, State
from services.scheduler.store.calendar import schedule_of
from services.scheduler.store.statements import SQL, turned
from shared.database import Connection

_PLAIN = (
    "session_id", "workspace_id", "kind", "incarnation", "schedule_id", "ceiling_s", "started_at", "deadline_at",
    "stop_reason", "said_at", "gate_said_at", "orders", "unenforceable", "noted_at", "rev", "ended_at",
)  # fmt: skip
_RULES = {"session_ceiling_s": "ceiling_s"} | {
    field.name: field.name for field in fields(Rules) if field.name != "ceiling_s"
}
"""Setting of a workspace → rule."""


@dataclass(frozen=True, slots=True)
class OpenFire:
    """A fire on its way: the item it is, and its schedule."""

    fire_at: datetime
    queue_id: UUID
    schedule: Schedule


async def open_sessions(connection: Connection) -> list[Session]:
    return [_session(row) for row in await connection.fetch(SQL["open_sessions"])]


async def sessions_of(connection: Connection, workspace_ids: Sequence[str]) -> list[Session]:
    """Read the open ones of these workspaces."""
    return [_session(row) for row in await connection.fetch(SQL["sessions_of"], workspace_ids)]


async def lock_sessions_of(connection: Connection, workspace_ids: Sequence[str]) -> list[Session]:
    """The same, locked, in key order."""
    return [_session(row) for row in await connection.fetch(SQL["lock_sessions_of"], workspace_ids)]


async def lock_sessions(connection: Connection, session_ids: Iterable[str]) -> list[Session]:
    """Lock open sessions in key order."""
    return [_session(row) for row in await connection.fetch(SQL["lock_sessions"], sorted(set(session_ids)))]


async def claim_sessions(connection: Connection, limit: int, now: datetime | None) -> tuple[list[Session], datetime]:
    """Lock sessions at which somebody has to look; with the database's clock."""
    rows = await connection.fetch(SQL["claim_sessions"], now, limit)
    moment = rows[0]["clock"] if rows else await connection.fetchval(SQL["read_clock"], now)
    return [_session(row) for row in rows], moment


async def begin_sessions(connection: Connection, sessions: Sequence[Session], noted_at: datetime) -> None:
    if sessions:
        rows = (
            (
                each.session_id,
                each.workspace_id,
                each.kind,
                each.incarnation,
                each.schedule_id,
                each.ceiling_s,
                each.started_at,
            )
            for each in sessions
        )
        await connection.execute(SQL["insert_sessions"], *turned(rows), noted_at)


async def end_sessions(
    connection: Connection, session_ids: Sequence[str], reason: str, now: datetime | None = None
) -> list[Session]:
    """End sessions; return those that had been asked for something.

    Of the others those that are gone leave no trace. What another life has ended does: its owner may show it for a
    while yet, and it must not be taken for a session of that life.
    """
    if not session_ids:
        return []
    if reason == "gone":
        await connection.execute(SQL["forget_idle_sessions"], session_ids)
    return [_session(row) for row in await connection.fetch(SQL["end_sessions"], session_ids, reason, now)]


async def answer_orders(connection: Connection, session_ids: Sequence[str], reason: str) -> list[Session]:
    """Write that an order was carried out although its session was gone; return those of whom this is news."""
    return [_session(row) for row in await connection.fetch(SQL["answer_orders"], session_ids, reason)]


async def save_sessions(connection: Connection, sessions: Iterable[tuple[Session, datetime | None]]) -> None:
    """Write sessions that the caller holds, each with the moment of its next look."""
    rows = [
        {
            "session_id": each.session_id,
            "state": each.state.value,
            "deadline_at": _text(each.deadline_at),
            "stop_reason": each.stop_reason,
            "said_at": _text(each.said_at),
            "gate_said_at": _text(each.gate_said_at),
            "asks": [
                {**asdict(ask), "deadline_at": _text(ask.deadline_at), "said_at": _text(ask.said_at)}
                for ask in each.asks
            ],
            "orders": each.orders,
            "unenforceable": each.unenforceable,
            "due_at": _text(due_at),
            "rev": each.rev,
        }
        for each, due_at in sessions
    ]
    if rows:
        await connection.execute(SQL["save_sessions"], json.dumps(rows))


async def hear_closings(connection: Connection, closings: Mapping[str, Closing]) -> None:
    """Take over what the gate says of sessions; nothing of it is news to one that has ended."""
    rows = [(session_id, json.dumps(_closing_row(closings[session_id]))) for session_id in sorted(closings)]
    if rows:
        await connection.execute(SQL["hear_closings"], *turned(rows))


async def read_rules(connection: Connection, workspace_ids: Iterable[str], default: Rules) -> dict[str, Rules]:
    """What each of these workspaces allows."""
    wanted = sorted(set(workspace_ids))
    if not wanted:
        return {}
    found = {row["workspace_id"]: row for row in await connection.fetch(SQL["read_rules"], wanted)}
    return {name: _rules(found.get(name), default) for name in wanted}


async def incarnations(connection: Connection, workspace_ids: Iterable[str]) -> dict[str, int]:
    """Which life of its agent each workspace is known to have."""
    rows = await connection.fetch(SQL["read_rules"], sorted(set(workspace_ids)))
    return {row["workspace_id"]: row["incarnation"] for row in rows}


async def read_activities(connection: Connection) -> dict[str, Activity]:
    names = [field.name for field in fields(Activity)]
    rows = await connection.fetch(SQL["read_activities"])
    return {row["workspace_id"]: Activity(**{name: row[name] for name in names}) for row in rows}


async def save_activities(connection: Connection, activities: Sequence[Activity]) -> None:
    if activities:
        rows = (
            (each.workspace_id, each.incarnation, each.beats, each.nones, each.beat_at, each.since, each.number)
            for each in sorted(activities, key=lambda each: each.workspace_id)
        )
        await connection.execute(SQL["save_activities"], *turned(rows))


async def open_fires(connection: Connection, workspace_ids: Sequence[str], each: int) -> list[OpenFire]:
    """The oldest `each` of every one of these workspaces, so that none of them hides another's."""
    if not workspace_ids:
        return []
    rows = await connection.fetch(SQL["open_fires"], workspace_ids, each)
    return [OpenFire(row["fire_at"], row["queue_id"], schedule_of(row)) for row in rows]


def _session(row: asyncpg.Record) -> Session:
    return Session(
        **{name: row[name] for name in _PLAIN},
        state=State(row["state"]),
        asks=tuple(
            Ask(each["reason"], each["about"], _moment(each["deadline_at"]), _moment(each["said_at"]))
            for each in json.loads(row["asks"])
        ),
        closing=_closing(json.loads(row["closing"])) if row["closing"] else None,
    )


def _closing_row(closing: Closing) -> dict[str, Any]:
    return {
        "generation": closing.generation,
        "at": _text(closing.at),
        "until": _text(closing.until),
        "in_flight": [[each.session_id, _text(each.started_at), each.ceiling_s] for each in closing.in_flight],
        "foreign": closing.foreign,
        "beat_at": _text(closing.beat_at),
        "cadence_s": closing.cadence_s,
    }


def _closing(said: Mapping[str, Any]) -> Closing:
    return Closing(
        generation=said["generation"],
        at=_moment(said["at"]),
        until=_moment(said["until"]),
        in_flight=tuple(Began(name, _moment(began), ceiling_s) for name, began, ceiling_s in said["in_flight"]),
        foreign=said["foreign"],
        beat_at=_moment(said["beat_at"]) if said["beat_at"] else None,
        cadence_s=said["cadence_s"],
    )


def _rules(row: asyncpg.Record | None, default: Rules) -> Rules:
    settings: Mapping[str, Any] = json.loads(row["settings"]) if row is not None else {}
    values = asdict(default)
    for setting, rule in _RULES.items():
        if settings.get(setting) is not None:
            values[rule] = settings[setting]
    return Rules(**values)


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
