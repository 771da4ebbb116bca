"""The route of a message: the table of policies §1. Row ids are its words; boundaries come in threes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.proxy.decide import (
    Arrival,
    Ask,
    Attach,
    Forward,
    Head,
    InFlight,
    Keep,
    Presence,
    Reason,
    Refuse,
    Share,
    Standing,
    Verdict,
    admit,
    place_frees_in_s,
    route,
    takes_place,
)
from shared.facts import Priority

NOW = 1_000_000.0
IDLE = Arrival(copied_at=NOW, now=NOW)
FAULT = Refuse(413, "body_too_large", "…")


def refused(verdict: Verdict | Ask) -> tuple[int, str]:
    assert isinstance(verdict, Refuse)
    assert verdict.sentence.endswith("."), "it says what, why and what to do"
    return verdict.status, verdict.code


HEADS: list[tuple[str, dict[str, Any], tuple[int, str]]] = [
    ("unknown workspace", {"presence": Presence.UNKNOWN}, (404, "workspace_unknown")),
    ("removed", {"presence": Presence.REMOVED}, (410, "workspace_removed")),
    ("no token", {"standing": Standing.NONE}, (401, "token_missing")),
    ("nobody's token", {"standing": Standing.UNKNOWN}, (401, "token_unknown")),
    ("another's name", {"standing": Standing.MISMATCH}, (403, "caller_mismatch")),
    ("forged system prefix", {"standing": Standing.FORGED}, (403, "caller_reserved")),
    ("registry away", {"standing": Standing.UNSURE}, (503, "token_unchecked")),
    ("hops no number", {"hops": None}, (400, "hops_unreadable")),
    ("hops 17", {"hops": 17}, (508, "too_many_hops")),
    ("too many calls", {"rate_wait_s": 0.2}, (429, "rate_limited")),
]


@pytest.mark.parametrize(("head", "expected"), [row[1:] for row in HEADS], ids=[row[0] for row in HEADS])
def test_what_the_head_alone_refuses(head: dict[str, Any], expected: tuple[int, str]) -> None:
    """A-P-06 (forged), A-P-12 (hops)."""
    assert refused(route(replace(IDLE, head=Head(**head)))) == expected
    assert admit(Head(**head)) == route(replace(IDLE, head=Head(**head)))


@pytest.mark.parametrize("hops", [0, 15, 16])
def test_sixteen_hops_are_let_through(hops: int) -> None:
    assert admit(Head(hops=hops)) is None


ROWS: list[tuple[str, dict[str, Any], Verdict]] = [
    ("key running", {"key_running": True}, Keep(Reason.RUNNING)),
    ("same in flight", {"in_flight": InFlight.SAME}, Attach()),
    ("explicit key", {"keyed": True}, Keep(Reason.KEYED)),
    ("told id sent back", {"repeated": True}, Keep(Reason.REPEATED)),
    ("limited wait", {"limited_wait": True}, Keep(Reason.LIMITED_WAIT)),
    ("caller = target", {"to_itself": True}, Keep(Reason.SELF)),
    ("queue_first", {"queue_first": True}, Keep(Reason.QUEUE_FIRST)),
    ("backlog", {"backlog": 1}, Keep(Reason.BACKLOG)),
    ("never a copy", {"copied_at": None}, Keep(Reason.NO_COPY)),
    ("paused", {"paused": True}, Keep(Reason.PAUSED)),
    ("offline", {"status": "offline"}, Keep(Reason.OFFLINE)),
    ("restarting", {"status": "restarting"}, Keep(Reason.RESTARTING)),
    ("gave_up", {"status": "gave_up"}, Keep(Reason.GAVE_UP)),
    ("paused by liveness", {"status": "paused"}, Keep(Reason.PAUSED)),
    ("gate closed", {"gate_closed": True}, Keep(Reason.GATE_CLOSED)),
    ("no URL", {"has_url": False}, Keep(Reason.NO_URL)),
    ("not_before to come", {"not_before": NOW + 0.001}, Keep(Reason.NOT_BEFORE)),
    ("not_before is now", {"not_before": NOW}, Forward()),
    ("not_before is past", {"not_before": NOW - 0.001}, Forward()),
    ("one below capacity", {"in_use": 1, "in_use_max": 2}, Forward()),
    ("at capacity", {"in_use": 2, "in_use_max": 2}, Keep(Reason.AT_CAPACITY)),
    ("above capacity", {"in_use": 3, "in_use_max": 2}, Keep(Reason.AT_CAPACITY)),
    ("copy 19.9 s old", {"copied_at": NOW - 19.9}, Forward()),
    ("copy 20 s old", {"copied_at": NOW - 20}, Forward()),
    ("copy 20.1 s old", {"copied_at": NOW - 20.1}, Forward(stale_copy=True)),
    ("suspect is let through", {"status": "suspect"}, Forward()),
    ("online", {"status": "online"}, Forward()),
    ("else", {}, Forward()),
]


@pytest.mark.parametrize(("facts", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_each_row_of_the_table(facts: dict[str, Any], expected: Verdict) -> None:
    """A-P-12 (self is kept), A-P-14 (every unreachable state is kept), A-Q-17 (no busy without a keep)."""
    assert route(replace(IDLE, **facts)) == expected


def test_the_first_row_that_is_true_decides() -> None:
    """Every true row together, then without the first of them, and so on: the reasons come in the table's order."""
    everything: dict[str, Any] = {
        "head": Head(presence=Presence.UNKNOWN),
        "fault": FAULT,
        "priority": Priority.CRITICAL,
        "in_flight": InFlight.SAME,
        "known": True,
        "key_running": True,
        "share": Share(depth=1000),
        "critical_wait_s": 6.0,
        "keyed": True,
        "repeated": True,
        "limited_wait": True,
        "to_itself": True,
        "queue_first": True,
        "backlog": 5,
        "copied_at": None,
        "paused": True,
        "status": "offline",
        "gate_closed": True,
        "has_url": False,
        "not_before": NOW + 1,
        "in_use": 1,
    }
    seen = []
    for name in list(everything):
        verdict = route(replace(IDLE, **everything))
        seen.append(
            verdict.code if isinstance(verdict, Refuse) else getattr(verdict, "reason", type(verdict).__name__.lower())
        )
        del everything[name]
    assert route(replace(IDLE, **everything)) == Forward()
    assert seen == [
        "workspace_unknown", "body_too_large", "priority_not_allowed", "attach", "keyed", "running", "ask",
        "ask", "keyed", "repeated", "limited_wait", "self", "queue_first", "backlog", "no_copy", "paused", "offline",
        "gate_closed", "no_url", "not_before", "at_capacity",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("priority", "may", "status"),
    [(Priority.CRITICAL, False, 403), (Priority.CRITICAL, True, None), (Priority.TASK, False, None)],
)
def test_critical_needs_its_right(priority: Priority, may: bool, status: int | None) -> None:
    verdict = route(replace(IDLE, priority=priority, may_critical=may))
    assert (verdict.status if isinstance(verdict, Refuse) else None) == status


