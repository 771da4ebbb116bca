"""The policies of the queue: the order in a line, what may be delivered, what becomes of an item, and why it waits.

Values in, values out: no clock, no I/O. Times are seconds since 1970. The tables: tests/unit/test_queue_decide*.py.
"""

from services.queue.decide.fates import (
    Fate,
    Finish,
    Item,
    Reply,
    Requeue,
    busy_wait_s,
    fate,
    may_have_been_stopped,
)
from services.queue.decide.gate import (
    closed_until,
    foreign,
    hear_gate,
    in_gate,
    is_abandoned,
    is_being_let_go,
    is_engaged,
    is_named,
    live_forwards,
    living,
)
from services.queue.decide.line import (
    CRITICAL_LANE,
    INFO_PATIENCE_MS,
    REST_LANE,
    Floors,
    Head,
    Place,
    lane,
    rank,
    turns,
)
from services.queue.decide.lives import begin_life, hear_status, is_outlived
from services.queue.decide.ticks import (
    Admission,
    Keep,
    Merge,
    Outcome,
    Overlap,
    Schedule,
    Settle,
    Tick,
    admit,
    has_room,
    merged,
    outcome,
    withdrawn,
)
from services.queue.decide.why import Waiting, why
from services.queue.decide.workspace import (
    UNSAID,
    Closed,
    Ending,
    Forwards,
    Gate,
    Workspace,
    begin,
    by_priority,
    closed,
    end,
    gate_until,
    hear_beat,
    hear_forwards,
    keep,
    leave,
    lowered,
    paused,
    place_told,
    spare,
    taken,
    turn_s,
)

__all__ = [
    "CRITICAL_LANE", "INFO_PATIENCE_MS", "REST_LANE", "UNSAID", "Admission", "Closed", "Ending", "Fate", "Finish",
    "Floors", "Forwards", "Gate", "Head", "Item", "Keep", "Merge", "Outcome", "Overlap", "Place", "Reply", "Requeue",
    "Schedule", "Settle", "Tick", "Waiting", "Workspace", "admit", "begin", "begin_life", "busy_wait_s", "by_priority",
    "closed", "closed_until", "end", "fate", "foreign", "gate_until", "has_room", "hear_beat", "hear_forwards",
    "hear_gate", "hear_status", "in_gate", "is_abandoned", "is_being_let_go", "is_engaged", "is_named", "is_outlived",
    "keep", "lane", "leave", "live_forwards", "living", "lowered", "may_have_been_stopped", "merged", "outcome",
    "paused", "place_told", "rank", "spare", "taken", "turn_s", "turns", "why", "withdrawn",
]  # fmt: skip
