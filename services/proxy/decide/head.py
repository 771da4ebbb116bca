"""What is known of a call before its body is read, and why that is enough to refuse it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from services.proxy.decide.verdict import Refuse

RESERVED_PREFIXES = ("system:", "webhook:", "channel:", "test:")
"""Names of callers that only Bide itself may use (A-P-06)."""


class Presence(Enum):
    """What the registry says of the workspace that is called."""

    KNOWN = "known"
    UNKNOWN = "unknown"
    REMOVED = "removed"


class Standing(Enum):
    """What the caller's credentials are worth."""

    GOOD = "good"
    NONE = "none"
    UNKNOWN = "unknown"
    MISMATCH = "mismatch"
    FORGED = "forged"
    UNSURE = "unsure"
    """The token is not in this replica's copy, and Postgres does not answer."""


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Head:
    """What is known before the body is read."""

    presence: Presence = Presence.KNOWN
    standing: Standing = Standing.GOOD
    hops: int | None = 0
    """None: the header is no number."""
    hops_max: int = 16
    rate_wait_s: float = 0.0
    """Until this caller may call again; 0: now."""


def admit(head: Head) -> Refuse | None:
    """Say why the call is refused whatever its body holds; None: read the body."""
    match head.presence:
        case Presence.UNKNOWN:
            return Refuse(404, "workspace_unknown", "There is no such workspace. Check the id, or register it.", -32001)
        case Presence.REMOVED:
            return Refuse(410, "workspace_removed", "The workspace was removed. Take its address off your list.")
        case Presence.KNOWN:
            return refuse_standing(head.standing) or _refuse_hops(head) or _refuse_rate(head)


def refuse_standing(standing: Standing) -> Refuse | None:
    """Say why these credentials do not let the caller in; None: they do."""
    match standing:
        case Standing.GOOD:
            return None
        case Standing.NONE:
            return Refuse(401, "token_missing", "Send your token: Authorization: Bearer <token>.")
        case Standing.UNKNOWN:
            return Refuse(401, "token_unknown", "Nobody has this token. Use the one that register returned.")
        case Standing.MISMATCH:
            sentence = (
                "X-Workspace-ID names somebody else than the token does. Send the token's own id, or leave it out."
            )
            return Refuse(403, "caller_mismatch", sentence)
        case Standing.FORGED:
            names = ", ".join(RESERVED_PREFIXES)
            return Refuse(403, "caller_reserved", f"Names that begin with {names} are Bide's own. Use another name.")
        case Standing.UNSURE:
            sentence = "The token cannot be checked now: the registry does not answer. Send the request again."
            return Refuse(503, "token_unchecked", sentence, retry_after_s=1)


def _refuse_hops(head: Head) -> Refuse | None:
    if head.hops is None:
        return Refuse(400, "hops_unreadable", "X-Bide-Hops is a number. Pass on what you got, plus one.", -32600)
    if head.hops > head.hops_max:
        sentence = f"The message has passed more than {head.hops_max} hops. Look for agents that call in a circle."
        return Refuse(508, "too_many_hops", sentence)
    return None


def _refuse_rate(head: Head) -> Refuse | None:
    if head.rate_wait_s <= 0:
        return None
    sentence = "You call more often than this proxy takes from one caller. Send it again after Retry-After seconds."
    return Refuse(429, "rate_limited", sentence, retry_after_s=whole_s(head.rate_wait_s))


def whole_s(wait_s: float) -> int:
    """A Retry-After that is true: never before the moment, and never 0."""
    return max(1, math.ceil(wait_s))
