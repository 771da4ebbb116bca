"""What the queue must do, said again in plain Python: items, places, turns, attempts. It calls nothing of the queue.

Times are seconds since 1970 as the caller counts them. What the queue draws by lot (how long it waits) is observed and
held against its bounds; everything else is predicted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from uuid import UUID

from tests.chaos.kit.model_seat import Delivery, Seat

WAIT_MIN_S, WAIT_MAX_S = 0.05, 60.0
ATTEMPTS_MAX, DEATHS_MAX = 5, 3
SLACK_MS = 10_000
INFO_PATIENCE_MS = 120_000
STARVES_S = 20.0
GRACE_S = 5.0
HEARD_LATE_S = 10.0
"""How long a new life may take messages before anybody hears of it."""
Place = tuple[int, int, UUID]
Key = tuple[str, str, str]


@dataclass(slots=True)
class Item:
    """One message that was accepted. `status` is the row's; once it has ended, everything is final but `retried_by`."""

    queue_id: UUID
    workspace: str
    caller: str
    key: str
    body: str
    priority: str = "TASK"
    rank_ms: int = 0
    status: str = "queued"
    reason: str | None = None
    delivery_no: int = 0
    attempts: int = 0
    deaths: int = 0
    owner: str | None = None
    task: str | None = None
    cancel: bool = False
    stop: str | None = None
    """Why its delivery was told to stop."""
    hung_up: bool = False
    """Its owner hangs up as soon as it reads that."""
    life: int = 0
    """Of its agent, when it was claimed."""
    not_before: float | None = None
    waits: tuple[float, float] | None = None
    """How long it has just been told to wait, at least and at most; until that was observed."""
    enqueued_at: float = 0.0
    expires_at: float | None = None
    give_up_at: float = 0.0
    retry_of: UUID | None = None
    retried_by: UUID | None = None

    @property
    def lane(self) -> int:
        return 0 if self.priority == "CRITICAL" else 1

    @property
    def place(self) -> Place:
        return (self.lane, self.rank_ms, self.queue_id)

    @property
    def is_active(self) -> bool:
        return self.status in {"queued", "dispatched"}

    def end(self, status: str, reason: str | None) -> None:
        self.status, self.reason, self.owner = status, reason, None


def rank_ms(queue_id: UUID, fact_id: UUID, priority: str) -> int:
    came_ms = max(queue_id.int >> 80, (fact_id.int >> 80) - SLACK_MS)
    return came_ms + INFO_PATIENCE_MS if priority == "INFO" else came_ms


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
    "preempted": Fate("answered"),
    "failed_attempt": Fate("answered", attempt=True, waits=True),
    "unknown": Fate("unknown", attempt=True, death=True, waits=True),
    "owner_died": Fate("unknown", attempt=True),
    "written_back": Fate("unknown"),
    "ceiling": Fate("unknown", ("failed", "ceiling")),
}
PREEMPTED_FOR_NOBODY = Fate("answered", shuts=True)


def ends_as(fate: Fate, said: Reply, item: Item) -> tuple[str, str | None] | None:
    """What §2 and §3 make of this reply to this item; None: it goes back to its place."""
    reply, at_most_once = said.word, said.at_most_once
    if item.stop is not None and (reply != "delivered" or said.canceled):
        return ("canceled", "stopped") if item.stop == "operator" else ("failed", "ceiling")
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
    canceled: bool = False
    """It is a Task that was canceled."""


