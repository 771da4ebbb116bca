"""The end of sessions in the tables, and of their place in the gate."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from services.scheduler import decide, store
from services.scheduler.sessions import telling
from services.scheduler.sessions.telling import Turn
from shared.database import Connection


async def end(connection: Connection, session_ids: Sequence[str], reason: str, now: datetime, turn: Turn) -> None:
    """End sessions; those whose gate was closed leave it.

    Not while an order to kill is on its way, which would end what begins next: its answer opens the gate, or time does.
    """
    for session in await store.end_sessions(connection, session_ids, reason, now):
        turn.ended.append((session, reason))
        if session.stop_reason is not None and not (reason == "gone" and decide.has_order(session, now)):
            turn.told += telling.facts(session, [decide.Gate(None)], now)
