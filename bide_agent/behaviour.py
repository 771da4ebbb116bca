"""How an agent behaves, and misbehaves: values in, values out.

A *fate* is what becomes of the next messages instead of an answer. Each is a counter: n means the next n messages, -1
all of them until it is changed. Several fates at once are spent in the order of `DOOR_FATES` and `TURN_FATES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

ALWAYS = -1
HUGE_MAX = 64 * 1024 * 1024
WORDS = {
    "answer": ("message", "task"),
    "checkpoint": ("obey", "ceiling_only", "ignore"),
    "stop": ("obey", "ignore"),
    "sigterm": ("obey", "ignore"),
}
"""The behaviours that are one of several words."""


class BehaviourError(ValueError):
    """No such behaviour, or a value that it cannot have."""


class Fate(Enum):
    """What becomes of a message instead of an answer; the values are the names of the counters."""

    WRONG_TOKEN = "wrong_token"  # noqa: S105 - a behaviour's name
    BARE_503 = "bare_503"
    CUT = "cut"
    SILENT = "silent"
    FAILING = "failing"
    FAILING_RPC = "failing_rpc"
    REFUSING = "refusing"
    PREEMPTED = "preempted"
    HALF_ANSWER = "half_answer"


DOOR_FATES = (Fate.WRONG_TOKEN, Fate.BARE_503)
"""Decided before the message is looked at: they need no slot and are met at capacity too."""
TURN_FATES = (
    Fate.CUT, Fate.SILENT, Fate.FAILING, Fate.FAILING_RPC, Fate.REFUSING, Fate.PREEMPTED, Fate.HALF_ANSWER,
)  # fmt: skip
"""Decided when a slot is taken; at capacity none is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What an agent does until it is told otherwise."""

    work_s: float = 0.3
    """Length of a turn."""
    slow_s: float = 0.0
    """Stall before the head of every answer, within the turn."""
    answer: str = "message"
    """`message`, or `task`: a completed Task with an artifact (streams are always Tasks)."""
    asynchronous: bool = False
    """Answer a working Task at once and finish it later; done as well for a caller that asked for it."""
    polls_fail_s: float = 0.0
    """GetTask answers HTTP 500 for the first so many seconds of a Task."""
    huge: int = 0
    """Pad answers: the body of a whole one has exactly so many bytes, the text of a streamed one."""
    deaf: bool = False
    """Send no heartbeats."""
    always_zero: bool = False
    """Report `active_tasks` 0 whatever runs."""
    check_token: bool = True
    """Ask callers for the delivery token, once it is known."""
    retry_after_s: int = 1
    """What the busy answer says."""
    dies: bool = False
    """End the process without a word when a message says `die`."""
    control: bool = True
    """Declare the capability `control` (told at the next registration) and take directives over HTTP."""
    checkpoint: str = "obey"
    """`obey`: end the turn early, but only note `ceiling_near`; `ceiling_only`: note every early request; `ignore`."""
    save_s: float = 0.05
    """How long a turn that obeys a checkpoint goes on until its partial answer."""
    stop: str = "obey"
    """`obey`: cancel the turn; `ignore`: go on, also when its Task is to be canceled."""
    sigterm: str = "obey"
    """`ignore`: a process of its own (`python -m bide_agent`) goes on after a SIGTERM."""
    wrong_token: int = 0
    """401, whatever the caller carries."""
    bare_503: int = 0
    """503 without Retry-After or body of ours, as from a gateway before it."""
    cut: int = 0
    """Close the connection once the request is read."""
    silent: int = 0
    """Take the message and never answer; the slot is free when the caller hangs up. No progress meanwhile."""
    failing: int = 0
    """HTTP 500."""
    failing_rpc: int = 0
    """JSON-RPC -32603, unmarked."""
    refusing: int = 0
    """JSON-RPC -32602."""
    preempted: int = 0
    """JSON-RPC error with `data.code` "preempted"."""
    half_answer: int = 0
    """Work, send the head and half of the body, close; a stream ends without its last events."""


def changed(behaviour: Behaviour, changes: Mapping[str, Any]) -> Behaviour:
    """Return `behaviour` with `changes`; for a counter, true means always and false never.

    Raises:
        BehaviourError: there is no such name, or the value does not fit it.
    """
    known = {field.name: type(field.default) for field in fields(Behaviour)}
    unknown = changes.keys() - known.keys()
    if unknown:
        raise BehaviourError(f"no behaviour is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return replace(behaviour, **{name: _fitting(name, known[name], value) for name, value in changes.items()})


def _fitting(name: str, kind: type, value: Any) -> Any:
    if name in {fate.value for fate in Fate} and isinstance(value, bool):
        return ALWAYS if value else 0
    if kind is bool and isinstance(value, bool):
        return value
    if name in WORDS:
        if isinstance(value, str) and value in WORDS[name]:
            return value
        raise BehaviourError(f"{name} cannot be {value!r}: it is one of {', '.join(WORDS[name])}")
    if kind in {int, float} and not isinstance(value, bool) and isinstance(value, int | float):
        lowest = ALWAYS if kind is int else 0
        highest = HUGE_MAX if name == "huge" else math.inf
        if lowest <= value <= highest and value != math.inf and (kind is float or int(value) == value):
            return kind(value)
    raise BehaviourError(
        f"{name} cannot be {value!r}: it is a {kind.__name__}, as in {name}={getattr(Behaviour(), name)!r}"
    )


def spend(behaviour: Behaviour, fates: Iterable[Fate]) -> tuple[Fate | None, Behaviour]:
    """Take the first of `fates` that is still owed; return it and what is left."""
    for fate in fates:
        count = getattr(behaviour, fate.value)
        if count:
            return fate, behaviour if count == ALWAYS else replace(behaviour, **{fate.value: count - 1})
    return None, behaviour


def parse(words: Iterable[str]) -> dict[str, Any]:
    """Read `name=value` and bare `name` (true), as a command line gives them; `behave` checks them.

    Raises:
        BehaviourError: a value is no number, `true`, `false` or word.
    """
    return dict(_pair(word) for word in words)


def _pair(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not name:
        raise BehaviourError(f"{word!r} has no name; write name=value")
    if not equals or value in {"true", "false"}:
        return name, value != "false"
    try:
        number = float(value)
    except ValueError:
        return name, value
    return name, int(number) if number.is_integer() else number
