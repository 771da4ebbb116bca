"""Whose an agent's own Tasks are: whoever got one in the answer to his message, and nobody else.

The newest are remembered here, so that the forward that saw one waits for nothing; `loops.Writing` writes them behind
it, and every replica, also one that was started since, finds them in Postgres.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

_REMEMBERED_MAX = 50_000
_UNWRITTEN_MAX = 50_000
"""While Postgres is away. What is more is forgotten, and so is nobody's."""

Owner = tuple[bytes, bytes]
"""Hash of the Task, hash of its caller."""


def task_hash(workspace_id: str, task_id: str) -> bytes:
    return hashlib.sha256(f"{workspace_id}\0{task_id}".encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True)
class Owners:
    """The newest of them. `wake` is called when there is something to write."""

    wake: Callable[[], None] = lambda: None
    dropped: int = 0
    _known: OrderedDict[bytes, frozenset[bytes]] = field(default_factory=OrderedDict)
    """Task → its callers, as far as this replica has heard."""
    _unwritten: OrderedDict[Owner, None] = field(default_factory=OrderedDict)

    def tell(self, workspace_id: str, task_id: str, caller_hash: bytes) -> None:
        """The agent gave this Task to this caller."""
        owner = (task_hash(workspace_id, task_id), caller_hash)
        if caller_hash in self.of(owner[0]):
            return
        self.learn(owner)
        self._unwritten[owner] = None
        if len(self._unwritten) > _UNWRITTEN_MAX:
            self._unwritten.popitem(last=False)
            self.dropped += 1
        if len(self._unwritten) == 1:
            self.wake()

    def learn(self, owner: Owner) -> None:
        """It is written already."""
        hashed, caller_hash = owner
        self._known[hashed] = self.of(hashed) | {caller_hash}
        self._known.move_to_end(hashed)
        while len(self._known) > _REMEMBERED_MAX:
            self._known.popitem(last=False)

    def of(self, hashed: bytes) -> frozenset[bytes]:
        """Whose this Task is; others may be written down by other replicas."""
        return self._known.get(hashed, frozenset())

    def take_unwritten(self, most: int) -> list[Owner]:
        """The oldest that nobody has written yet; `put_back` what could not be."""
        taken = list(self._unwritten)[:most]
        for owner in taken:
            del self._unwritten[owner]
        return taken

    def put_back(self, owners: list[Owner]) -> None:
        for owner in reversed(owners):
            self._unwritten[owner] = None
            self._unwritten.move_to_end(owner, last=False)

    @property
    def unwritten(self) -> int:
        return len(self._unwritten)
