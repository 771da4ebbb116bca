"""How often and how soon an agent is restarted, and how many of a fleet at once (A-L-17, D-S10, D-S11, D-S15)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.liveness.decide.judge import Reason
from services.liveness.decide.life import Life

BACKOFF_FIRST_S = 10.0
BACKOFF_MAX_S = 300.0
STABLE_S = 600.0
"""After so long without a restart the backoff begins anew."""
BUDGET = 5
BUDGET_WINDOW_S = 600.0
FLEET_FLOOR = 2
FLEET_SHARE = 0.25

UNBUDGETED = frozenset({Reason.OPERATOR, Reason.CEILING})
"""Somebody's order, and no sign of a crash loop: neither backoff nor budget."""


@dataclass(frozen=True, slots=True)
class Plan:
    """When it is restarted; `due_at` None: not any more."""

    due_at: datetime | None
    sentence: str
    life: Life


def plan(life: Life, reason: Reason, recent: int, now: datetime, *, backoff_s: float = BACKOFF_FIRST_S) -> Plan:
    """Say when a restart that was decided now may happen. `recent`: budgeted restarts of the last 600 s."""
    if reason in UNBUDGETED:
        return Plan(now, "at once: it was ordered", life)
    if recent >= BUDGET or life.unheard >= BUDGET:
        how = f"{recent} restarts in {BUDGET_WINDOW_S:.0f} s" if recent >= BUDGET else f"{life.unheard} unheard starts"
        return Plan(None, f"{how}: given up until an operator or a new registration", life)
    stable = life.restarted_at is None or (now - life.restarted_at).total_seconds() >= STABLE_S
    if stable or life.restarted_at is None:
        return Plan(now, "at once: the first in a while", replace(life, backoffs=0))
    wait_s = min(BACKOFF_MAX_S, backoff_s * 2 ** min(life.backoffs, 10))
    due_at = max(now, life.restarted_at + timedelta(seconds=wait_s))
    words = f"not before {due_at:%H:%M:%S}, {wait_s:.0f} s after the last"
    return Plan(due_at, words, replace(life, backoffs=life.backoffs + 1))


def retry_s(tries: int, *, backoff_s: float = BACKOFF_FIRST_S) -> float:
    """How long until a driver call that failed is made again: doubling, to 300 s. `tries` counts from 1."""
    return float(min(BACKOFF_MAX_S, backoff_s * 2 ** min(max(tries - 1, 0), 10)))


def fleet_max(agents: int) -> int:
    """How many of an engine's agents may be restarting at once."""
    return max(FLEET_FLOOR, int(agents * FLEET_SHARE))
