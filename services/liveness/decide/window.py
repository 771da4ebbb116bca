"""How long an agent may be silent: learnt from its own cadence, on receive time (policies §6).

15 s is the original number; with its own cadence of 30 s it missed a healthy agent half the time (A-L-02, A-L-04).
"""

from __future__ import annotations

from dataclasses import dataclass

FLOOR_S = 15.0
CEILING_S = 120.0
LEARNT_BEATS = 3
"""Until so many are in, what the agent declares is used."""
_WEIGHT = 0.125
_DEVIATION_WEIGHT = 0.25
"""As TCP learns its round trip (RFC 6298): the mean slowly, the deviation faster."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """What is known of the gaps between beats."""

    beats: int = 0
    mean_s: float = 0.0
    deviation_s: float = 0.0


def learn(gaps: Gaps, gap_s: float | None) -> Gaps:
    """Take in one beat; `gap_s` since the one before it, None: it is the first.

    A gap beyond the ceiling was an outage and no cadence: it counts as the ceiling.
    """
    if gap_s is None:
        return Gaps(gaps.beats + 1, gaps.mean_s, gaps.deviation_s)
    gap_s = min(max(gap_s, 0.0), CEILING_S)
    if gaps.beats <= 1:
        return Gaps(gaps.beats + 1, gap_s, gap_s / 2)
    off_s = abs(gap_s - gaps.mean_s)
    return Gaps(
        gaps.beats + 1,
        gaps.mean_s + _WEIGHT * (gap_s - gaps.mean_s),
        gaps.deviation_s + _DEVIATION_WEIGHT * (off_s - gaps.deviation_s),
    )


def window_s(gaps: Gaps, declared_s: float) -> float:
    """Twice the mean and four deviations, 15 to 120 s; until three beats are in, twice what was declared."""
    learnt = gaps.beats >= LEARNT_BEATS
    wanted_s = 2 * gaps.mean_s + 4 * gaps.deviation_s if learnt else 2 * declared_s
    return min(max(FLOOR_S, wanted_s), CEILING_S)
