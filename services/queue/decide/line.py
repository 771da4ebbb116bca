"""The order in a line: lanes, ranks, and whose turn it is.

CRITICAL has a lane of its own and goes first. The rest is one line by rank, a number that is written once: when the
message came, and for INFO two minutes more. So waiting longer counts for both alike (ageing), and nothing has to be
counted again while they wait. Should CRITICAL never end, every second turn goes to who has waited too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from shared.facts import Priority

Place = tuple[int, int]
"""Where an item stands in the line of its workspace: (lane, rank_ms), the lowest first."""
Floors = tuple[int, int]
"""For each lane the rank below which nothing waits: a claim begins there and meets nothing that has died before."""

CRITICAL_LANE, REST_LANE = 0, 1
INFO_PATIENCE_MS = 120_000
"""INFO goes behind the TASK messages of its first two minutes, and before those that come later."""
RANK_SLACK_MS = 10_000
"""How long before its fact a message may have come in: a live forward that bounces is kept only after its attempt."""


def rank(queue_id: UUID, fact_id: UUID, priority: Priority) -> int:
    """The rank of a message: the millisecond in which its body was read, so that first in is first out, and patience.

    That millisecond is the queue_id's, but a caller may bring one back and would choose its place: it is believed only
    within RANK_SLACK_MS of the fact, which our proxy made.
    """
    came = max(queue_id.int >> 80, (fact_id.int >> 80) - RANK_SLACK_MS)
    return came + (INFO_PATIENCE_MS if priority is Priority.INFO else 0)


def lane(priority: Priority) -> int:
    return CRITICAL_LANE if priority is Priority.CRITICAL else REST_LANE


@dataclass(frozen=True, slots=True)
class Head:
    """One of the first in a lane: where its row stands (ctid), and since when it waits."""

    version: tuple[int, int]
    lane: int
    enqueued_at: float


def turns(
    critical: Sequence[Head],
    rest: Sequence[Head],
    *,
    room: int,
    served_critical: bool,
    now: float,
    starvation_limit_s: float,
) -> list[Head]:
    """Who goes next, `room` of them at most. Each lane is given in its order; `served_critical`: what went last was."""
    first, second = list(critical), list(rest)
    chosen: list[Head] = []
    while len(chosen) < room and (first or second):
        starves = bool(second) and now - second[0].enqueued_at > starvation_limit_s
        from_rest = not first or (served_critical and starves)
        chosen.append((second if from_rest else first).pop(0))
        served_critical = not from_rest
    return chosen
