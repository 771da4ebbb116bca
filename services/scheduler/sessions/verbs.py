"""What people may ask of sessions: what runs, and that it saves or ends now."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime
from typing import Any

import asyncpg

from services.scheduler import decide, store
from services.scheduler.decide import Session, State
from services.scheduler.sessions import telling
from services.scheduler.sessions.shapes import shown
from services.scheduler.settings import Settings
from services.scheduler.shapes import Answer, iso, problem
from services.scheduler.store import SQL
from shared.database import Connection
from shared.facts import FLEET, ScheduleQuery

VERBS = frozenset({"checkpoint", "stop"})
_SCHEDULES_MAX = 100
"""Of each workspace: one with thousands hides no other's."""
_NAMES_MAX = 500

_NONE: Answer = (
    409,
    problem(
        "no_session",
        "No session is known to run here. One is seen some seconds after it began: look again, then repeat this.",
    ),
)


async def show(connection: Connection, fact: ScheduleQuery, settings: Settings) -> Answer:
    """What runs in a workspace, in those that the body names ("-"), or in all where something runs; what bounces."""
    now = await store.clock(connection)
    if fact.workspace_id != FLEET:
        name = fact.workspace_id
        return 200, (await _shown(connection, [name], await store.sessions_of(connection, [name]), settings, now))[name]
    asked = _asked(fact.body)
    sessions = await (store.open_sessions(connection) if asked is None else store.sessions_of(connection, asked))
    names = sorted({each.workspace_id for each in sessions}) if asked is None else asked
    return 200, {"workspaces": await _shown(connection, names, sessions, settings, now)}


def _asked(body: bytes) -> list[str] | None:
    """The workspaces of somebody's page; None: he names none."""
    try:
        said = json.loads(body)
    except ValueError:
        return None
    names = said.get("workspaces") if isinstance(said, dict) else None
    if not isinstance(names, list):
        return None
    return sorted({name for name in names if isinstance(name, str) and "\0" not in name})[:_NAMES_MAX]


async def _shown(
    connection: Connection, names: list[str], sessions: list[Session], settings: Settings, now: datetime
) -> dict[str, Any]:
    rules = await store.read_rules(connection, names, settings.rules)
    schedules: dict[str, list[asyncpg.Record]] = defaultdict(list)
    for row in await connection.fetch(SQL["bouncing_schedules"], names, _SCHEDULES_MAX):
        schedules[row["workspace_id"]].append(row)
    found: dict[str, Any] = {}
    running: dict[str, list[Session]] = defaultdict(list)
    for session in sorted(sessions, key=lambda each: each.started_at):
        running[session.workspace_id].append(session)
    for name in names:
        mine = running[name]
        cards = [
            shown(
                each, rules[name], now, among=mine, pace=settings.pace, bounces=[dict(row) for row in schedules[name]]
            )
            for each in mine
        ]
        found[name] = {
            "session": cards[0] if cards else None,
            "sessions": cards,
            "schedules": [
                {
                    "schedule_id": str(row["schedule_id"]),
                    "name": row["name"],
                    "bounces": row["bounces"],
                    "next_fire_at": iso(row["next_fire_at"]),
                }
                for row in schedules[name]
            ],
        }
    return found


async def command(connection: Connection, fact: ScheduleQuery, settings: Settings, turn: telling.Turn) -> Answer:
    """Ask all sessions of a workspace to save, or to end as at their ceiling; `turn` gets what is to be told.

    Said twice it is done once: a stop is not begun anew, and a checkpoint is known by its question.
    """
    name = fact.workspace_id
    sessions = await store.lock_sessions_of(connection, [name])
    if not sessions:
        return _NONE
    now = await store.clock(connection)
    rules = (await store.read_rules(connection, [name], settings.rules))[name]
    saved: list[tuple[Session, datetime | None]] = []
    for session in sessions:
        if fact.verb == "stop" and session.stop_reason != "operator":
            taken = decide.stop(session, rules, now, "operator", settings.pace)
        elif fact.verb == "checkpoint" and session.state is State.RUNNING and not _was_asked(session, fact):
            taken = decide.ask_by_hand(session, rules, now, str(fact.query_id), settings.pace)
        else:
            continue
        after = decide.revised(taken.session)
        saved.append((after, taken.due_at))
        turn.told += telling.facts(after, taken.says, now)
        turn.stepped.append((session, after))
    await store.save_sessions(connection, saved)
    if saved:
        await connection.execute(
            SQL["insert_audit"], fact.query_id, fact.by, f"session_{fact.verb}", name, None, 0, None
        )
    mine = await store.sessions_of(connection, [name])
    return 200, {"sessions": [shown(each, rules, now, among=mine, pace=settings.pace) for each in mine]}


def _was_asked(session: Session, fact: ScheduleQuery) -> bool:
    return any(ask.about == str(fact.query_id) for ask in session.asks)
