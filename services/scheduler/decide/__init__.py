"""The policies of the scheduler: what is due and what becomes of it (§4), and when a session must end (§5).

Values in, verdicts out: no clock, no I/O. The tables: tests/unit/test_scheduler_decide.py, test_scheduler_session*.py.
"""

from services.scheduler.decide.early import ASKS_MAX, Waiting, early, yields_to_ticks
from services.scheduler.decide.fires import (
    CATCH_UP,
    MOMENTS_MAX,
    OUTCOMES,
    WINDOW_MAX_S,
    WINDOW_MIN_S,
    Due,
    Outcome,
    Rule,
    Schedule,
    Several,
    bounced,
    bounded,
    due,
    edited,
    first_fire,
    gives_back,
    offset,
    overdue,
    ran_at,
    timing,
    upcoming,
)
from services.scheduler.decide.kills import Began, Closing, Flight, Held, Hold, held_by
from services.scheduler.decide.says import Directive, Gate, Kill, Say, Stop, StopToo
from services.scheduler.decide.seen import Activity, News, Seen, compare, foreign
from services.scheduler.decide.sessions import (
    Ask,
    Pace,
    Rules,
    Session,
    State,
    Step,
    ask_by_hand,
    ceiling_at,
    has_order,
    is_over,
    kill_held,
    kill_refused,
    next_step,
    revised,
    step,
    stop,
)

__all__ = [
    "ASKS_MAX", "CATCH_UP", "MOMENTS_MAX", "OUTCOMES", "WINDOW_MAX_S", "WINDOW_MIN_S", "Activity", "Ask", "Began",
    "Closing", "Directive", "Due", "Flight", "Gate", "Held", "Hold", "Kill", "News", "Outcome", "Pace", "Rule", "Rules",
    "Say", "Schedule", "Seen", "Session", "Several", "State", "Step", "Stop", "StopToo", "Waiting", "ask_by_hand",
    "bounced", "bounded", "ceiling_at", "compare", "due", "early", "edited", "first_fire", "foreign", "gives_back",
    "has_order", "held_by", "is_over", "kill_held", "kill_refused", "next_step", "offset", "overdue", "ran_at",
    "revised", "step", "stop", "timing", "upcoming", "yields_to_ticks",
]  # fmt: skip