def test_another_body_under_a_key_in_flight_is_not_swallowed() -> None:
    assert refused(route(replace(IDLE, in_flight=InFlight.OTHER_BODY))) == (409, "key_in_flight")


SHARES = [
    ("one place left", Share(depth=999), None),
    ("full", Share(depth=1000), (429, "queue_full")),
    ("over", Share(depth=1001), (429, "queue_full")),
    ("half of it mine, others wait", Share(depth=600, callers=500, others=100), None),
    ("more than half mine, others wait", Share(depth=601, callers=501, others=100), (429, "share_exceeded")),
    ("more than half mine, nobody else", Share(depth=600, callers=600), None),
    ("depth exactly half", Share(depth=500, callers=499, others=1), None),
]


@pytest.mark.parametrize(("share", "expected"), [row[1:] for row in SHARES], ids=[row[0] for row in SHARES])
def test_depth_and_share(share: Share, expected: tuple[int, str] | None) -> None:
    """A-Q-24, A-P-13: the depth has an end, and one caller cannot have all of it."""
    verdict = route(replace(IDLE, share=share, backlog=share.depth))
    if expected is None:
        assert verdict == Keep(Reason.BACKLOG)
    else:
        assert refused(verdict) == expected
        assert isinstance(verdict, Refuse)
        assert verdict.retry_after_s


PLACES = [
    ("nothing measured", None, 1, 30),
    ("nothing measured, three at a time", None, 3, 30),
    ("a turn of a minute", 60.0, 1, 60),
    ("three of them at a time", 60.0, 3, 20),
    ("never before the moment", 10.0, 3, 4),
    ("a turn of 0 s", 0.0, 1, 1),
    ("just under a second", 0.99, 1, 1),
    ("a second", 1.0, 1, 1),
    ("just over a second", 1.01, 1, 2),
    ("just under the most", 599.5, 1, 600),
    ("the most", 600.0, 1, 600),
    ("over the most", 600.5, 1, 600),
    ("a turn of a day", 86_400.0, 1, 600),
    ("without an end", float("inf"), 1, 600),
]


@pytest.mark.parametrize(
    ("turn_s", "at_a_time", "expected"), [row[1:] for row in PLACES], ids=[row[0] for row in PLACES]
)
def test_when_a_place_frees(turn_s: float | None, at_a_time: int, expected: int) -> None:
    """A-P-13, A-Q-24: Retry-After says it."""
    assert place_frees_in_s(turn_s, at_a_time) == expected
    for share in (
        Share(depth=9, depth_max=9, turn_s=turn_s),
        Share(depth=8, depth_max=9, callers=7, others=1, turn_s=turn_s),
    ):
        verdict = route(replace(IDLE, share=share, in_use_max=at_a_time))
        assert isinstance(verdict, Refuse)
        assert verdict.retry_after_s == expected


