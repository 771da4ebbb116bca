"""When liveness distrusts its own eyes, or its ears (policies §6, self-distrust)."""

from __future__ import annotations

from datetime import datetime

from services.liveness.decide.judge import Doubt
from services.liveness.decide.window import CEILING_S, FLOOR_S

SUSPECT_SHARE = 3
"""A third of an engine's agents …"""
SUSPECTS_MIN = 3
"""… and at least so many."""
BEATERS_MIN = 3
"""Fewer agents that fall silent together may well have died together."""


def doubt_of(
    *, agents: int, suspects: int, expected: int, last_beat_at: datetime | None, cadence_s: float,
    listening_since: datetime | None, self_slow: bool, wedged_after_s: float, now: datetime,
) -> Doubt:  # fmt: skip
    """Weigh what all agents of an engine look like now.

    `suspects`: those that turned suspect in the last 30 s, with all that look dead now.
    `expected`: agents that send beats. `listening_since`: since when proxies are heard; None: none is.
    """
    many = suspects >= SUSPECTS_MIN and suspects * SUSPECT_SHARE >= agents
    silent_s = (now - last_beat_at).total_seconds() if last_beat_at is not None else 0.0
    mute = expected >= BEATERS_MIN and silent_s > min(max(FLOOR_S, 2 * cadence_s), CEILING_S)
    return Doubt(
        fleet=many or (mute and listening_since is not None),
        deaf=listening_since is None,
        self_slow=self_slow,
        listening_since=listening_since,
        wedged_after_s=wedged_after_s,
    )
