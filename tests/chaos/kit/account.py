"""The books of a storm: what was sent, promised, delivered, answered and ended; each duplicate with what caused it.

Nothing here asks the services how they are doing: callers know what they were told, agents know what reached them, and
`GET /queue/{id}` says how each promise ended.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from bide_agent.record import Received
from tests.chaos.kit.processes import Fault

WRITE_S = 2.0
"""An answer that came so shortly before a death may not have been written by then."""


class Witness(Protocol):
    """An agent that tells what has reached it: one in this process, or the record of one that is a process itself."""

    @property
    def workspace(self) -> str: ...
    @property
    def received(self) -> Sequence[Received]: ...


@dataclass(slots=True, kw_only=True)
class Sent:
    """One message of one caller, and what the caller was told about it."""

    workspace: str
    caller: str
    message_id: str
    text: str
    sent_at: float
    proxy: int = 0
    status: int | None = None
    """Of the last answer; None: no answer came."""
    code: str | None = None
    queue_id: str | None = None
    """Promised under it (202), or told with `keep_unknown`."""
    promised: bool = False
    promised_at: float = float("inf")
    answered: bool = False
    told: Counter[str] = field(default_factory=Counter)
    """Refusals on the way, each tried again: code → count."""
    item: dict[str, Any] | None = None
    """How it ended, as the caller sees it."""

    @property
    def fate(self) -> str:
        if self.promised:
            return "promised"
        if self.answered:
            return "answered"
        return "broken" if self.status is None else f"refused:{self.code}"


@dataclass(frozen=True)
class Duplicate:
    """Two runs of one message at its agent, and the fault in between (None: nothing explains it)."""

    message_id: str
    first: Received
    second: Received
    cause: Fault | None


class Account:
    """What callers and agents know, put together."""

    def __init__(self, sent: Sequence[Sent], agents: Iterable[Witness], faults: Sequence[Fault]) -> None:
        self.sent = sent
        self.faults = faults
        self.runs: dict[str, list[Received]] = defaultdict(list)
        self.agents = list(agents)
        for agent in self.agents:
            for each in agent.received:
                self.runs[each.message_id or ""].append(each)

    @property
    def promised(self) -> list[Sent]:
        return [each for each in self.sent if each.promised]

    @property
    def delivered(self) -> list[Sent]:
        """Promised, completed, and the agent has had it."""
        return [each for each in self.promised if _status(each) == "completed" and self.runs[each.message_id]]

    @property
    def ended_otherwise(self) -> list[Sent]:
        """Promised, and visibly ended with a reason, without an answer of the agent."""
        return [
            each
            for each in self.promised
            if _status(each) in {"failed", "expired", "canceled", "superseded"} and (each.item or {}).get("reason")
        ]

    @property
    def lost(self) -> list[Sent]:
        """Promised or answered, and neither delivered nor visibly ended."""
        known = {id(each) for each in (*self.delivered, *self.ended_otherwise)}
        kept = [each for each in self.promised if id(each) not in known]
        return kept + [each for each in self.sent if each.answered and not self.runs[each.message_id]]

    @property
    def duplicates(self) -> list[Duplicate]:
        return [
            Duplicate(message_id, first, second, self._cause(first, second))
            for message_id, runs in self.runs.items()
            for first, second in pairwise(sorted(runs, key=_begun))
        ]

    def _cause(self, first: Received, second: Received) -> Fault | None:
        """The fault that hit while the first run was under way, or before its answer can have been written."""
        same_item = first.queue_id == second.queue_id and (first.delivery or 0) < (second.delivery or 0)
        if not same_item:
            return None
        if first.outcome not in {None, "answered", "cut_short"}:
            return Fault(first.outcome, "agent", _begun(first))  # its own doing, and the test's wish
        ended_at = first.ended_at if first.ended_at is not None else float("inf")
        for fault in self.faults:
            until_at = fault.ended_at if fault.ended_at is not None else fault.begun_at
            if fault.begun_at <= ended_at + WRITE_S and until_at >= _begun(first) and fault.begun_at <= _begun(second):
                return fault
        return None

    def out_of_order(self) -> list[tuple[Sent, Sent]]:
        """Kept messages of one caller and workspace that first reached the agent before one that was sent earlier.

        Earlier: it was promised before the later one was sent. None counts that a failed attempt held back (I3).
        """
        return self._passed(each for each in self.delivered if (each.item or {}).get("attempts", 0) == 0)

    def passed_a_backlog(self) -> list[tuple[Sent, Sent]]:
        """Live forwards that reached the agent before a message that the same caller knew to be kept.

        For storms with one proxy that lives through: another one, or its next life, cannot know what was kept.
        """
        return self._passed(each for each in self.sent if each.answered and not each.promised)

    def _passed(self, later: Iterable[Sent]) -> list[tuple[Sent, Sent]]:
        lanes: dict[tuple[str, str], list[Sent]] = defaultdict(list)
        for each in self.delivered:
            if (each.item or {}).get("attempts", 0) == 0:
                lanes[each.workspace, each.caller].append(each)
        return [
            (earlier, each)
            for each in later
            for earlier in lanes[each.workspace, each.caller]
            if earlier.promised_at < each.sent_at and self._first_run(each) < self._first_run(earlier)
        ]

    def _first_run(self, sent: Sent) -> float:
        return min(_begun(each) for each in self.runs[sent.message_id])

    def overlaps(self) -> int:
        """Turns that began while the one before was under way, at agents of capacity 1 (I4)."""
        count = 0
        for agent in self.agents:
            turns = sorted((_begun(each), each.ended_at or float("inf")) for each in agent.received)
            count += sum(ended > begun for (_, ended), (begun, _) in pairwise(turns))
        return count

    def line(self) -> str:
        """The books in one line."""
        fates = Counter(each.fate for each in self.sent)
        told: Counter[str] = sum((each.told for each in self.sent), Counter())
        causes = Counter(f"{each.cause.what} {each.cause.whom}" if each.cause else "?" for each in self.duplicates)
        others = Counter(f"{_status(each)}({(each.item or {}).get('reason')})" for each in self.ended_otherwise)
        return (
            f"sent {len(self.sent)}: answered {fates['answered']}, promised {fates['promised']} = "
            f"delivered {len(self.delivered)} + ended {dict(others)}, lost {len(self.lost)}; "
            f"broken {fates['broken']}, refused { {fate: n for fate, n in fates.items() if ':' in fate} }, "
            f"tried again after {dict(told)}; duplicates {len(self.duplicates)} {dict(causes)}"
        )

    def check(self, *, may_fail: bool = False) -> None:
        """Promised = delivered + visibly ended, lost 0, every duplicate explained. Prints the books.

        `may_fail`: some messages are meant to end without an answer; otherwise that is a failure too.
        """
        print(self.line())
        assert self.promised, "the storm kept nothing: it tests nothing"
        assert not self.lost, self.lost[:3]
        assert len(self.promised) == len(self.delivered) + len(self.ended_otherwise)
        assert may_fail or not self.ended_otherwise, self.ended_otherwise[:3]
        unexplained = [each for each in self.duplicates if each.cause is None]
        assert not unexplained, unexplained[:3]


def _status(sent: Sent) -> str | None:
    return (sent.item or {}).get("status")


def _begun(received: Received) -> float:
    return received.started_at or 0.0
