"""What was set aside of the bus, for an operator: listed, and published again once its cause is gone.

Only of the queue's own schema, where what the broker gave up on is kept too: no other service stores facts of the bus
yet. A replay is a fact of its own: its fact_id is new, for the inbox may know the old one, and all
else is as it came. It leaves through the outbox in the transaction that marks the letter, so it takes effect once
however often it is asked for. Whatever cannot be read still, or fails again, is a letter still, or again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from services.queue.aside import REASON
from services.queue.store import SQL
from shared import outbox
from shared.batches import Unreadable, decode_batch, encode_batch
from shared.database import Connection
from shared.facts import Fact, MessageBusy, QueueQuery
from shared.intake import set_aside, split_or_whole
from shared.telemetry import log
from shared.topology import ROUTES, Kind

Answer = tuple[int, Mapping[str, Any]]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_RANDOM_BITS = 80
"""Below the milliseconds of a uuid7: its version, 12 bits, its variant, 62 bits."""
_VERSION_BITS = (0xF << 76) | (0b11 << 62)
_UUID7 = (7 << 76) | (0b10 << 62)

_OPERATORS_ONLY: Answer = (403, {"code": "operators_only", "detail": "Only an operator may see what was set aside."})


async def dead_letters(connection: Connection, fact: QueueQuery) -> Answer:
    """List letters, the newest first; never what is in them."""
    if fact.caller_hash is not None:
        return _OPERATORS_ONLY
    try:
        before = _place(fact.cursor)
    except (ValueError, OverflowError):
        return 400, {"code": "bad_cursor", "detail": "The cursor is not one that a listing gave. Start without it."}
    rows = await connection.fetch(SQL["list_letters"], *before, fact.limit + 1)
    page = rows[: fact.limit]
    letters = [
        {
            "digest": row["digest"].hex(),
            "at": _iso(row["at"]),
            "fact_type": row["fact_type"],
            "reason": row["reason"],
            "error": row["error"],
            "size": row["size"],
            "replayed_at": _iso(row["replayed_at"]),
        }
        for row in page
    ]
    more = len(rows) > fact.limit
    return 200, {"items": letters, "next_cursor": _cursor(page[-1]["at"], page[-1]["digest"]) if more else None}


def _place(cursor: str | None) -> tuple[datetime | None, bytes | None]:
    if cursor is None:
        return None, None
    at, digest = cursor.split(".")
    return _EPOCH + int(at) * _MICROSECOND, bytes.fromhex(digest)


def _cursor(at: datetime, digest: bytes) -> str:
    return f"{(at - _EPOCH) // _MICROSECOND}.{digest.hex()}"


async def replay(connection: Connection, fact: QueueQuery) -> Answer:
    """Publish a letter again. Asked twice, it answers the same and does nothing more."""
    if fact.caller_hash is not None:
        return _OPERATORS_ONLY
    letter = await connection.fetchrow(SQL["lock_letter"], fact.dead_letter)
    if fact.dead_letter is None or letter is None:
        return 404, {"code": "unknown_dead_letter", "detail": "There is no such dead letter. List them for a digest."}
    kind = _kept_kind(letter["fact_type"])
    if kind is None:
        detail = "It was true for a moment only: whoever said it says it again by himself. Nothing was done."
        return 409, {"code": "not_replayable", "detail": detail}
    again = await _read_again(connection, kind, letter["fact"], batch=letter["reason"] == "undeliverable")
    if not again.facts:
        error = again.unreadable[0].error if again.unreadable else "it holds no fact"
        return 409, {"code": "still_unreadable", "detail": f"It cannot be read by this version: {error}. It stays."}
    replayed_at = letter["replayed_at"]
    if replayed_at is None:
        for bad in again.unreadable:
            await set_aside(connection, kind.__name__, bad.raw, "invalid", bad.error)
        for ended, queue_id in again.retried:
            await connection.execute(SQL["set_retried"], ended, queue_id)
        await outbox.add_encoded(connection, kind, again.facts)
        replayed_at = await connection.fetchval(SQL["mark_replayed"], fact.dead_letter)
        log.info("dead_letter_replayed", digest=fact.dead_letter.hex(), fact=kind.__name__, facts=len(again.facts))
    return 200, {
        "digest": fact.dead_letter.hex(),
        "fact_type": letter["fact_type"],
        "replayed_at": _iso(replayed_at),
        "facts": len(again.facts),
        "still_unreadable": len(again.unreadable),
        "queue_ids": again.queue_ids,
    }


def _kept_kind(fact_type: str) -> type[Fact] | None:
    """The fact that a letter says it is, by its name or the queue it died in; None if an inbox would not know it."""
    names = ((route.fact, (route.fact.__name__, route.queue(""))) for route in ROUTES if route.kind is Kind.QUORUM)
    return next((fact for fact, both in names if fact_type in both), None)


@dataclass(slots=True)
class _Again:
    """A letter as the facts it is to become."""

    facts: list[bytes] = field(default_factory=list)
    queue_ids: list[str] = field(default_factory=list)
    """Under which its messages are items from now on."""
    retried: list[tuple[UUID, UUID]] = field(default_factory=list)
    """Items that had ended unreadable, and what each comes back as."""
    unreadable: list[Unreadable] = field(default_factory=list)


async def _read_again(connection: Connection, kind: type[Fact], letter: bytes, *, batch: bool) -> _Again:
    again = _Again()
    for raw in split_or_whole(letter) if batch else [letter]:
        try:
            members = json.loads(raw)
            renewed = _encode({**members, "fact_id": str(uuid7())})
        except (TypeError, ValueError, RecursionError) as error:
            again.unreadable.append(Unreadable(raw, f"{type(error).__name__}: {error}"[:300]))
            continue
        facts, unreadable = decode_batch(kind, encode_batch([renewed]))
        if unreadable:
            again.unreadable.append(Unreadable(raw, unreadable[0].error))
            continue
        if isinstance(facts[0], MessageBusy):
            ended = facts[0].queue_id
            queue_id = await _id_now(connection, ended)
            # Whoever was waiting for it is not any more, nor are the forwards that its proxy told of under way.
            # Its id is made from the old one, so it may be there already: two letters of one message are one item.
            changes: dict[str, Any] = {
                "queue_id": str(queue_id), "id_is_new": False, "reply_to": None, "beat": None,
            }  # fmt: skip
            if queue_id != ended:
                changes["retry_of"] = str(ended)
                again.retried.append((ended, queue_id))
            renewed = _encode({**json.loads(renewed), **changes})
            again.queue_ids.append(str(queue_id))
        again.facts.append(renewed)
    return again


def _encode(members: Mapping[str, Any]) -> bytes:
    """The members that we do not know too: a newer version may have written them."""
    return json.dumps(members).encode()


async def _id_now(connection: Connection, queue_id: UUID) -> UUID:
    """The id under which a message comes back: its own, unless its end has been told under that one."""
    item = await connection.fetchrow(SQL["find_item"], queue_id)
    told = item is not None and (item["status"], item["ended_reason"]) == ("failed", REASON)
    return id_after(queue_id) if told else queue_id


def id_after(queue_id: UUID) -> UUID:
    """The id under which a message that had ended unreadable comes back: one, in however many letters it is."""
    random = int.from_bytes(hashlib.sha256(b"replayed" + queue_id.bytes).digest()[:10]) & ~_VERSION_BITS
    return UUID(int=(queue_id.int >> _RANDOM_BITS << _RANDOM_BITS) | random | _UUID7)


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment is not None else None
