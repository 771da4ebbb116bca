"""Whether a message may take one more place in the line of its workspace, and when one frees."""

from __future__ import annotations

from services.proxy.decide.arrival import Arrival
from services.proxy.decide.head import whole_s
from services.proxy.decide.verdict import Ask, Forward, Keep, Refuse, Verdict

OVERLOAD_RETRY_S = 30
"""Retry-After of a full line where no turn was measured yet: what waits is measured in turns, not in milliseconds."""
OVERLOAD_RETRY_MAX_S = 600
"""Whoever is told to stay away for longer is not told when there is room after all."""


def ask_or_refuse(arrival: Arrival) -> Refuse | Ask | None:
    """Whoever brings an id or a key that stands for nothing takes a new place, like everybody."""
    refuse = _refuse_depth(arrival) or _refuse_quota(arrival)
    if refuse is not None and arrival.known is None and (arrival.keyed or arrival.repeated):
        return Ask()
    return refuse


def _refuse_depth(arrival: Arrival) -> Refuse | None:
    share = arrival.share
    if share.depth >= share.depth_max:
        sentence = (
            f"{share.depth} messages wait for this workspace, and it takes {share.depth_max}. Send it again later."
        )
        return Refuse(429, "queue_full", sentence, retry_after_s=place_frees_in_s(share.turn_s, arrival.in_use_max))
    if share.others and share.depth > share.depth_max / 2 and share.callers > share.depth_max / 2:
        sentence = "More than half of what may wait here is yours, and others wait too. Send it again later."
        retry_after_s = place_frees_in_s(share.turn_s, arrival.in_use_max)
        return Refuse(429, "share_exceeded", sentence, retry_after_s=retry_after_s)
    return None


def place_frees_in_s(turn_s: float | None, max_concurrent: int) -> int:
    """Say after how many seconds a place in a full line frees: turns run beside each other, and each end frees one."""
    if turn_s is None:
        return OVERLOAD_RETRY_S
    return whole_s(min(turn_s / max_concurrent, OVERLOAD_RETRY_MAX_S))


def _refuse_quota(arrival: Arrival) -> Refuse | None:
    if arrival.critical_wait_s <= 0:
        return None
    sentence = (
        "You have sent all CRITICAL messages of this minute. Send it as TASK, or again after Retry-After seconds."
    )
    return Refuse(429, "critical_quota", sentence, retry_after_s=whole_s(arrival.critical_wait_s))


def takes_place(arrival: Arrival, verdict: Verdict) -> bool:
    """Whether it is one more message for the agent: it joined nothing, and is no item and nothing that runs already."""
    return isinstance(verdict, (Keep, Forward)) and not arrival.known and not arrival.key_running
