"""What is said about a session, as facts. Kills go through the outbox; all else is said again by the next step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import NAMESPACE_URL, UUID, uuid5

from services.scheduler.decide import Directive, Gate, Kill, Say, Session, Stop, StopToo
from services.scheduler.metrics import DIRECTIVES, STEPS
from shared import outbox
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import DirectiveKind, Fact, SessionDirective, SessionGate, SessionKill, SessionStop
from shared.telemetry import log

_IDS = uuid5(NAMESPACE_URL, "urn:bide:session")


@dataclass(slots=True)
class Turn:
    """What a transaction did; told once it has committed."""

    told: list[Fact] = field(default_factory=list)
    stepped: list[tuple[Session, Session]] = field(default_factory=list)
    """Before and after."""
    ended: list[tuple[Session, str]] = field(default_factory=list)
    """And why."""
    failed: list[tuple[Session, str]] = field(default_factory=list)
    """Whose step could not be taken, and why."""
    more: bool = False


def facts(session: Session, says: Iterable[Say], now: datetime) -> list[Fact]:
    """The same words about the same session have the same id, whoever says them and however often."""
    about = {
        "workspace_id": session.workspace_id,
        "rev": session.rev,
        "session_id": session.session_id,
        "incarnation": session.incarnation,
    }
    return [_fact(session, say, about, now) for say in says]


def _fact(session: Session, say: Say, about: dict[str, object], now: datetime) -> Fact:
    match say:
        case Directive():
            return SessionDirective.model_validate(
                {
                    **about,
                    "directive_id": _id(session, say.kind, say.reason, say.about),
                    "kind": DirectiveKind(say.kind),
                    "reason": say.reason,
                    "deadline": say.deadline_at,
                }
            )
        case Stop():
            return SessionStop.model_validate({**about, "reason": say.reason})
        case StopToo():
            return SessionStop.model_validate({**about, "session_id": say.session_id, "reason": "ceiling"})
        case Gate():
            until = say.until if say.until is not None else now
            return SessionGate.model_validate({**about, "closed": say.until is not None, "gate_until": until})
        case Kill():
            order_id = _id(session, "kill", str(say.order), "")
            ordered = {"occurred_at": now, "order_id": order_id, "expires_at": say.expires_at}
            return SessionKill.model_validate({**about, **ordered})


def _id(session: Session, *words: str) -> UUID:
    return uuid5(_IDS, "\0".join((session.session_id, *words)))


async def order(connection: Connection, told: Sequence[Fact]) -> list[Fact]:
    """Put into the outbox what nothing would repeat; return the rest, which is posted after the commit."""
    kills = [fact for fact in told if isinstance(fact, SessionKill)]
    if kills:
        await outbox.add(connection, kills)
    return [fact for fact in told if not isinstance(fact, SessionKill)]


def tell(publisher: Publisher, turn: Turn) -> None:
    """Count, log and post what has been committed."""
    for before, after in turn.stepped:
        _note_step(before, after)
    for session, reason in turn.ended:
        _note_end(session, reason)
    _post(publisher, turn.told)


def _post(publisher: Publisher, told: Iterable[Fact]) -> None:
    for fact in told:
        publisher.post(fact)
        if isinstance(fact, SessionDirective):
            DIRECTIVES.labels(fact.kind.value, fact.reason).inc()


def _note_step(before: Session, after: Session) -> None:
    if after.state is not before.state:
        STEPS.labels(after.state.value).inc()
        log.info(
            "session_stepped", workspace_id=after.workspace_id, session_id=after.session_id, state=after.state.value,
            reason=after.stop_reason, started_at=after.started_at.isoformat(),
            deadline_at=after.deadline_at.isoformat() if after.deadline_at else None,
        )  # fmt: skip


def _note_end(session: Session, reason: str) -> None:
    STEPS.labels("ended").inc()
    log.info(
        "session_ended", workspace_id=session.workspace_id, session_id=session.session_id, state=session.state.value,
        reason=reason,
    )  # fmt: skip