SPENT = replace(IDLE, priority=Priority.CRITICAL, may_critical=True, critical_wait_s=5.2)
QUOTA = [
    ("a new one", {}, (429, "critical_quota")),
    ("to an idle agent or not", {"backlog": 3}, (429, "critical_quota")),
    ("one that joins", {"in_flight": InFlight.SAME}, Attach()),
    ("one that runs", {"key_running": True}, Keep(Reason.RUNNING)),
    ("a retry, not asked yet", {"repeated": True}, Ask()),
    ("a retry of an item", {"repeated": True, "known": True}, Keep(Reason.REPEATED)),
    ("a fresh key", {"keyed": True, "known": False}, (429, "critical_quota")),
    ("without the right", {"may_critical": False}, (403, "priority_not_allowed")),
    ("while the line is full", {"share": Share(depth=1000)}, (429, "queue_full")),
    ("with one left", {"critical_wait_s": 0.0}, Forward()),
]


@pytest.mark.parametrize(("facts", "expected"), [row[1:] for row in QUOTA], ids=[row[0] for row in QUOTA])
def test_the_quota_of_critical_is_for_what_takes_a_new_place(facts: dict[str, Any], expected: object) -> None:
    verdict = route(replace(SPENT, **facts))
    assert (refused(verdict) if isinstance(expected, tuple) else verdict) == expected


@pytest.mark.parametrize(
    ("wait_s", "told"), [(0.001, 1), (0.999, 1), (1.0, 1), (1.001, 2), (59.5, 60)], ids=lambda value: f"{value:g}"
)
def test_a_retry_after_is_never_before_the_moment(wait_s: float, told: int) -> None:
    """A-P-13: whoever comes back when told is not told to come back again."""
    for arrival in (replace(IDLE, head=Head(rate_wait_s=wait_s)), replace(SPENT, critical_wait_s=wait_s)):
        verdict = route(arrival)
        assert isinstance(verdict, Refuse)
        assert verdict.retry_after_s == told


COUNTED: list[tuple[str, dict[str, Any], Verdict, bool]] = [
    ("forwarded", {}, Forward(), True),
    ("kept", {}, Keep(Reason.BACKLOG), True),
    ("kept under a fresh key", {"known": False}, Keep(Reason.KEYED), True),
    ("an item already", {"known": True}, Keep(Reason.KEYED), False),
    ("runs already", {"key_running": True}, Keep(Reason.RUNNING), False),
    ("joined", {}, Attach(), False),
    ("refused", {}, FAULT, False),
]


@pytest.mark.parametrize(
    ("facts", "verdict", "expected"), [row[1:] for row in COUNTED], ids=[row[0] for row in COUNTED]
)
def test_what_takes_a_new_place(facts: dict[str, Any], verdict: Verdict, *, expected: bool) -> None:
    assert takes_place(replace(IDLE, **facts), verdict) is expected


FULL = replace(IDLE, share=Share(depth=1000), backlog=1000)
NAMED = [
    ("a key, not asked yet", {"keyed": True}, Ask()),
    ("an id, not asked yet", {"repeated": True}, Ask()),
    ("a key that stands for an item", {"keyed": True, "known": True}, Keep(Reason.KEYED)),
    ("an id that stands for an item", {"repeated": True, "known": True}, Keep(Reason.REPEATED)),
    ("a fresh key", {"keyed": True, "known": False}, (429, "queue_full")),
    ("an id that stands for nothing", {"repeated": True, "known": False}, (429, "queue_full")),
    ("both, of which neither is known", {"keyed": True, "repeated": True, "known": False}, (429, "queue_full")),
    ("a key that runs", {"keyed": True, "key_running": True}, Keep(Reason.RUNNING)),
    ("neither key nor id", {"queue_first": True}, (429, "queue_full")),
]


@pytest.mark.parametrize(("facts", "expected"), [row[1:] for row in NAMED], ids=[row[0] for row in NAMED])
def test_only_what_has_its_place_passes_the_depth(facts: dict[str, Any], expected: object) -> None:
    """A-Q-24, I2: a retry of what waits is never refused, and a fresh key buys no place."""
    verdict = route(replace(FULL, **facts))
    assert (refused(verdict) if isinstance(expected, tuple) else verdict) == expected


@pytest.mark.parametrize("known", [None, True, False])
def test_below_the_depth_nobody_is_asked(known: bool | None) -> None:
    assert route(replace(IDLE, keyed=True, known=known)) == Keep(Reason.KEYED)
    assert route(replace(IDLE, repeated=True, known=known)) == Keep(Reason.REPEATED)


@given(
    st.builds(
        Arrival,
        keyed=st.booleans(),
        backlog=st.integers(0, 3),
        copied_at=st.none() | st.floats(NOW - 60, NOW),
        paused=st.booleans(),
        gate_closed=st.booleans(),
        has_url=st.booleans(),
        in_use=st.integers(0, 3),
        in_use_max=st.integers(1, 3),
        now=st.just(NOW),
    )
)
def test_nothing_is_forwarded_past_a_backlog_a_gate_or_the_capacity(arrival: Arrival) -> None:
    """I3, I4, and a proxy that never had a copy."""
    if isinstance(route(arrival), Forward):
        assert not arrival.backlog
        assert not arrival.gate_closed
        assert not arrival.paused
        assert arrival.has_url
        assert arrival.copied_at is not None
        assert arrival.in_use < arrival.in_use_max
