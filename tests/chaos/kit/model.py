"""What the queue must do, said again in plain Python: items, places, attempts, capacity. It calls nothing of the queue.

Times are seconds since 1970 as the caller counts them. What the queue draws by lot (how long it waits) is observed and
held against its bounds; everything else is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

FRESH_S = 15.0
EARLIER_S = 2.0
WAIT_MIN_S, WAIT_MAX_S = 0.05, 60.0
ATTEMPTS_MAX, DEATHS_MAX = 5, 3
SLACK_MS = 10_000
Place = tuple[int, int, UUID]
Key = tuple[str, str, str]


@dataclass(slots=True)
class Item:
    """One message that was accepted. `status` is the row's; once it has ended, everything is final."""

    queue_id: UUID
    workspace: str
    caller: str
    key: str
    body: str
    lane: int = 1
    rank_ms: int = 0
    status: str = "queued"
    reason: str | None = None
    delivery_no: int = 0
    attempts: int = 0
    deaths: int = 0
    owner: str | None = None
    task: str | None = None
    cancel: bool = False
    not_before: float | None = None
    waits: tuple[float, float] | None = None
    """How long it has just been told to wait, at least and at most; until that was observed."""
    expires_at: float | None = None
    give_up_at: float | None = None

    @property
    def place(self) -> Place:
        return (self.lane, self.rank_ms, self.queue_id)

    @property
    def is_active(self) -> bool:
        return self.status in {"queued", "dispatched"}

    def end(self, status: str, reason: str | None) -> None:
        self.status, self.reason, self.owner = status, reason, None


@dataclass(slots=True)
class Delivery:
    """One of our deliveries, as the agent's capacity sees it. `how`: answered, neither, unknown; None while it runs."""

    begun: float
    how: str | None = None
    ended: float = 0.0


@dataclass(slots=True)
class Beat:
    incarnation: int
    rev: int
    at: float
    active: int
    cadence_s: float
    heard_at: float


@dataclass(slots=True)
class Proxy:
    """The newest beat of one proxy: `running` are starts, `ended` are (start, end, outcome)."""

    rev: int
    at: float
    running: Sequence[float]
    ended: Sequence[tuple[float, float, str]]


@dataclass(slots=True)
class Seat:
    """A workspace."""

    name: str
    registry_rev: int = 0
    reachable: bool = False
    maximum: int = 1
    least_maximum: int = 10_000
    give_up_after_s: float = 86_400.0
    at_most_once: bool = False
    paused: bool = False
    removed: bool = False
    incarnation: int = 0
    beat: Beat | None = None
    heard: tuple[int, int] = (0, 0)
    """The newest beat's (incarnation, rev), also when its word is void."""
    deliveries: dict[tuple[UUID, int], Delivery] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    shut_until: float | None = None
    shuts: bool = False
    """It has just been shut for a time that is not observed yet."""

    def hear(self, beat: Beat, maximum: int | None = None) -> None:
        if beat.incarnation < self.incarnation or (beat.incarnation, beat.rev) <= self.heard:
            return
        self.incarnation, self.beat, self.heard = beat.incarnation, beat, (beat.incarnation, beat.rev)
        self.maximum = maximum or self.maximum
        if beat.active < self.maximum:
            self.shut_until = None

    def hear_proxy(self, name: str, proxy: Proxy) -> None:
        known = self.proxies.get(name)
        if known is None or proxy.rev > known.rev:
            self.proxies[name] = proxy

    def in_use(self, now: float) -> int:
        """1-overview, `in_use`: the larger of what is ours, and what the agent said plus begun minus answered."""
        fresh = [proxy for proxy in self.proxies.values() if now - proxy.at < FRESH_S]
        ours = [each for each in self.deliveries.values() if each.how is None]
        running = len(ours) + sum(len(proxy.running) for proxy in fresh)
        beat = self.beat
        if beat is None or now - beat.at > 2 * beat.cadence_s + 5:
            return running
        begun = [each.begun for each in self.deliveries.values() if each.how != "neither"]
        ended = [each.ended for each in self.deliveries.values() if each.how == "answered"]
        for proxy in fresh:
            begun += proxy.running
            begun += [start for start, _, outcome in proxy.ended if outcome not in {"busy", "not_delivered"}]
            ended += [end for _, end, outcome in proxy.ended if outcome == "answered"]
        started = sum(moment > beat.at for moment in begun)
        return max(running, beat.active + started - sum(moment >= beat.at - EARLIER_S for moment in ended))

    def is_blurred(self) -> bool:
        """More ended around the beat than the agent can have had in its count: how many of them, is not prescribed."""
        if self.beat is None:
            return False
        since, until = self.beat.at - EARLIER_S, self.beat.heard_at
        over = [each for each in self.deliveries.values() if each.how is not None and since <= each.ended <= until]
        return len(over) > self.least_maximum

    def is_open(self, now: float) -> bool:
        shut = self.shut_until is not None and self.shut_until > now
        return self.reachable and not (self.removed or self.paused or shut)

    def capacity(self, now: float) -> int:
        return max(0, self.maximum - self.in_use(now)) if self.is_open(now) else 0


