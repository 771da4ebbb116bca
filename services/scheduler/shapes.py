"""Schedules and fires as they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.scheduler.decide import OUTCOMES

Answer = tuple[int, Mapping[str, Any]]
"""An HTTP status and the object that goes with it."""


def problem(code: str, detail: str) -> dict[str, str]:
    return {"code": code, "detail": detail}


UNKNOWN: Answer = (404, problem("unknown_schedule", "There is no such schedule here. Check the id."))


class Refused(Exception):  # noqa: N818 - an answer to the caller, not an error of the program
    """What was asked for cannot be done; `str()` is the sentence."""

    def __init__(self, code: str, sentence: str, *, status: int = 422) -> None:
        super().__init__(sentence)
        self.code = code
        self.status = status

    def answer(self) -> Answer:
        return self.status, problem(self.code, str(self))


def shown(row: asyncpg.Record) -> dict[str, Any]:
    """The Schedule of the HTTP face; of cron, every_s and at only the one that it has."""
    rule = {name: row[name] for name in ("cron", "every_s") if row[name] is not None}
    if row["at"] is not None:
        rule["at"] = iso(row["at"])
    return {
        "schedule_id": str(row["schedule_id"]),
        "workspace_id": row["workspace_id"],
        "name": row["name"],
        **rule,
        "timezone": row["timezone"],
        "prompt": row["prompt"],
        "rev": row["rev"],
        "overlap": row["overlap"],
        "catchup_window_s": row["catchup_window_s"],
        "jitter_s": row["jitter_s"],
        "session_ceiling_s": row["ceiling_s"],
        "priority": row["priority"],
        "context": row["context"],
        "paused": row["paused"],
        "pause_note": row["pause_note"],
        "paused_by_error": row["paused_by_error"],
        "ends_at": iso(row["ends_at"]),
        "remaining_runs": row["remaining_runs"],
        "next_fire_at": iso(row["next_fire_at"]),
        "last_ran_at": iso(row["last_ran_at"]),
        "bounces": row["bounces"],
        "run_count": row["run_count"],
        "fires": row["fires_total"],
        "counts": {outcome: row[outcome] for outcome in OUTCOMES},
    }


def shown_fire(row: asyncpg.Record) -> dict[str, Any]:
    """The Fire of the HTTP face. Several that came to one end together are one, from `fire_at` to `last_fire_at`."""
    return {
        "schedule_id": str(row["schedule_id"]),
        "fire_at": iso(row["fire_at"]),
        "last_fire_at": iso(row["last_fire_at"]),
        "count": row["count"],
        "outcome": row["outcome"],
        "reason": row["reason"],
        "queue_id": str(row["queue_id"]) if row["queue_id"] else None,
        "merged_into": iso(row["merged_into"]),
        "began_at": iso(row["began_at"]),
        "rev": row["rev"],
        "at": iso(row["settled_at"] or row["at"]),
    }


def iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment is not None else None
