"""What this replica has promised to keep, until others show that they know of it, and who waits for what becomes of it.

A keep counts as backlog from the moment it is promised: the next message must not pass it. It stops counting when a
newer word of the queue covers it, and at the latest `_LOST_S` before a word that must have covered it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from shared.facts import ItemChanged, ItemKept, ItemStatus, Priority

_LOST_S = 10.0
"""A backlog that was read this long after a keep was promised, and a keep of which nothing was ever heard: the queue
has read it, or the broker never had it. Counted from the end of the queue service's last absence, if that was later."""
_PROMISED_MAX = 20_000
"""Promises that are remembered for GET /queue; the oldest go first, and are asked of the queue from then on."""


@dataclass(slots=True)
class Keep:
    """One promise. `shown_at`: when the queue said that the row is written."""

    queue_id: UUID
    workspace_id: str
    caller_id: str
    caller_hash: bytes
    priority: Priority
    reason: str
    promised_at: float
    shown_at: float | None = None
    confirmed: bool = False
    """Whether the broker said that it has it; until then it may not be there at all."""
    told: asyncio.Future[ItemKept] | None = None
    key_hash: bytes | None = None


@dataclass(slots=True)
class Waiter:
    """Somebody waits for the end of an item."""

    ended: asyncio.Future[ItemChanged]
    status: ItemStatus = ItemStatus.QUEUED


@dataclass(slots=True)
class _Held:
    """What still waits in one workspace of this replica's keeps, as far as is known, and how much of it is whose."""

    items: dict[UUID, bytes] = field(default_factory=dict)
    counts: Counter[bytes] = field(default_factory=Counter)


