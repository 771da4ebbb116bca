"""The only SQL of scheduler: rows in and out as values, in the caller's transaction."""

from services.scheduler.store.calendar import (
    Advance,
    Fire,
    Told,
    advance,
    bounce_fires,
    claim_due,
    clock,
    delete_of,
    due_at,
    hear_workspaces,
    hold_workspaces,
    insert,
    insert_fires,
    lock,
    pause_failed,
    save,
    schedule_of,
    settle_fires,
    settle_schedules,
    tell_changed,
)
from services.scheduler.store.sessions import (
    OpenFire,
    answer_orders,
    begin_sessions,
    claim_sessions,
    end_sessions,
    hear_closings,
    incarnations,
    lock_sessions,
    lock_sessions_of,
    open_fires,
    open_sessions,
    read_activities,
    read_rules,
    save_activities,
    save_sessions,
    sessions_of,
)
from services.scheduler.store.statements import SQL

__all__ = [
    "SQL", "Advance", "Fire", "OpenFire", "Told", "advance", "answer_orders", "begin_sessions", "bounce_fires",
    "claim_due", "claim_sessions", "clock", "delete_of", "due_at", "end_sessions", "hear_closings", "hear_workspaces",
    "hold_workspaces", "incarnations", "insert", "insert_fires", "lock", "lock_sessions", "lock_sessions_of",
    "open_fires", "open_sessions", "pause_failed", "read_activities", "read_rules", "save", "save_activities",
    "save_sessions", "schedule_of", "sessions_of", "settle_fires", "settle_schedules", "tell_changed",
]  # fmt: skip