@dataclass(frozen=True, slots=True)
class Fate:
    """A row of policies §2: `ends` as (status, reason), or back to its place; `slot`: what it is to the capacity."""

    slot: str
    ends: tuple[str, str | None] | None = None
    attempt: bool = False
    death: bool = False
    waits: bool = False
    shuts: bool = False


FATES = {
    "delivered": Fate("answered", ("completed", None)),
    "answer_lost": Fate("answered", ("completed", "answer_lost")),
    "refused": Fate("answered", ("failed", "refused")),
    "busy": Fate("neither", shuts=True),
    "not_delivered": Fate("neither", shuts=True),
    "preempted": Fate("answered", waits=True),
    "failed_attempt": Fate("answered", attempt=True, waits=True),
    "unknown": Fate("unknown", attempt=True, death=True, waits=True),
    "owner_died": Fate("unknown", attempt=True),
    "written_back": Fate("unknown"),
}


def ends_as(fate: Fate, reply: str, item: Item, *, at_most_once: bool) -> tuple[str, str | None] | None:
    """What §2 and §3 make of this reply to this item; None: it goes back to its place."""
    if fate.ends is not None:
        return fate.ends
    if at_most_once and reply in {"unknown", "owner_died"}:
        return ("failed", "delivery_unknown")
    if fate.death and item.deaths + 1 >= DEATHS_MAX:
        return ("failed", "poison")
    if fate.attempt and reply != "owner_died" and item.attempts + 1 >= ATTEMPTS_MAX:
        return ("failed", "attempts")
    return ("canceled", "canceled") if item.cancel else None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back from delivery `number` of an item; `retry_after_s` if the agent named a time."""

    queue_id: UUID
    number: int
    word: str
    at_most_once: bool
    retry_after_s: float | None = None


@dataclass(slots=True)
class Model:
    """Everything that was ever accepted."""

    items: dict[UUID, Item] = field(default_factory=dict)
    seats: dict[str, Seat] = field(default_factory=dict)
    active: dict[Key, UUID] = field(default_factory=dict)
    explicit: dict[Key, UUID] = field(default_factory=dict)

    def seat(self, name: str) -> Seat:
        return self.seats.setdefault(name, Seat(name))

    def of(self, name: str, status: str) -> list[Item]:
        found = [item for item in self.items.values() if item.workspace == name and item.status == status]
        return sorted(found, key=lambda item: item.place)

    def keep(self, item: Item, *, explicit: bool) -> tuple[UUID | None, bool]:
        """Accept a message: (the id it is known under already, whether it is refused as another body)."""
        key = (item.workspace, item.caller, item.key)
        same = self.items.get(item.queue_id)
        if same is not None:
            matches = (same.workspace, same.caller, same.body) == (item.workspace, item.caller, item.body)
            return (same.queue_id, False) if matches else (None, True)
        first = self.explicit.get(key) if explicit else self.active.get(key)
        if first is None:
            self.active[key] = item.queue_id
            if explicit:
                self.explicit[key] = item.queue_id
            self.items[item.queue_id] = item
            return None, False
        refused = self.items[first].body != item.body
        item.end(*(("failed", "key_conflict") if refused else ("superseded", "duplicate")))
        self.items[item.queue_id] = item
        return (None, True) if refused else (first, False)

    def end(self, item: Item, status: str, reason: str | None) -> None:
        item.end(status, reason)
        self.active.pop((item.workspace, item.caller, item.key))

    def settle(self, replies: Sequence[Reply], now: float) -> None:
        """Write what came back. What ends, ends before anything goes back to its place."""
        due = [(reply, FATES[reply.word], self.items[reply.queue_id]) for reply in replies]
        verdicts = [ends_as(fate, each.word, item, at_most_once=each.at_most_once) for each, fate, item in due]
        held = [item.status == "dispatched" and item.delivery_no == each.number for each, _, item in due]
        for (_, fate, item), ends, holds in zip(due, verdicts, held, strict=True):
            late = item.status == "queued" and ends is not None and ends[0] == "completed"
            if ends is not None and (holds or late):
                item.attempts += fate.attempt
                self.end(item, *ends)
        for (reply, fate, item), ends, holds in zip(due, verdicts, held, strict=True):
            if ends is None and holds:
                self._return(reply, fate, item)
        for (reply, fate, item), ends, holds in zip(due, verdicts, held, strict=True):
            if holds:
                self._account(reply, fate, item, now, back=ends is None)

    def _return(self, reply: Reply, fate: Fate, item: Item) -> None:
        longest = min(WAIT_MAX_S, float(2 ** min(item.attempts, 20)))
        if fate.waits:
            named = reply.retry_after_s
            wait = min(max(WAIT_MIN_S, named), WAIT_MAX_S) if named is not None else None
            item.waits = (wait, wait) if wait is not None else (WAIT_MIN_S, max(WAIT_MIN_S, longest))
        item.status, item.owner = "queued", None
        item.attempts += fate.attempt
        item.deaths += fate.death

    def _account(self, reply: Reply, fate: Fate, item: Item, now: float, *, back: bool) -> None:
        seat = self.seat(item.workspace)
        delivery = seat.deliveries[reply.queue_id, reply.number]
        delivery.how, delivery.ended = fate.slot, now
        if fate.shuts and back:
            seat.shuts = True
        elif fate.slot == "answered":
            seat.shuts, seat.shut_until = False, None

    def claim(self, names: Iterable[str], now: float, owner: str, claimed: set[UUID]) -> None:
        """Hold what was claimed in these workspaces against what there was room for: so many, and the first in line."""
        left = set(claimed)
        for name in sorted(set(names)):
            seat = self.seat(name)
            ready = [each for each in self.of(name, "queued") if each.not_before is None or each.not_before <= now]
            found = sum(item.queue_id in claimed for item in ready)
            room = min(len(ready), seat.capacity(now))
            if seat.is_blurred():
                room = min(found, max(0, seat.maximum - len(self.of(name, "dispatched"))))
            assert found == room, f"I4: {found} claimed in {name}, where {room} could be"
            for item in ready[:room]:
                assert item.queue_id in claimed, f"I3: {item.queue_id} was overtaken"
                left.remove(item.queue_id)
                item.status, item.owner = "dispatched", owner
                item.delivery_no += 1
                seat.deliveries[item.queue_id, item.delivery_no] = Delivery(now)
        assert not left, f"nobody looked at {left}"

    def expire(self, now: float) -> None:
        for item in [item for item in self.items.values() if item.status == "queued"]:
            ends = [moment for moment in (item.expires_at, item.give_up_at) if moment is not None]
            if ends and min(ends) <= now and not self.seat(item.workspace).paused:
                self.end(item, "expired", "expired")
