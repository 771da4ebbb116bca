"""The only SQL of queue: one method per step, rows in and out as values.

Every method works in the caller's transaction, so that a whole turn (finish, requeue, claim) is one.
"""

from services.queue.store.claims import Claimed, claim, find_lost, item_of, running
from services.queue.store.endings import Ended, Fire, Settled, end, ending_instead, finish, fire_of, requeue
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
from services.queue.store.sessions import Stop, Stopped, beat_proxies, living_proxies, stop
from services.queue.store.statements import PRIORITIES, PRIORITY_OF, SQL
from services.queue.store.ticks import (
    Prompt,
    caller_of,
    find_schedules,
    find_ticks,
    insert_ticks,
    merge_ticks,
    read_prompts,
    release_ticks,
    save_bodies,
    save_schedules,
)
from services.queue.store.workspaces import (
    Locked,
    begun_at,
    clock,
    lock,
    oldest,
    read,
    read_active,
    save,
    save_counters,
    set_bounds,
    shift_clocks,
)

__all__ = [
    "PRIORITIES", "PRIORITY_OF", "SQL", "Claimed", "Ended", "Fire", "Known", "Locked", "Prompt", "Settled", "Stop",
    "Stopped", "beat_proxies", "begun_at", "caller_of", "claim", "clock", "end", "ending_instead", "find_active",
    "find_ids", "find_lost", "find_schedules", "find_ticks", "finish", "fire_of", "insert", "insert_ended",
    "insert_ticks", "item_of", "key_of", "living_proxies", "lock", "merge_ticks", "oldest", "place_of", "read",
    "read_active", "read_prompts", "release_ticks", "requeue", "reserve_keys", "running", "save", "save_bodies",
    "save_counters", "save_schedules", "set_bounds", "shift_clocks", "stop",
]  # fmt: skip
