"""How much of an agent is in use: one function, for the proxy that forwards and the queue that delivers.

An agent's own count is a sample that is seconds old; what we started and ended since is known to the moment. Neither is
enough alone: the count knows of work that is not ours, and ours knows what the count cannot yet show.
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLED_EARLIER_S = 2.0
"""A beat was sampled up to this long before it came in: what ended in between is still in its count."""

FORWARDS_FRESH_S = 15.0
"""A proxy that has not beaten for this long no longer counts: its live forwards died with it."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What an agent last said of itself. `at`: when it came in, seconds since 1970 by the receiver's clock."""

    active: int
    at: float
    cadence_s: float

    def is_fresh(self, now: float) -> bool:
        """Older than two cadences and 5 s it is no beat."""
        return now - self.at <= 2 * self.cadence_s + 5


def counts_as_ended(ended_at: float, beat_at: float) -> bool:
    """Whether work that was answered at `ended_at` may still be in the count of the beat at `beat_at`."""
    return ended_at >= beat_at - SAMPLED_EARLIER_S


def in_use(*, now: float, beat: Beat | None, running: int, started_since: int, ended_since: int) -> int:
    """Tasks that the agent has in hand.

    `running`: deliveries and live forwards under way now. `started_since`: of ours, begun after the beat, also those
    that have ended meanwhile. `ended_since`: of ours, answered, for which `counts_as_ended` holds. What came back busy
    or was not delivered is in neither; what ended unknown is not in `ended_since`.
    """
    if beat is None or not beat.is_fresh(now):
        return running
    return max(running, beat.active + started_since - ended_since)
