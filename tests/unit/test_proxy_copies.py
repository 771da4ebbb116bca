"""What a replica holds in memory: only what is newer is applied, nothing sticks, capacity is counted as it happens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from services.proxy.copies import Backlogs, Copies, Flights, Keeps, Registry
from services.proxy.copies.backlogs import View
from services.proxy.copies.forwards import LiveForward
from services.proxy.copies.keeps import Keep
from services.proxy.copies.uses import Uses
from services.proxy.decide import InFlight, Workspace
from services.proxy.handlers import Handlers
from shared.facts import (
    BacklogSnapshot,
    Ended,
    ItemChanged,
    ItemKept,
    ItemStatus,
    NamedBacklog,
    Priority,
    ProxyBeat,
    Running,
    WorkspaceBacklog,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)

T0 = 1_700_000_000.0
CALLER, OTHER = b"c" * 32, b"o" * 32


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(T0 + seconds, UTC)


def workspace(rev: int = 1, token: bytes = b"t" * 32, **more: object) -> Workspace:
    row = Workspace(workspace_id="w", owner_caller="o", url="http://a", token_hash=token, incarnation=1, rev=rev)
    return replace(row, **more)  # type: ignore[arg-type]


# ── registry ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_registry_ends_the_same_in_whatever_order_facts_come() -> None:
    facts = [
        WorkspaceRegistered(workspace_id="w", rev=2, incarnation=2, url="http://b"),
        WorkspaceChanged(workspace_id="w", rev=3, incarnation=2, url="http://b", paused=True),
        WorkspaceRegistered(workspace_id="w", rev=4, incarnation=3, url="http://c", paused=True),
    ]
    for order in itertools.permutations(facts):
        registry = Registry()
        registry.put(workspace())
        for fact in order:
            registry.hear(fact)
        found = registry.find("w")
        assert found is not None
        assert (found.rev, found.url, found.incarnation, found.paused) == (4, "http://c", 3, True)
        assert registry.unread == {"w"}


def test_a_new_token_takes_the_place_of_the_old_one() -> None:
    registry = Registry()
    registry.put(workspace(1, b"a" * 32))
    registry.put(workspace(2, b"b" * 32))
    assert registry.find_token(b"a" * 32) is None
    assert registry.find_token(b"b" * 32) == registry.find("w")


def test_a_removed_workspace_stays_removed_and_its_token_is_worth_nothing() -> None:
    registry = Registry()
    registry.put(workspace(1))
    registry.hear_removed(WorkspaceRemoved(workspace_id="w", rev=5))
    registry.hear(WorkspaceRegistered(workspace_id="w", rev=4, incarnation=9, url="http://late"))
    found = registry.find("w")
    assert found is not None
    assert found.removed
    assert registry.find_token(b"t" * 32) is None


# ── backlog ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def change(rev: int, waiting: int, seconds: float = 0) -> WorkspaceBacklog:
    return WorkspaceBacklog(workspace_id="w", rev=rev, occurred_at=at(seconds), waiting=waiting, in_use=0)


def snapshot(
    seconds: float, *backlogs: NamedBacklog, parts: int = 1, part: int = 0, of: object = None
) -> BacklogSnapshot:
    return BacklogSnapshot(
        rev=1, occurred_at=at(seconds), snapshot_id=of or uuid7(), part=part, parts=parts, backlogs=backlogs
    )


def named(name: str, rev: int, waiting: int) -> NamedBacklog:
    return NamedBacklog(workspace_id=name, rev=rev, waiting=waiting, in_use=0)


def test_only_a_higher_rev_changes_a_backlog() -> None:
    backlogs = Backlogs()
    backlogs.hear(change(5, 3))
    backlogs.hear(change(4, 9, seconds=10))
    assert backlogs.view("w").waiting == 3


def test_nothing_is_known_before_a_snapshot_is_complete() -> None:
    backlogs, one = Backlogs(), uuid7()
    backlogs.hear(change(1, 0))
    assert backlogs.copied_at("w") is None
    assert backlogs.hear_part(snapshot(1, parts=2, part=1, of=one)) is None
    assert backlogs.copied_at("w") is None
    assert backlogs.hear_part(snapshot(1, parts=2, part=0, of=one)) is not None
    assert backlogs.copied_at("w") == T0 + 1


def test_how_long_a_turn_takes_is_remembered_when_nothing_waits_any_more() -> None:
    """A-Q-24: the next line that fills up is told from it."""
    backlogs = Backlogs()
    backlogs.hear(change(1, 2).model_copy(update={"turn_s": 7.5, "oldest_at": at(-3)}))
    assert (backlogs.view("w").turn_s, backlogs.view("w").oldest_at) == (7.5, T0 - 3)
    backlogs.hear_part(snapshot(5))
    assert (backlogs.view("w").turn_s, backlogs.view("w").oldest_at) == (7.5, None)


def test_whom_a_newer_snapshot_leaves_out_has_nothing() -> None:
    backlogs = Backlogs()
    backlogs.hear(change(7, 4, seconds=1))
    backlogs.hear_part(snapshot(0.5))
    assert backlogs.view("w").waiting == 4, "the change is newer than the snapshot"
    backlogs.hear_part(snapshot(2))
    assert backlogs.view("w").waiting == 0
    backlogs.hear(change(6, 9, seconds=0.2))
    assert backlogs.view("w").waiting == 0, "what came late from before is still old"
    backlogs.hear(change(8, 1, seconds=1.9))
    assert backlogs.view("w").waiting == 1, "a higher rev is newer, whatever the clocks say"


def test_the_age_of_a_copy_counts_from_when_it_was_true() -> None:
    backlogs = Backlogs()
    backlogs.hear_part(snapshot(3))
    assert backlogs.copied_at("w") == T0 + 3
    backlogs.hear(change(1, 0, seconds=5))
    assert (backlogs.copied_at("w"), backlogs.copied_at("other")) == (T0 + 5, T0 + 3)


def test_snapshots_that_never_become_complete_are_forgotten() -> None:
    backlogs = Backlogs()
    for _ in range(100):
        backlogs.hear_part(snapshot(1, parts=2))
    assert len(backlogs._assembly._partial) <= 9


# ── keeps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def keep(seconds: float = 0, caller: bytes = CALLER) -> Keep:
    return Keep(uuid7(), "w", "c", caller, Priority.TASK, "backlog", T0 + seconds, confirmed=True)


def shown(each: Keep, seconds: float, **more: object) -> ItemKept:
    return ItemKept.model_validate(
        {
            "workspace_id": "w",
            "rev": 1,
            "queue_id": each.queue_id,
            "occurred_at": at(seconds),
            "depth": 1,
            "position": 1,
        }
        | more
    )


async def test_a_keep_counts_until_a_backlog_covers_it() -> None:
    keeps, mine = Keeps(), keep()
    keeps.promise(mine)
    assert keeps.pending("w") == 1
    keeps.hear_kept(shown(mine, 0.1), copied_at=T0)
    assert keeps.pending("w") == 1, "the copy is older than the row"
    keeps.covered("w", T0 + 0.05)
    assert keeps.pending("w") == 1
    keeps.covered("w", T0 + 0.1)
    assert keeps.pending("w") == 0


@pytest.mark.parametrize(("after_s", "pending"), [(9.9, 1), (10.0, 1), (10.1, 0)])
async def test_a_keep_of_which_nothing_is_heard_does_not_stick(after_s: float, pending: int) -> None:
    keeps = Keeps()
    keeps.promise(keep())
    keeps.covered("w", T0 + after_s)
    assert keeps.pending("w") == pending


@pytest.mark.parametrize(("after_s", "pending"), [(9.9, 1), (10.0, 1), (10.1, 0)])
async def test_a_keep_from_an_absence_of_the_queue_service_counts_until_that_has_had_time_to_read(
    after_s: float, pending: int
) -> None:
    copies, mine = Copies("me"), keep(1)
    handlers = Handlers(copies, unread=lambda: None)
    copies.keeps.promise(mine)
    for seconds in (0, 30, 35, 30 + after_s):  # away from 0 to 30
        await handlers.snapshots([snapshot(seconds)])
    assert copies.keeps.pending("w") == pending
    assert copies.keeps.find(mine.queue_id) is mine, "GET /queue answers for it meanwhile"


async def test_what_the_broker_never_confirmed_is_no_promise_once_the_queue_should_have_shown_it() -> None:
    """The caller was told `keep_unknown`: GET must not say `queued` for ever of what may never have been sent."""
    keeps, mine = Keeps(), keep()
    mine.confirmed = False
    keeps.promise(mine)
    keeps.covered("w", T0 + 5)
    assert keeps.find(mine.queue_id) is mine
    keeps.covered("w", T0 + 60, waiting=0)
    assert keeps.find(mine.queue_id) is None


async def test_a_promise_of_which_nothing_is_heard_is_still_a_promise() -> None:
    """B-18: the queue waits for its database longer than a keep counts; GET must not call the id unknown."""
    keeps, mine = Keeps(), keep()
    keeps.promise(mine)
    keeps.covered("w", T0 + 60, waiting=0)
    assert keeps.pending("w") == 0
    assert keeps.find(mine.queue_id) is mine


@pytest.mark.parametrize("status", [status for status in ItemStatus if status is not ItemStatus.QUEUED])
async def test_an_item_that_left_the_line_no_longer_counts(status: ItemStatus) -> None:
    keeps, mine = Keeps(), keep()
    keeps.promise(mine)
    keeps.hear_changed(ItemChanged(workspace_id="w", rev=1, queue_id=mine.queue_id, status=status))
    assert keeps.pending("w") == 0
    assert keeps.share("w", CALLER) == (0, 0)


async def test_a_duplicate_takes_no_place() -> None:
    keeps, mine = Keeps(), keep()
    told = keeps.promise(mine)
    first = uuid7()
    keeps.hear_kept(shown(mine, 0.1, duplicate_of=first), copied_at=None)
    assert (await told).duplicate_of == first
    assert keeps.pending("w") == 0
    assert keeps.share("w", CALLER) == (0, 0)


async def test_shares_are_counted_by_caller_and_forgotten_with_the_line() -> None:
    keeps = Keeps()
    for caller in (CALLER, CALLER, OTHER):
        keeps.promise(keep(caller=caller))
    assert keeps.share("w", CALLER) == (2, 1)
    keeps.covered("w", T0 + 20, waiting=3)
    assert keeps.share("w", CALLER) == (2, 1), "they wait, and are counted by the queue now"
    keeps.covered("w", T0 + 21, waiting=0)
    assert keeps.share("w", CALLER) == (0, 0)
    assert not keeps.workspaces()


async def test_a_withdrawn_keep_leaves_nothing() -> None:
    keeps, mine = Keeps(), keep()
    keeps.promise(mine)
    keeps.withdraw(mine)
    assert (keeps.pending("w"), keeps.share("w", CALLER), keeps.find(mine.queue_id)) == (0, (0, 0), None)


async def test_who_waits_hears_the_end_and_leaves_nothing_behind() -> None:
    keeps, mine = Keeps(), keep()
    with keeps.waiting_for(mine.queue_id) as waiter, keeps.waiting_for(mine.queue_id) as second:
        for status in (ItemStatus.DISPATCHED, ItemStatus.COMPLETED):
            keeps.hear_changed(ItemChanged(workspace_id="w", rev=1, queue_id=mine.queue_id, status=status))
            assert waiter.status is second.status is status
        assert (await waiter.ended).status is ItemStatus.COMPLETED
        assert second.ended.done()
    assert not keeps._waiters


@given(st.lists(st.sampled_from(["promise", "kept", "changed", "covered", "drained"]), max_size=40))
def test_whatever_happens_nothing_sticks_once_the_line_is_empty(steps: list[str]) -> None:
    """After a backlog that is newer by the bound, and empty, nothing counts."""

    async def run() -> None:
        keeps, made = Keeps(), []
        for number, step in enumerate(steps):
            if step == "promise":
                made.append(keep(number))
                keeps.promise(made[-1])
            elif step == "kept" and made:
                keeps.hear_kept(shown(made[0], number), copied_at=T0 + number - 1)
            elif step == "changed" and made:
                fact = ItemChanged(workspace_id="w", rev=1, queue_id=made[-1].queue_id, status=ItemStatus.DISPATCHED)
                keeps.hear_changed(fact)
            elif step == "covered":
                keeps.covered("w", T0 + number, waiting=1)
            elif step == "drained":
                keeps.covered("w", T0 + number, waiting=0)
        keeps.covered("w", T0 + 100, waiting=0)
        assert keeps.pending("w") == 0
        assert not keeps.workspaces()

    import asyncio  # noqa: PLC0415 - hypothesis runs a plain function

    asyncio.run(run())


# ── capacity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def heartbeat(seconds: float, active: int, **more: object) -> WorkspaceHeartbeat:
    values = {"workspace_id": "w", "rev": int((T0 + seconds) * 1e6), "incarnation": 1, "active_tasks": active}
    return WorkspaceHeartbeat.model_validate(values | more)


def live(name: str, seconds: float) -> LiveForward:
    return LiveForward("w", name, b"k" * 32, T0 + seconds)


def test_in_use_follows_forwards_between_beats() -> None:
    uses = Uses("me")
    use = uses.of("w")
    assert use.in_use(T0) == 0
    use.hear_heartbeat(heartbeat(0, 0))
    uses.begin(live("a", 1))
    assert use.in_use(T0 + 1) == 1
    use.hear_heartbeat(heartbeat(2, 1))
    assert use.in_use(T0 + 2) == 1, "the beat counts it, and it is ours: once"
    uses.end(live("a", 1), "answered", T0 + 3)
    assert use.in_use(T0 + 3) == 0
    use.hear_heartbeat(heartbeat(4, 1))
    assert use.in_use(T0 + 4) == 0, "sampled up to 2 s earlier"
    use.hear_heartbeat(heartbeat(6, 1))
    assert use.in_use(T0 + 6) == 1, "something that is not ours"


OVERTAKEN = [
    ("sampled earlier", 1, 99.9, True),
    ("the same sample", 1, 100.0, False),
    ("sampled later", 1, 100.1, False),
    ("another life", 2, 0.1, False),
    ("it does not say", 1, None, False),
]


@pytest.mark.parametrize(
    ("incarnation", "uptime_s", "expected"), [row[1:] for row in OVERTAKEN], ids=[row[0] for row in OVERTAKEN]
)
def test_a_beat_is_overtaken_by_one_that_was_sampled_later(
    incarnation: int, uptime_s: float | None, expected: bool
) -> None:
    use = Uses("me").of("w")
    assert not use.was_overtaken(1, 100.0), "nothing was heard yet"
    use.hear_heartbeat(heartbeat(0, 0, uptime_s=100.0))
    assert use.was_overtaken(incarnation, uptime_s) is expected
    use.heard_at -= 10
    assert not use.was_overtaken(incarnation, uptime_s), "no beat travels for 10 s: the agent's clock went back"


@pytest.mark.parametrize(("outcome", "expected"), [("answered", 0), ("busy", 0), ("unknown", 1), ("accepted", 1)])
def test_how_a_forward_ended_decides_what_counts(outcome: str, expected: int) -> None:
    uses = Uses("me")
    uses.of("w").hear_heartbeat(heartbeat(0, 0))
    uses.begin(live("a", 1))
    uses.end(live("a", 1), outcome, T0 + 2)
    assert uses.of("w").in_use(T0 + 2) == expected


def test_an_old_beat_and_one_of_an_older_life_change_nothing() -> None:
    use = Uses("me").of("w")
    use.hear_heartbeat(heartbeat(5, 1, incarnation=2))
    use.hear_heartbeat(heartbeat(4, 7, incarnation=2))
    use.hear_heartbeat(heartbeat(6, 7))
    assert use.in_use(T0 + 5) == 1
    use.renew(3)
    assert use.in_use(T0 + 5) == 0, "what the last life said of itself is void"
    use.hear_heartbeat(heartbeat(1, 1, incarnation=3))
    assert use.in_use(T0 + 5) == 1, "the first beat of a new life is heard, whatever the clocks say"


@pytest.mark.parametrize(("age_s", "expected"), [(64.9, 1), (65.0, 1), (65.1, 0)])
def test_a_beat_older_than_two_cadences_and_five_seconds_is_none(age_s: float, expected: int) -> None:
    use = Uses("me").of("w")
    use.hear_heartbeat(heartbeat(0, 1))
    assert use.in_use(T0 + age_s) == expected


def peer(rev: int, seconds: float, *sessions: str, ended: tuple[Ended, ...] = ()) -> ProxyBeat:
    forwards = [Running(session_id=each, key_hash=b"k" * 32, started_at=at(seconds)) for each in sessions]
    return ProxyBeat(
        workspace_id="w", rev=rev, proxy_id="p2", occurred_at=at(seconds), forwards=forwards, ended=list(ended)
    )


@pytest.mark.parametrize(("age_s", "expected"), [(14.9, 1), (15.0, 0), (15.1, 0)])
def test_another_proxy_s_forwards_count_while_it_beats(age_s: float, expected: int) -> None:
    """The same with the proxy killed in between: 15 s later its forwards no longer hold the agent."""
    use = Uses("me").of("w")
    use.hear_peer(peer(2, 0, "x"))
    use.hear_peer(peer(1, 0, "x", "y"))
    assert use.in_use(T0 + age_s) == expected
    assert use.runs_key(b"k" * 32, T0 + age_s) is bool(expected)


def test_a_peer_s_forward_that_ended_lets_the_agent_go() -> None:
    use = Uses("me").of("w")
    use.hear_heartbeat(heartbeat(0, 1))
    ended = Ended(session_id="x", outcome="answered", started_at=at(-5), ended_at=at(1))
    use.hear_peer(peer(1, 1, ended=(ended,)))
    assert use.in_use(T0 + 1) == 0
    use.hear_peer(peer(3, 2))
    use.hear_peer(peer(2, 2, "y"))
    assert use.in_use(T0 + 2) == 1, "what is older changes nothing, also after an empty one"


def test_a_delivery_that_a_newer_backlog_no_longer_names_has_ended() -> None:
    copies = Copies("me")
    handlers = Handlers(copies, unread=lambda: None)
    use = copies.uses.of("w")
    use.hear_heartbeat(heartbeat(0, 0))
    running = Running(session_id="q:1", key_hash=b"k" * 32, started_at=at(1))
    both = [
        WorkspaceBacklog(workspace_id="w", rev=1, occurred_at=at(1), waiting=0, in_use=1, running=[running]),
        WorkspaceBacklog(workspace_id="w", rev=2, occurred_at=at(3), waiting=0, in_use=0),
    ]
    for fact, expected in zip(both, (1, 0), strict=True):
        copies.backlogs.hear(fact)
        handlers._shown("w")
        assert use.in_use(T0 + 3) == expected


@pytest.mark.parametrize(("active", "expected"), [(0, 0), (1, 1)], ids=["its beats say idle", "its beats say busy"])
def test_of_a_delivery_in_a_stale_copy_only_the_agent_s_own_beats_tell(active: int, expected: int) -> None:
    copies = Copies("me")
    use = copies.uses.of("w")
    running = Running(session_id="q:1", key_hash=b"k" * 32, started_at=at(1))
    copies.backlogs.hear(
        WorkspaceBacklog(workspace_id="w", rev=1, occurred_at=at(1), waiting=0, in_use=1, running=[running])
    )
    Handlers(copies, unread=lambda: None)._shown("w")
    use.hear_heartbeat(heartbeat(3, active))
    assert use.in_use(T0 + 4) == 1
    assert use.in_use(T0 + 4, copy_is_stale=True) == expected


def test_a_beat_names_what_runs_and_what_ended_lately_under_growing_numbers() -> None:
    uses = Uses("me")
    uses.begin(live("a", 0))
    uses.begin(live("b", 0))
    uses.end(live("b", 0), "answered", T0 + 1)
    view = View(gate_generation=3)
    first, second = uses.beat("w", view, T0 + 61), uses.beat("w", view, T0 + 61.1)
    assert [each.session_id for each in first.forwards] == ["a"]
    assert ([each.session_id for each in first.ended], list(second.ended)) == (["b"], [])
    assert second.rev > first.rev
    assert first.gate_generation == 3


# ── flights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_message_joins_and_another_body_does_not() -> None:
    flights = Flights()
    key = ("w", CALLER, b"k")
    flight = flights.begin(key, "message/send", b"body", "a queue id")
    assert flights.look(key, "message/send", b"body") is InFlight.SAME
    assert flights.look(key, "message/send", b"other") is InFlight.OTHER_BODY
    assert flights.look(("w", OTHER, b"k"), "message/send", b"body") is InFlight.NO, "A-Q-02: keys are a caller's own"
    flights.end(key, flight)
    assert flights.look(key, "message/send", b"body") is InFlight.NO
    assert flight.landed.cancelled()