@dataclass(slots=True)
class Model:
    """Everything that was ever accepted."""

    items: dict[UUID, Item] = field(default_factory=dict)
    seats: dict[str, Seat] = field(default_factory=dict)
    active: dict[Key, UUID] = field(default_factory=dict)
    explicit: dict[Key, UUID] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def seat(self, name: str) -> Seat:
        return self.seats.setdefault(name, Seat(name))

    def of(self, name: str, status: str) -> list[Item]:
        found = [item for item in self.items.values() if item.workspace == name and item.status == status]
        return sorted(found, key=lambda item: item.place)

    # ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────

    def keep(self, item: Item, *, explicit: bool) -> tuple[UUID | None, bool]:
        """Accept a message: (the id it is known under already, whether it is refused as another body)."""
        key = (item.workspace, item.caller, item.key)
        same = self.items.get(item.queue_id)
        if same is not None:
            matches = (same.workspace, same.caller, same.body) == (item.workspace, item.caller, item.body)
            return (same.queue_id, False) if matches else (None, True)
        first = self.explicit.get(key) if explicit else self.active.get(key)
        if first is None:
            if explicit:
                self.explicit[key] = item.queue_id
            self._add(item)
            return None, False
        refused = self.items[first].body != item.body
        item.end(*(("failed", "key_conflict") if refused else ("superseded", "duplicate")))
        self.items[item.queue_id] = item
        return (None, True) if refused else (first, False)

    def _add(self, item: Item) -> None:
        item.give_up_at = item.enqueued_at + self.seat(item.workspace).give_up_after_s
        self.items[item.queue_id] = item
        self.active[item.workspace, item.caller, item.key] = item.queue_id

    def retry(self, ended: Item, again: Item) -> None:
        """The same message as a new item: with no key of its caller's, and with all its time."""
        ended.retried_by, again.retry_of = again.queue_id, ended.queue_id
        self._add(again)

    # ── what goes out ────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self, item: Item, status: str, reason: str | None) -> None:
        item.end(status, reason)
        self.active.pop((item.workspace, item.caller, item.key))

    def settle(self, replies: Sequence[Reply], now: float) -> None:
        """Write what came back. What ends, ends before anything goes back to its place."""
        hurried = {name for name in self.seats if any(item.lane == 0 for item in self.of(name, "queued"))}
        due = [(reply, self._fate(reply, hurried), self.items[reply.queue_id]) for reply in replies]
        verdicts = [ends_as(fate, each, item) for each, fate, item in due]
        held = [item.status == "dispatched" and item.delivery_no == each.number for each, _, item in due]
        streaks = {name: seat.streak for name, seat in self.seats.items()}
        for (_, fate, item), ends, holds in zip(due, verdicts, held, strict=True):
            late = item.status == "queued" and ends is not None and ends[0] == "completed"
            if ends is not None and (holds or late):
                item.attempts += fate.attempt
                self.end(item, *ends)
        for (reply, fate, item), ends, holds in zip(due, verdicts, held, strict=True):
            if holds:
                shut_s = _drawn(reply, streaks[item.workspace])
                self._account(reply, fate, item, now, shut_s if ends is None else None)
            if holds and ends is None:
                if fate.waits:
                    item.waits = _drawn(reply, item.attempts)
                item.status, item.owner = "queued", None
                item.attempts += fate.attempt
                item.deaths += fate.death

    def _fate(self, reply: Reply, hurried: set[str]) -> Fate:
        if reply.word != "preempted":
            return FATES[reply.word]
        was_asked = self.items[reply.queue_id].workspace in hurried
        self.seen["preempted for CRITICAL" if was_asked else "preempted for nobody"] += 1
        return FATES["preempted"] if was_asked else PREEMPTED_FOR_NOBODY

    def _account(self, reply: Reply, fate: Fate, item: Item, now: float, shut_s: tuple[float, float] | None) -> None:
        """`shut_s`: how long the workspace is shut if this shuts it; None: its item has ended."""
        seat = self.seat(item.workspace)
        delivery = seat.deliveries[reply.queue_id, reply.number]
        delivery.how, delivery.ended = fate.slot, now
        if fate.shuts and shut_s is not None:
            seat.shuts = shut_s
            seat.streak += 1
        elif fate.slot == "answered":
            seat.open()

    def claim(self, names: Iterable[str], now: float, owner: str, claimed: set[UUID]) -> None:
        """Hold what was claimed in these workspaces against what there was room for: so many, and whose turn it was."""
        left = set(claimed)
        for name in sorted(set(names)):
            seat = self.seat(name)
            ready = [each for each in self.of(name, "queued") if each.not_before is None or each.not_before <= now]
            # What is past its time is nobody's any more, also before the sweep has said so.
            ready = [each for each in ready if min(each.expires_at or each.give_up_at, each.give_up_at) > now]
            found = sum(item.queue_id in claimed for item in ready)
            room = min(len(ready), seat.capacity(now))
            if seat.is_blurred():
                room = min(found, max(0, seat.maximum - len(self.of(name, "dispatched"))))
            assert found == room, f"I4: {found} claimed in {name}, where {room} could be"
            for item in islice(self._in_turn(seat, ready, now), room):
                assert item.queue_id in claimed, f"I3: {item.queue_id} was overtaken"
                left.remove(item.queue_id)
                item.status, item.owner = "dispatched", owner
                item.delivery_no += 1
                item.life = seat.incarnation
                seat.deliveries[item.queue_id, item.delivery_no] = Delivery(now)
        assert not left, f"nobody looked at {left}"

    def _in_turn(self, seat: Seat, ready: Sequence[Item], now: float) -> Iterator[Item]:
        """CRITICAL first; but every second turn is for the first of the others, if it has waited too long."""
        urgent = deque(item for item in ready if item.lane == 0)
        others = deque(item for item in ready if item.lane == 1)
        while urgent or others:
            may_pass = bool(others) and seat.served_critical and now - others[0].enqueued_at > STARVES_S
            self.seen["second turn"] += bool(urgent) and may_pass
            seat.served_critical = bool(urgent) and not may_pass
            yield (urgent if seat.served_critical else others).popleft()

    # ── clocks and commands ──────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, now: float) -> None:
        for item in [item for item in self.items.values() if item.status == "queued"]:
            ends = [moment for moment in (item.expires_at, item.give_up_at) if moment is not None]
            if min(ends) <= now and self.seat(item.workspace).paused_at is None:
                self.end(item, "expired", "expired")
                self.seen["expired"] += 1

    def pause(self, seat: Seat, now: float) -> None:
        seat.paused_at = now if seat.paused_at is None else seat.paused_at

    def go_on(self, seat: Seat, now: float) -> None:
        """What was there through the pause, or through its end only, gets that time back."""
        since, seat.paused_at = seat.paused_at, None
        for item in self.items.values():
            if since is not None and item.workspace == seat.name and item.is_active:
                self.seen["clocks shifted, came later" if item.enqueued_at > since else "clocks shifted"] += 1
                lost_s = now - max(since, item.enqueued_at)
                item.give_up_at += lost_s
                item.expires_at = item.expires_at + lost_s if item.expires_at is not None else None

    def let_go(self, item: Item, now: float, *, is_followed: bool) -> str | None:
        """What it has come to if its owner hangs up: nothing else can end it, or the life that had it is over."""
        seat = self.seat(item.workspace)
        replaced = seat.incarnation > item.life
        if item.hung_up or (item.stop is not None and replaced):
            return "ceiling"
        dead = seat.dead is not None and item.life <= seat.dead
        began = seat.deliveries[item.queue_id, item.delivery_no].begun
        if replaced:
            was_first = seat.life_at is not None and seat.life_at - began >= HEARD_LATE_S
            is_over = not is_followed and (dead or was_first)  # the new life is asked for a task
        else:
            is_over = dead and now - seat.dead_at >= GRACE_S
        if not is_over:
            return None
        self.seen["outlived"] += 1
        return "ceiling" if item.stop is not None else "unknown"

    def _first(self, item: Item) -> Item:
        """Who stands first in its lane."""
        return next(each for each in self.of(item.workspace, "queued") if each.lane == item.lane)

    def is_behind(self, item: Item) -> bool:
        return self._first(item) is not item

    def promote(self, item: Item) -> None:
        if self.is_behind(item):
            item.rank_ms = self._first(item).rank_ms - 1
            self.seen["promoted"] += 1

    def matching(self, name: str, priority: str | None, caller: str | None, before: float | None) -> list[Item]:
        """What waits there, has this priority and this caller, and came before this moment."""
        found = self.of(name, "queued")
        found = [item for item in found if priority is None or item.priority == priority]
        found = [item for item in found if caller is None or item.caller == caller]
        return [item for item in found if before is None or item.enqueued_at < before]


def _drawn(reply: Reply, times: int) -> tuple[float, float]:
    """The bounds of a wait: what the agent named, or by lot up to a second that doubles with every time before."""
    if reply.retry_after_s is not None:
        named = min(max(WAIT_MIN_S, reply.retry_after_s), WAIT_MAX_S)
        return named, named
    return WAIT_MIN_S, max(WAIT_MIN_S, min(WAIT_MAX_S, float(2 ** min(times, 20))))