@dataclass(slots=True)
class Keeps:
    """All promises of this replica."""

    _promised: dict[UUID, Keep] = field(default_factory=dict)
    """Not yet shown by the queue."""
    _pending: dict[str, dict[UUID, Keep]] = field(default_factory=dict)
    """By workspace: what counts as backlog although no copy of the backlog has it."""
    _held: dict[str, _Held] = field(default_factory=dict)
    _waiters: dict[UUID, list[Waiter]] = field(default_factory=dict)

    def promise(self, keep: Keep) -> asyncio.Future[ItemKept]:
        """Count it from now on; the future tells what the queue makes of it."""
        keep.told = asyncio.get_running_loop().create_future()
        while len(self._promised) >= _PROMISED_MAX:
            del self._promised[next(iter(self._promised))]
        self._promised[keep.queue_id] = keep
        self._pending.setdefault(keep.workspace_id, {})[keep.queue_id] = keep
        held = self._held.setdefault(keep.workspace_id, _Held())
        if keep.queue_id not in held.items:
            held.items[keep.queue_id] = keep.caller_hash
            held.counts[keep.caller_hash] += 1
        return keep.told

    def withdraw(self, keep: Keep) -> None:
        """The broker does not have it."""
        self._promised.pop(keep.queue_id, None)
        self._drop_pending(keep.workspace_id, keep.queue_id)
        self._release(keep.workspace_id, keep.queue_id)

    def find(self, queue_id: UUID) -> Keep | None:
        """A promise that the queue has not shown yet."""
        return self._promised.get(queue_id)

    def has(self, workspace_id: str, caller_hash: bytes, *, queue_id: UUID, key_hash: bytes) -> bool:
        """Whether this id or this key is one of this caller's promises that the queue has not covered yet."""
        pending = self._pending.get(workspace_id)
        return pending is not None and any(
            keep.caller_hash == caller_hash and (keep.queue_id == queue_id or keep.key_hash == key_hash)
            for keep in pending.values()
        )

    def pending(self, workspace_id: str) -> int:
        return len(self._pending.get(workspace_id, ()))

    def promises(self, workspace_id: str) -> Collection[Keep]:
        """What `pending` counts."""
        return self._pending.get(workspace_id, {}).values()

    def share(self, workspace_id: str, caller_hash: bytes) -> tuple[int, int]:
        """How many of this replica's keeps wait in the workspace: of this caller, of others."""
        held = self._held.get(workspace_id)
        if held is None:
            return 0, 0
        return held.counts[caller_hash], len(held.items) - held.counts[caller_hash]

    def hear_kept(self, fact: ItemKept, copied_at: float | None, *, unbroken_since: float = 0.0) -> None:
        keep = self._promised.pop(fact.queue_id, None)
        if keep is None:
            return
        keep.shown_at = fact.occurred_at.timestamp()
        if keep.told is not None and not keep.told.done():
            keep.told.set_result(fact)
        if fact.duplicate_of is not None or fact.conflict:
            self._drop_pending(keep.workspace_id, keep.queue_id)
            self._release(keep.workspace_id, keep.queue_id)
        elif copied_at is not None:
            self.covered(keep.workspace_id, copied_at, unbroken_since=unbroken_since)

    def hear_changed(self, fact: ItemChanged) -> None:
        for waiter in self._waiters.get(fact.queue_id, ()):
            waiter.status = fact.status
            if fact.status not in _OPEN and not waiter.ended.done():
                waiter.ended.set_result(fact)
        if fact.status is not ItemStatus.QUEUED:
            self._promised.pop(fact.queue_id, None)
            self._drop_pending(fact.workspace_id, fact.queue_id)
            self._release(fact.workspace_id, fact.queue_id)

    def covered(
        self, workspace_id: str, copied_at: float, *, waiting: int | None = None, unbroken_since: float = 0.0
    ) -> None:
        """A copy of the backlog was true at `copied_at`: what it must hold counts there, not here."""
        pending = self._pending.get(workspace_id)
        for keep in list(pending.values()) if pending else ():
            known = keep.shown_at is not None and copied_at >= keep.shown_at
            if known or copied_at > max(keep.promised_at, unbroken_since) + _LOST_S:
                # It stays promised: the queue may still wait for its database, and a GET must not say "unknown".
                self._drop_pending(workspace_id, keep.queue_id)
                if not keep.confirmed and keep.shown_at is None:
                    self._promised.pop(keep.queue_id, None)  # the broker never had it: GET asks the queue
        if waiting == 0 and not self.pending(workspace_id):
            # Nothing waits there at all: whatever was not heard to end has ended.
            self._held.pop(workspace_id, None)

    def workspaces(self) -> list[str]:
        """Where something is pending or held."""
        return list(self._pending.keys() | self._held.keys())

    @contextmanager
    def waiting_for(self, *queue_ids: UUID) -> Iterator[Waiter]:
        """Hear of the end of any of these items for the length of the block."""
        waiter = Waiter(asyncio.get_running_loop().create_future())
        for queue_id in queue_ids:
            self._waiters.setdefault(queue_id, []).append(waiter)
        try:
            yield waiter
        finally:
            waiter.ended.cancel()
            for queue_id in queue_ids:
                others = [each for each in self._waiters.get(queue_id, ()) if each is not waiter]
                if others:
                    self._waiters[queue_id] = others
                else:
                    self._waiters.pop(queue_id, None)

    def _drop_pending(self, workspace_id: str, queue_id: UUID) -> None:
        pending = self._pending.get(workspace_id)
        if pending is not None:
            pending.pop(queue_id, None)
            if not pending:
                del self._pending[workspace_id]

    def _release(self, workspace_id: str, queue_id: UUID) -> None:
        held = self._held.get(workspace_id)
        caller_hash = held.items.pop(queue_id, None) if held else None
        if held is None or caller_hash is None:
            return
        held.counts[caller_hash] -= 1
        if held.counts[caller_hash] <= 0:
            del held.counts[caller_hash]
        if not held.items:
            del self._held[workspace_id]


_OPEN = (ItemStatus.QUEUED, ItemStatus.DISPATCHED)
