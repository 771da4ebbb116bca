"""The only SQL of queue: one method per step, rows in and out as values.

Every method works in the caller's transaction, so that a whole turn (finish, requeue, claim) is one.
"""

from services.queue.store.claims import Claimed, claim, find_lost, item_of, running
from services.queue.store.endings import Ended, Settled, canceled, finish, requeue
from services.queue.store.kept import (
    Known,
    find_active,
    find_ids,
    insert,
    insert_ended,
    key_of,
    place_of,
    reserve_keys,
)
from services.queue.store.statements import PRIORITIES, PRIORITY_OF, SQL
from services.queue.store.workspaces import (
    Locked,
    clock,
    lock,
    oldest,
    read,
    read_active,
    save,
    save_counters,
    shift_clocks,
)

__all__ = [
    "PRIORITIES", "PRIORITY_OF", "SQL", "Claimed", "Ended", "Known", "Locked", "Settled", "canceled", "claim", "clock",
    "find_active", "find_ids", "find_lost", "finish", "insert", "insert_ended", "item_of", "key_of", "lock", "oldest",
    "place_of", "read", "read_active", "requeue", "reserve_keys", "running", "save", "save_counters", "shift_clocks",
]  # fmt: skip
