"""How often each caller may do something: a token bucket per caller, kept as the moment in which it is full again.

A bucket that is full says no more than none, so it is forgotten. There is no clock here: whoever asks says what time
it is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

REMEMBERED_MAX = 10_000


@dataclass(slots=True)
class Limit:
    """`per_s` on average, `burst` at once; a `per_s` of 0 is no limit."""

    per_s: float
    burst: float
    remembered_max: int = REMEMBERED_MAX
    """Buckets at most; beyond it whoever did nothing for longest may begin anew."""
    _full_at: OrderedDict[bytes, float] = field(default_factory=OrderedDict)

    def wait_s(self, caller: bytes, now: float) -> float:
        """How long until it may be done once more; 0: now."""
        full_at = self._full_at.get(caller)
        if full_at is None or not self.per_s:
            return 0.0
        # A thousandth of one is given away: sums of floats are a little off, and the burst shall be whole.
        return max(0.0, full_at - now - (self.burst - 0.999) / self.per_s)

    def spend(self, caller: bytes, now: float) -> None:
        """It is done."""
        if not self.per_s:
            return
        self._full_at[caller] = max(self._full_at.get(caller, now), now) + 1 / self.per_s
        self._full_at.move_to_end(caller)
        self._forget(now)

    def give_back(self, caller: bytes) -> None:
        """It turned out not to be done: at most once for each `spend`."""
        full_at = self._full_at.get(caller)
        if full_at is not None and self.per_s:
            self._full_at[caller] = full_at - 1 / self.per_s

    def take(self, caller: bytes, now: float) -> float:
        """Do it if it may be done: how long to wait, 0 where it is done."""
        wait_s = self.wait_s(caller, now)
        if not wait_s:
            self.spend(caller, now)
        return wait_s

    def _forget(self, now: float) -> None:
        buckets = self._full_at
        while buckets:
            caller = next(iter(buckets))
            if buckets[caller] > now and len(buckets) <= self.remembered_max:
                return
            del buckets[caller]
