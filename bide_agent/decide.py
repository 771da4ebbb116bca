"""What an agent answers to a directive: values in, a word out. What then happens to the work is `directives.py`'s."""

from __future__ import annotations

from enum import Enum


class Result(Enum):
    """What Bide is told of a directive; the values are the words in `acknowledged`."""

    ASKED = "asked"
    """The work was asked to end, and will at its next tool boundary."""
    SAVING = "saving"
    """The work ends early, with what there is of it."""
    STOPPING = "stopping"
    """The work is canceled."""
    NOTED = "noted"
    """Heard; the work goes on, which an early request allows."""
    IGNORED = "ignored"
    """The work goes on although it was told to end."""
    ENDED = "ended"
    """Nothing runs here under this session's id."""


NEVER_EARLY = frozenset({"ceiling", "operator", "restart"})
"""Something follows from these checkpoints; the others are requests."""
SAVED_FOR = {"obey": NEVER_EARLY | {"tick_waiting", "critical_waiting"}, "ceiling_only": NEVER_EARLY}
"""By the word of `Behaviour.checkpoint`: the reasons for which work ends early. `ceiling_near` is only noted."""


def decide(kind: str | None, reason: str | None, *, checkpoint: str, stop: str, runs: bool, hears: bool) -> Result:
    """Say what becomes of the work of a directive's session.

    `checkpoint` and `stop` are words of `Behaviour`; `runs`: there is such work; `hears`: it does not hang. A kind or
    reason that is not known yet is noted: an agent may be older than its Bide.
    """
    if not runs:
        return Result.ENDED
    match kind:
        case "stop":
            return Result.STOPPING if hears and stop == "obey" else Result.IGNORED
        case "checkpoint" if checkpoint == "ignore" or not hears:
            return Result.IGNORED
        case "checkpoint" if reason in SAVED_FOR[checkpoint]:
            return Result.SAVING
        case _:
            return Result.NOTED


def gives_back(reason: str) -> bool:
    """Whether work that was saved for this reason is given back (`preempted`) instead of answered in part.

    A critical message takes the place of this one, which is to have its turn again; what else ends a turn early is
    about the turn itself, and its partial answer is its last word.
    """
    return reason == "critical_waiting"
