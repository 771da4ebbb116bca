"""What goes to an agent, where its answer goes, and how a forward may end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.agents import Limits, Until
from shared.outcomes import Verdict

Headers = Sequence[tuple[bytes, bytes]]


class Sink(Protocol):
    """Where an answer goes. It never raises: a caller that is gone is its own business."""

    async def start(self, status: int, headers: Headers, length: int | None) -> None: ...
    async def write(self, chunk: bytes, *, more: bool) -> None: ...
    async def give(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it at once."""

    def cut(self) -> None:
        """End the connection instead of the answer, so that what is missing is not taken for the end."""


class LiveSink(Sink, Protocol):
    """One that can say whether anything of an answer was given to it."""

    began: bool


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Outgoing:
    """What goes to the agent."""

    url: str
    body: bytes
    headers: Headers
    limits: Limits
    last_life: Callable[[], float]
    until: Until | None = None
    """Bounds it instead of the total limit; None: it is no session."""


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Passed:
    """The caller has the agent's answer; `recorded` is it, unless it is too large for those who joined."""

    verdict: Verdict
    status: int
    headers: Headers
    recorded: bytes | None


@dataclass(frozen=True, slots=True)
class Back:
    """Busy, not delivered or preempted: nothing was passed on, the message is to be kept."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing was passed on, and there is no answer of the agent that could be."""

    verdict: Verdict


Ending = Passed | Back | Broken


TaskKnown = Callable[[str], None]
"""Told the id of the agent's Task before the caller is: where an answer is too large to be held back, right after."""
