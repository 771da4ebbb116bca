"""What becomes of an order to kill: it skips debounce, backoff and budget, never the fence (policies §5)."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from enum import StrEnum

from services.liveness.decide.life import DOWN, Life


class Ruling(StrEnum):
    """The first four are answers; an expired order gets none, for the session may well go on: order again."""

    APPLIED = "applied"
    STALE = "stale"
    ALREADY_ENDED = "already_ended"
    NOT_KILLABLE = "not_killable"
    EXPIRED = "expired"
    KILL = "kill"
    JOIN = "join"
    """A restart of this very life is on its way; its end answers."""


def rule(
    life: Life | None, *, incarnation: int, ordered_at: datetime, expires_at: datetime, is_opened: bool,
    was_killed: bool, drivers: Collection[str], now: datetime,
) -> Ruling:  # fmt: skip
    """Rule on an order.

    `ordered_at`: by the database's clock, as starts are; `is_opened`: a restart is open; `was_killed`: an order against
    this life was applied; `drivers`: those that may act.
    """
    if life is None or (life.driver not in drivers and not life.removed):
        return Ruling.NOT_KILLABLE
    # An agent without boot ids keeps its number through a restart: the container that was meant is gone all the same.
    was_replaced = life.restarted_at is not None and ordered_at < life.restarted_at
    if incarnation < life.incarnation or (was_replaced and not was_killed):
        return Ruling.STALE
    if life.removed or was_killed:
        return Ruling.ALREADY_ENDED
    if expires_at <= now:
        return Ruling.EXPIRED
    if is_opened:
        return Ruling.JOIN
    return Ruling.ALREADY_ENDED if life.status in DOWN and incarnation == life.incarnation else Ruling.KILL
