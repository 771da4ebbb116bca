"""What the scheduler asks of agents, until they have taken it: told in the reply to each heartbeat, at every replica.

A directive is said again every 10 s under the same id. It is told until a heartbeat acknowledges it, until its deadline
is past, or until nobody has said it for a while. Of one session there is one stop, or the newest checkpoint of each
reason. Moments are seconds since 1970 by this replica's clock, and are passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from services.proxy.metrics import DIRECTIVES
from shared.facts import Acknowledged, DirectiveKind, SessionDirective

HEARD_FOR_S = 30.0
"""One that nobody has said again for this long (three times) is past."""
_REMEMBERED_MAX = 20_000
"""Ids that were acknowledged; the oldest are forgotten, long after they are said no more."""
_SWEEP_S = 30.0

_Slot = tuple[str, str]
"""Session, and what of it there is one of: its stop, or a checkpoint for this reason."""


@dataclass(slots=True)
class _Told:
    directive: SessionDirective
    heard_at: float


@dataclass(slots=True)
class Directives:
    """All of them, by workspace."""

    _told: dict[str, dict[_Slot, _Told]] = field(default_factory=dict)
    _acknowledged: OrderedDict[UUID, None] = field(default_factory=OrderedDict)
    _swept_at: float = 0.0

    def hear(self, fact: SessionDirective, now: float) -> bool:
        """Take one; say whether it is news. What was acknowledged is not told again."""
        if now - self._swept_at > _SWEEP_S:
            self._sweep(now)
        if fact.directive_id in self._acknowledged:
            self._acknowledged.move_to_end(fact.directive_id)
            return False
        if _is_past(fact, now, now):
            return False
        told = self._told.setdefault(fact.workspace_id, {})
        slot = _slot(fact)
        known = told.get(slot)
        if known is not None and known.directive.directive_id == fact.directive_id:
            if fact.rev >= known.directive.rev:
                known.directive = fact
            known.heard_at = now
            return False
        if _outdoes(told, fact, now):
            return False
        for other in [each for each in told if each == slot or (_is_stop(fact) and each[0] == fact.session_id)]:
            DIRECTIVES.labels(told.pop(other).directive.kind.value, "replaced").inc()
        told[slot] = _Told(fact, now)
        DIRECTIVES.labels(fact.kind.value, "heard").inc()
        return True

    def acknowledge(self, workspace_id: str, directive_ids: Iterable[UUID]) -> list[UUID]:
        """The agent has taken these, whoever told it; which of them is news."""
        told = self._told.get(workspace_id)
        news: list[UUID] = []
        for directive_id in directive_ids:
            if directive_id not in self._acknowledged:
                news.append(directive_id)
            self._acknowledged[directive_id] = None
            self._acknowledged.move_to_end(directive_id)
            for slot, each in list(told.items()) if told else ():
                if told is not None and each.directive.directive_id == directive_id:
                    del told[slot]
                    DIRECTIVES.labels(each.directive.kind.value, "acknowledged").inc()
        while len(self._acknowledged) > _REMEMBERED_MAX:
            self._acknowledged.popitem(last=False)
        if told is not None and not told:
            del self._told[workspace_id]
        return news

    def of(self, workspace_id: str, incarnation: int, now: float) -> list[SessionDirective]:
        """What is asked of this life of the agent now, in the order in which it was heard.

        What an earlier life was asked is void; of a later one this replica hears in a moment.
        """
        told = self._told.get(workspace_id)
        if told is None:
            return []
        for slot, each in list(told.items()):
            void = each.directive.incarnation < incarnation
            if void or _is_past(each.directive, each.heard_at, now):
                del told[slot]
                DIRECTIVES.labels(each.directive.kind.value, "void" if void else "expired").inc()
        if not told:
            del self._told[workspace_id]
        return [each.directive for each in told.values() if each.directive.incarnation == incarnation]

    def wants(self, fact: SessionDirective, incarnation: int, now: float) -> bool:
        """Whether it is worth a call of its own: of this life, not past, and nobody has acknowledged it."""
        return (
            fact.incarnation == incarnation
            and fact.directive_id not in self._acknowledged
            and not _is_past(fact, now, now)
        )

    def _sweep(self, now: float) -> None:
        """Forget what is past in workspaces that send no heartbeats."""
        self._swept_at = now
        for workspace_id in list(self._told):
            self.of(workspace_id, 0, now)


def taken(acknowledged: Iterable[Acknowledged]) -> dict[UUID, str]:
    """What an agent has taken, with its word about it; not what found no such session there.

    A directive may come before its message does: the agent is asked again until the directive is past.
    """
    return {each.directive_id: each.result for each in acknowledged if each.result != "ended"}


def shape(directive: SessionDirective) -> dict[str, str | None]:
    """A directive as agents get it (2-http)."""
    return {
        "id": str(directive.directive_id),
        "kind": directive.kind.value,
        "reason": directive.reason,
        "session_id": directive.session_id,
        "deadline": directive.deadline.isoformat() if directive.deadline is not None else None,
    }


def _slot(fact: SessionDirective) -> _Slot:
    return fact.session_id, DirectiveKind.STOP.value if _is_stop(fact) else fact.reason


def _is_stop(fact: SessionDirective) -> bool:
    return fact.kind is DirectiveKind.STOP


def _outdoes(told: dict[_Slot, _Told], fact: SessionDirective, now: float) -> bool:
    """Whether something that is told already makes this one pointless."""
    if not _is_stop(fact):
        stop = told.get((fact.session_id, DirectiveKind.STOP.value))
        if stop is not None and not _is_past(stop.directive, stop.heard_at, now):
            return True
    known = told.get(_slot(fact))
    return known is not None and _age(fact) < _age(known.directive)


def _age(fact: SessionDirective) -> tuple[int, float]:
    """Grows with each that is younger: another life, then a later deadline.

    Ids say nothing: they are derived from what is asked. Nor does the rev: a repeat carries the session's newest,
    whichever directive it repeats.
    """
    return fact.incarnation, fact.deadline.timestamp() if fact.deadline is not None else 0.0


def _is_past(fact: SessionDirective, heard_at: float, now: float) -> bool:
    if now - heard_at >= HEARD_FOR_S:
        return True
    return fact.deadline is not None and fact.deadline.timestamp() <= now
