"""What is owed for what could not be kept: a 202 was promised for a message, an outcome to a fire (I1, C-V1).

The dead letter holds its bytes. Here a message's queue_id becomes a finished item, `failed (unreadable)`, and everybody
is told; a fire has failed so. Whatever else the fact says may be what is wrong with it: only what is plainly there is
taken over.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.queue import store
from services.queue.metrics import ENDED, ENQUEUED, TICKS
from services.queue.store import SQL
from shared import outbox
from shared.database import Connection
from shared.facts import ItemChanged, ItemStatus, TickSettled

REASON = "unreadable"
_CALLER_LENGTH_MAX = 256
_UUID = rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_NAME = rb"[A-Za-z0-9._-]{1,128}"
_MOMENT = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)"
_OF_A_TICK = {"workspace_id": _NAME, "queue_id": _UUID, "schedule_id": _UUID, "fire_at": _MOMENT}


@dataclass(frozen=True, slots=True)
class Remains:
    """What can be read of a message that cannot."""

    queue_id: UUID
    workspace_id: str
    caller_id: str
    caller_hash: bytes
    key_hash: bytes
    body_hash: bytes


async def end_unreadable(connection: Connection, raw: bytes, why: str) -> None:
    """End the message of a MessageBusy that was set aside; nothing is owed for one that has no id, or that is known.

    The workspace is locked first, so that a repeat of the message under the same id comes before or after, not between.
    """
    remains = read_remains(raw)
    if remains is None:
        return
    await store.lock(connection, [remains.workspace_id])
    if await store.find_ids(connection, [remains.queue_id]):
        return
    error = f"The message could not be read or stored ({why}) and was set aside for the operator. Send it again."
    await connection.execute(
        SQL["insert_unreadable"], remains.queue_id, remains.workspace_id, remains.caller_id, remains.caller_hash,
        remains.key_hash, remains.body_hash, REASON, error,
    )  # fmt: skip
    changed = ItemChanged(
        workspace_id=remains.workspace_id, rev=1, queue_id=remains.queue_id, status=ItemStatus.FAILED, reason=REASON
    )
    await outbox.add(connection, [changed])
    ENQUEUED.labels(REASON).inc()
    ENDED.labels(ItemStatus.FAILED.value).inc()


async def settle_unreadable(connection: Connection, raw: bytes, _why: str) -> None:
    """Say that the fire of a ScheduleTick that was set aside has failed; nothing is owed for one that became an item.

    Should an operator publish it again, it runs, and its end is told as well.
    """
    found = {name: _member(raw, form, name) for name, form in _OF_A_TICK.items()}
    known = {name: value.decode() for name, value in found.items() if value is not None}
    if known.keys() != found.keys():
        return
    await store.lock(connection, [known["workspace_id"]])
    if await store.find_ids(connection, [UUID(known["queue_id"])]):
        return
    settled = TickSettled(
        workspace_id=known["workspace_id"],
        rev=0,
        schedule_id=UUID(known["schedule_id"]),
        fire_at=datetime.fromisoformat(known["fire_at"]),
        outcome="failed",
        reason=REASON,
    )
    await outbox.add(connection, [settled])
    TICKS.labels(settled.outcome).inc()


def read_remains(raw: bytes) -> Remains | None:
    """Look for the members by their form: a parser would stop at whatever made the fact unreadable.

    A string that a caller chose cannot pretend to be one of them, because its quotes are escaped.
    """
    if not raw.lstrip().startswith(b"{"):
        return None
    queue_id = _member(raw, _UUID, "queue_id")
    workspace_id = _member(raw, _NAME, "workspace_id")
    if queue_id is None or workspace_id is None:
        return None
    caller_id = _text(_member(raw, rb'(?:[^"\\]|\\.)*', "caller_id") or b"")
    return Remains(
        queue_id=UUID(queue_id.decode()),
        workspace_id=workspace_id.decode(),
        caller_id=caller_id,
        caller_hash=_digest(raw, "caller_hash") or hashlib.sha256(caller_id.encode()).digest(),
        key_hash=_digest(raw, "key_hash") or bytes(32),
        body_hash=_digest(raw, "body_hash") or bytes(32),
    )


def _member(raw: bytes, form: bytes, name: str) -> bytes | None:
    found = re.search(rb'"%b"\s*:\s*"(%b)"' % (name.encode(), form), raw, re.DOTALL)
    return found[1] if found else None


def _digest(raw: bytes, name: str) -> bytes | None:
    found = _member(raw, rb"[A-Za-z0-9+/_-]{43}=", name)
    return base64.b64decode(found, altchars=b"-_") if found else None


def _text(escaped: bytes) -> str:
    """A JSON string as a column can hold it."""
    try:
        text = str(json.loads(b'"%b"' % escaped, strict=False))
    except ValueError:
        text = escaped.decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:_CALLER_LENGTH_MAX]
