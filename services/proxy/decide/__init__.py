"""The route of a message, before any byte of it goes to the agent, and what the registry says of a workspace.

Values in, values out: no clock, no I/O. Moments are seconds since 1970 by this replica's clock. The specification is
`tests/unit/test_proxy_decide*.py`.
"""

from services.proxy.decide.arrival import Arrival, InFlight, Share
from services.proxy.decide.head import RESERVED_PREFIXES, Head, Presence, Standing, admit, refuse_standing
from services.proxy.decide.place import place_frees_in_s, takes_place
from services.proxy.decide.route import is_stale, route
from services.proxy.decide.verdict import Ask, Attach, Forward, Keep, Reason, Refuse, Verdict
from services.proxy.decide.workspace import DOWN, Workspace, is_outlived, said_s

__all__ = [
    "DOWN", "RESERVED_PREFIXES", "Arrival", "Ask", "Attach", "Forward", "Head", "InFlight", "Keep", "Presence",
    "Reason", "Refuse", "Share", "Standing", "Verdict", "Workspace", "admit", "is_outlived", "is_stale",
    "place_frees_in_s", "refuse_standing", "route", "said_s", "takes_place",
]  # fmt: skip
