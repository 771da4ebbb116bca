"""A message as it was sent: everything that its route and its keeping need, read once from headers and envelope."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from uuid_utils import uuid7

from services.proxy.api.answers import Dialect
from services.proxy.api.identity import Caller, digest
from services.proxy.api.wire import Refused, Request, own_id
from services.proxy.decide import Refuse
from shared.a2a import INVALID_PARAMS, INVALID_REQUEST, Envelope, Verb
from shared.facts import Priority

INFO_TTL_S = 300.0
_KEY_MAX = 1024
_SKEW_MS = 5_000
"""How far ahead of our clock the time in an X-Queue-Id may be: another replica made it."""


class Wish(Enum):
    """What the caller asked for, should its message have to wait (2-http)."""

    AT_ONCE = "at_once"
    BLOCKING = "blocking"
    STREAM = "stream"
    LIMITED = "limited"


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Message:
    """One message for one workspace."""

    workspace_id: str
    caller: Caller
    envelope: Envelope
    body: bytes
    """As it goes to the agent: with what was missing."""
    request_id: str
    """As it is echoed."""
    queue_word: str
    """Its id in the queue, as it is told; one that goes straight through needs no other form of it."""
    key_hash: bytes
    body_hash: bytes
    has_key: bool
    """The caller chose the key: a second message with it is the same one."""
    explicit_key: bool
    repeated: bool
    priority: Priority
    not_before: datetime | None
    expires_at: datetime | None
    hops: int
    wish: Wish
    wait_s: float
    dialect: Dialect

    @property
    def queue_id(self) -> UUID:
        return UUID(self.queue_word)

    @property
    def context_id(self) -> str:
        return self.envelope.context_id or self.queue_word

    def about_task(self, agent_task_id: str) -> Message:
        """The same message with the agent's own task id in the place of ours."""
        edits = {"params.message.taskId": agent_task_id}
        if not self.envelope.names_task:
            return self
        return replace(self, body=_completed(self.envelope, self.queue_word, edits))


def read_message(
    request: Request,
    caller: Caller,
    workspace_id: str,
    envelope: Envelope,
    *,
    hops: int,
    wait_max_s: float,
    now: datetime,
) -> Message:
    """Read the message of a send or a stream.

    Raises:
        Refused: a value is not what it must be.
    """
    told = _told_id(request.header(b"x-queue-id"), now)
    queue_word = str(told or uuid7())
    key = _key(request)
    wishes = envelope.wishes
    priority = _priority(wishes.get("priority") or request.header(b"x-bide-priority"))
    wish, wait_s = _wish(request, envelope)
    if wish is Wish.LIMITED and caller.caller_id == workspace_id:
        wish = Wish.AT_ONCE  # it would wait for the end of the very turn that waits for it
    version = request.header(b"a2a-version") or ""
    return Message(
        workspace_id=workspace_id,
        caller=caller,
        envelope=envelope,
        body=_completed(envelope, queue_word, {}),
        request_id=envelope.request_id or f'"{queue_word}"',
        queue_word=queue_word,
        key_hash=digest(f"key:{key}" if key else envelope.message_id or queue_word),
        # Without the value of `id`: an SDK's retry numbers its request anew, and it is the same message.
        body_hash=hashlib.sha256(envelope.unnumbered).digest(),
        has_key=key is not None or envelope.message_id is not None,
        explicit_key=key is not None,
        repeated=told is not None,
        priority=priority,
        not_before=_not_before(wishes.get("not_before")),
        expires_at=_expires_at(request, envelope, wishes, priority, now),
        hops=hops,
        wish=wish,
        wait_s=min(wait_s, wait_max_s),
        dialect=Dialect(modern="/" not in envelope.method, plain_keys=not version.startswith("1")),
    )


def _completed(envelope: Envelope, queue_word: str, edits: dict[str, Any]) -> bytes:
    """The body with what the original callers leave out; every other byte as it came."""
    if not envelope.says_version:
        edits["jsonrpc"] = "2.0"
    if envelope.request_id is None:
        edits["id"] = queue_word
    if envelope.message_id is None:
        edits["params.message.messageId"] = queue_word
    return envelope.with_values(edits)


def _bad(sentence: str, code: int = INVALID_PARAMS) -> Refused:
    return Refused(Refuse(400, "bad_value", sentence, code))


def _key(request: Request) -> str | None:
    key = request.header(b"idempotency-key")
    if key is not None and not 0 < len(key) <= _KEY_MAX:
        raise _bad(f"Idempotency-Key has 1 to {_KEY_MAX} characters. Use a uuid.", INVALID_REQUEST)
    return key


def _told_id(said: str | None, now: datetime) -> UUID | None:
    if said is None:
        return None
    queue_id = own_id(said)
    if queue_id is None or queue_id.int >> 80 > now.timestamp() * 1000 + _SKEW_MS:
        raise _bad(
            "X-Queue-Id is none that Bide gave. Send back the one you were told, or leave it out.", INVALID_REQUEST
        )
    return queue_id


def _priority(said: Any) -> Priority:
    if said is None:
        return Priority.TASK
    try:
        return Priority(said)
    except ValueError:
        raise _bad("The priority is CRITICAL, TASK or INFO, in upper case.") from None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AHEAD_MAX = timedelta(days=3653)


def _not_before(said: Any) -> datetime | None:
    if said is None:
        return None
    try:
        moment = datetime.fromisoformat(said)
        if moment.tzinfo is not None and moment.astimezone(UTC) < datetime.now(UTC) + _AHEAD_MAX:
            return max(moment.astimezone(UTC), _EPOCH)
    except (ValueError, TypeError, OverflowError):
        pass
    raise _bad("not_before is an ISO 8601 moment with its offset within ten years, for example 2026-01-31T09:00:00Z.")


def _expires_at(
    request: Request, envelope: Envelope, wishes: Mapping[str, Any], priority: Priority, now: datetime
) -> datetime | None:
    said = wishes.get("ttl_s")
    said = said if said is not None else request.header(b"x-bide-ttl")
    said = said if said is not None else envelope.expires_in_s
    if said is None:
        return now + timedelta(seconds=INFO_TTL_S) if priority is Priority.INFO else None
    return now + timedelta(seconds=_seconds(said, "A time to live"))


_YEARS_S = 10 * 366 * 86_400.0


def _seconds(said: Any, what: str) -> float:
    try:
        seconds = float(said)
    except (ValueError, TypeError):
        seconds = math.nan
    if not 0 <= seconds <= _YEARS_S or isinstance(said, bool):
        raise _bad(f"{what} is a number of seconds, 0 or more.")
    return seconds


_WAIT = re.compile(r"\bwait\s*=\s*\"?([0-9.]+)", re.IGNORECASE)


def _wish(request: Request, envelope: Envelope) -> tuple[Wish, float]:
    if envelope.verb is Verb.STREAM:
        return Wish.STREAM, 0.0
    prefer = request.header(b"prefer") or ""
    limit = _WAIT.search(prefer)
    timeout = limit[1] if limit else request.header(b"x-timeout")
    if timeout is not None:
        return Wish.LIMITED, _seconds(timeout, "The wait")
    if "respond-async" in prefer.lower() or envelope.blocking is False or envelope.return_immediately:
        return Wish.AT_ONCE, 0.0
    modern = (request.header(b"a2a-version") or "").startswith("1")
    return (Wish.BLOCKING if modern or envelope.blocking else Wish.AT_ONCE), 0.0


def now_utc() -> datetime:
    return datetime.now(UTC)
