"""What liveness answers about an agent's life, and what an operator may order: restart now, resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.liveness import store
from services.liveness.decide.judge import Reason
from services.liveness.decide.life import Life, Status, believed, forgiven
from services.liveness.restart import door
from services.liveness.settings import Settings
from services.liveness.store import SQL
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import LivenessQuery, QueryAnswered
from shared.intake import Tell

_COMMANDS = frozenset({"restart", "resume"})
_RESTARTS_SHOWN = 5
Answer = tuple[int, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The handler of LivenessQuery, bound to what it tells."""

    settings: Settings
    publisher: Publisher
    wake: Callable[[], None]

    async def query(self, connection: Connection, facts: Sequence[LivenessQuery]) -> Tell:
        """Answer each question; what came too late is refused, so that a command is never a surprise."""
        held = await store.lock(connection, {fact.workspace_id for fact in facts if fact.verb in _COMMANDS})
        answered = [(fact, *await self._answer(connection, fact, held)) for fact in facts]

        def tell() -> None:
            for fact, status, body in answered:
                reply = QueryAnswered(
                    workspace_id=fact.workspace_id, rev=1, query_id=fact.query_id, status=status,
                    body=json.dumps(body).encode(),
                )  # fmt: skip
                self.publisher.post(reply, to=fact.reply_to)
            self.wake()

        return tell

    async def _answer(self, connection: Connection, fact: LivenessQuery, held: dict[str, Life]) -> Answer:
        if fact.expires_at < datetime.now(UTC):
            return 408, _problem(
                "too_late", "The request came after its own deadline; nothing was done. Send it again."
            )
        if fact.verb in _COMMANDS:
            return await self._command(connection, fact, held)
        row = await connection.fetchrow(SQL["find_agent"], fact.workspace_id)
        if row is None:
            return 404, _problem("workspace_unknown", "There is no such workspace. Check the id.")
        life = store.life_of(row)
        if fact.verb == "history":
            return 200, {
                "evidence": [
                    _evidence(each)
                    for each in await connection.fetch(SQL["last_evidence"], fact.workspace_id, fact.limit)
                ],
                "restarts": await _restarts(connection, fact.workspace_id, fact.limit),
            }
        return 200, _shown(life) | {"last_restarts": await _restarts(connection, fact.workspace_id, _RESTARTS_SHOWN)}

    async def _command(self, connection: Connection, fact: LivenessQuery, held: dict[str, Life]) -> Answer:
        """Do it once however often it is said, with who said it and why (audit)."""
        life = held.get(fact.workspace_id)
        if life is None or life.removed:
            return 404, _problem("workspace_unknown", "There is no such workspace. Check the id.")
        if life.driver is None:
            return 409, _problem("external", "No driver runs it. Set `runtime`, or restart it where it runs.")
        if self.settings.mode == "observe":
            return 409, _problem("observing", "Liveness only observes (BIDE_LIVENESS_MODE): it restarts nothing.")
        if fact.verb == "restart" and (life.paused or life.cordoned or life.desired == "stopped"):
            return 409, _problem("not_wanted", "It is paused, cordoned or meant to be stopped. Resume it first.")
        is_new = await connection.fetchval(
            SQL["insert_audit"], fact.query_id, fact.by, fact.verb, fact.workspace_id, fact.note
        )
        if is_new is None:
            return 200, _shown(life)
        now = await store.clock(connection)
        after = forgiven(life, now)
        if after.status is Status.GAVE_UP:
            after = believed(after, Status.ONLINE, "")
        if fact.verb == "restart":
            words = f"{fact.by} asked for it: {fact.note or 'no reason given'}"
            notice_s = self.settings.notice_s
            after = await door.tell_and_restart(connection, after, Reason.OPERATOR, words, now, notice_s=notice_s)
        await store.save(connection, held, [store.checked_at(after, now)], now)
        held[fact.workspace_id] = after
        return 200, _shown(after)


def _problem(code: str, words: str) -> dict[str, Any]:
    return {"code": code, "detail": words}


def _shown(life: Life) -> dict[str, Any]:
    return {
        "workspace_id": life.workspace_id,
        "incarnation": life.incarnation,
        "status": life.status.value,
        "status_reason": life.reason,
        "status_at": _iso(life.status_at),
        "driver": life.driver,
        "container_id": life.container_id,
        "started_at": _iso(life.started_at),
        "heard_at": _iso(life.heard_at),
        "window_s": round(life.window_s, 1),
        "suspicions": life.suspicions,
        "suspected_at": _iso(life.suspected_at),
        "blind_since": _iso(life.blind_since),
        "boot_until": _iso(life.boot_until),
        "restarts": life.restarts,
    }


def _evidence(row: asyncpg.Record) -> dict[str, Any]:
    names = ("incarnation", "source", "seen", "container_id", "verdict", "reason", "sentence")
    return {"at": _iso(row["at"]), **{name: row[name] for name in names}}


async def _restarts(connection: Connection, workspace_id: str, limit: int) -> list[dict[str, Any]]:
    names = (
        "incarnation",
        "fence",
        "reason",
        "evidence",
        "container_id",
        "tries",
        "asked_again",
        "last_error",
        "result",
    )
    moments = ("decided_at", "due_at", "began_at", "ended_at")
    return [
        {**{name: _iso(row[name]) for name in moments}, **{name: row[name] for name in names}}
        for row in await connection.fetch(SQL["last_restarts"], workspace_id, limit)
    ]


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None
