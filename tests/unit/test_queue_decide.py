"""The policies of the queue, row by row: §2 what came back, §3 what becomes of the row, and whose slot is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.queue.decide import (
    Closed,
    Ending,
    Fate,
    Finish,
    Forwards,
    Place,
    Reply,
    Requeue,
    Workspace,
    begin,
    busy_wait_s,
    closed,
    end,
    fate,
    hear_beat,
    hear_forwards,
    keep,
    rank,
    spare,
    taken,
    why,
)
from shared.facts import ItemStatus

NOW = 1000.0
PLACE = (1, 7)
OPEN = Workspace("w", url="http://a", waiting=5)


def decided(reply: Reply, *, attempts: int = 0, deaths: int = 0, once: bool = False, cancel: bool = False) -> Fate:
    return fate(reply, attempts=attempts, deaths=deaths, at_most_once=once, cancel_requested=cancel)


@pytest.mark.parametrize(
    ("reply", "before", "status", "reason"),
    [
        pytest.param("delivered", {}, "completed", None, id="Message, or Task in a terminal or interrupted state"),
        pytest.param("answer_lost", {}, "completed", "answer_lost", id="body lost after 2xx headers"),
        pytest.param("answer_too_large", {}, "completed", "answer_too_large", id="body over 8 MiB"),
        pytest.param("ceiling", {}, "failed", "ceiling", id="a task that outlasts its longest turn"),
        pytest.param("refused", {}, "failed", "refused", id="JSON-RPC -32600…; other 4xx"),
        pytest.param("failed_attempt", {"attempts": 4}, "failed", "attempts", id="failed attempt, the fifth"),
        pytest.param("unknown", {"deaths": 2, "attempts": 2}, "failed", "poison", id="unknown, the third death"),
        pytest.param("unknown", {"attempts": 4}, "failed", "attempts", id="unknown, the fifth attempt"),
        pytest.param("unknown", {"once": True}, "failed", "delivery_unknown", id="unknown, at most once"),
        pytest.param("owner_died", {"once": True}, "failed", "delivery_unknown", id="owner died, at most once"),
    ],
)
def test_an_item_ends(reply: Reply, before: dict[str, int], status: str, reason: str | None) -> None:
    """A-Q-10, B-12."""
    verdict = decided(reply, **before)  # type: ignore[arg-type]
    assert isinstance(verdict, Finish)
    assert (verdict.status.value, verdict.reason) == (status, reason)


@pytest.mark.parametrize(
    ("reply", "before", "attempts", "deaths", "closes"),
    [
        pytest.param("busy", {"attempts": 4}, 0, 0, True, id="429/503 with Retry-After: no attempt"),
        pytest.param("not_delivered", {"attempts": 4}, 0, 0, True, id="refused, DNS, timeout, TLS: no attempt"),
        pytest.param("preempted", {"attempts": 4}, 0, 0, False, id="preempted: no attempt"),
        pytest.param("written_back", {"attempts": 4}, 0, 0, False, id="our SIGTERM: neither is counted"),
        pytest.param("failed_attempt", {"attempts": 3}, 1, 0, False, id="failed attempt, the fourth"),
        pytest.param("unknown", {"deaths": 1, "attempts": 1}, 1, 1, False, id="bytes sent, then EOF: the second death"),
        pytest.param("owner_died", {"attempts": 2, "deaths": 2}, 1, 0, False, id="our replica died: no death"),
        pytest.param("owner_died", {"attempts": 9}, 1, 0, False, id="our deaths never fail a message"),
    ],
)
def test_an_item_goes_back_to_its_place(
    reply: Reply, before: dict[str, int], attempts: int, deaths: int, *, closes: bool
) -> None:
    """A-Q-01, A-Q-11, A-Q-12: the same row, the same rank; only what the agent did counts against the message."""
    verdict = decided(reply, **before)  # type: ignore[arg-type]
    assert isinstance(verdict, Requeue)
    assert (verdict.attempts, verdict.deaths, verdict.closes) == (attempts, deaths, closes)


@pytest.mark.parametrize("reply", [reply for reply in get_args(Reply) if isinstance(decided(reply), Requeue)])
def test_a_row_that_would_return_with_a_cancel_on_it_ends_as_canceled(reply: Reply) -> None:
    """B-13."""
    verdict = decided(reply, cancel=True)
    assert isinstance(verdict, Finish)
    assert verdict.status is ItemStatus.CANCELED


def test_an_answer_outranks_a_cancel() -> None:
    assert decided("delivered", cancel=True) == decided("delivered")


@given(st.sampled_from(get_args(Reply)), st.integers(0, 4), st.integers(0, 2), st.booleans(), st.booleans())
def test_attempts_and_deaths_end(reply: Reply, attempts: int, deaths: int, once: bool, cancel: bool) -> None:
    """B-12: attempts over the limit are impossible but by the death of our own replicas."""
    verdict = decided(reply, attempts=attempts, deaths=deaths, once=once, cancel=cancel)
    if isinstance(verdict, Requeue) and reply != "owner_died":
        assert attempts + verdict.attempts < 5
        assert deaths + verdict.deaths < 3


# ── whose slot is taken ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("workspace", "expected"),
    [
        pytest.param(OPEN, 0, id="nothing known, nothing of ours"),
        pytest.param(replace(OPEN, running=1), 1, id="ours"),
        pytest.param(replace(OPEN, beat_at=NOW - 1, beat_active=1), 1, id="the agent says so"),
        pytest.param(replace(OPEN, beat_at=NOW - 1, beat_active=1, running=1), 1, id="ours is the one it counts"),
        pytest.param(replace(OPEN, beat_at=NOW - 1, running=1, started_since=1), 1, id="begun after the beat"),
        pytest.param(
            replace(OPEN, beat_at=NOW - 1, beat_active=1, ended_since=1), 0, id="counted, and answered since"
        ),
        pytest.param(
            replace(OPEN, beat_at=NOW - 1, beat_active=2, running=1, started_since=1, ended_since=1), 2,
            id="one foreign, one ours that followed one of ours",
        ),
        pytest.param(replace(OPEN, beat_at=NOW - 65, beat_active=1), 1, id="beat of 2 cadences + 5 s"),
        pytest.param(replace(OPEN, beat_at=NOW - 65.1, beat_active=1), 0, id="older: no beat"),
    ],
)  # fmt: skip
def test_taken(workspace: Workspace, expected: int) -> None:
    """A-Q-23, A-Q-15."""
    assert taken(workspace, NOW) == expected


def forwarding(*, at: float, started: float) -> Workspace:
    return hear_forwards(OPEN, "p", Forwards(rev=1, at=at, running=(("s", "", started),)))


@pytest.mark.parametrize(("age_s", "expected"), [(14.9, 1), (15.0, 0), (15.1, 0)])
def test_a_live_forward_counts_while_its_proxy_lives(age_s: float, expected: int) -> None:
    assert taken(forwarding(at=NOW - age_s, started=NOW - age_s), NOW) == expected


def test_a_forward_that_the_beat_counts_already_is_not_counted_twice() -> None:
    workspace = replace(forwarding(at=NOW - 1, started=NOW - 5), beat_at=NOW - 2, beat_active=1)
    assert taken(workspace, NOW) == 1


@pytest.mark.parametrize(("ended_ago_s", "expected"), [(2.9, 0), (3.0, 0), (3.1, 1)])
def test_what_ended_just_before_the_beat_may_still_be_in_its_count(ended_ago_s: float, expected: int) -> None:
    """A beat is sampled up to 2 s before it comes in (here: 1 s ago)."""
    ended = Forwards(rev=1, at=NOW, ended=((NOW - 10, NOW - ended_ago_s, True),))
    workspace = replace(hear_forwards(OPEN, "p", ended), beat_at=NOW - 1, beat_active=1)
    assert taken(workspace, NOW) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"removed": True}, Closed.REMOVED),
        ({"paused": True}, Closed.PAUSED),
        ({"url": None}, Closed.NO_URL),
        ({"not_before": NOW + 0.1}, Closed.BUSY),
        ({"not_before": NOW}, None),
        ({}, None),
    ],
)
def test_closed(changes: dict[str, object], reason: Closed | None) -> None:
    workspace = replace(OPEN, **changes)  # type: ignore[arg-type]
    assert closed(workspace, NOW) is reason
    assert spare(workspace, NOW) == (0 if reason else 1)


@pytest.mark.parametrize(("maximum", "running", "waiting", "expected"), [(1, 1, 5, 0), (3, 1, 5, 2), (9, 0, 2, 2)])
def test_spare(maximum: int, running: int, waiting: int, expected: int) -> None:
    assert spare(replace(OPEN, max_concurrent=maximum, running=running, waiting=waiting), NOW) == expected


# ── what changes a workspace ─────────────────────────────────────────────────────────────────────────────────────────


def beat(workspace: Workspace, *, rev: int, active: int = 0, incarnation: int = 0, at: float = NOW) -> Workspace:
    return hear_beat(workspace, rev=rev, at=at, active=active, cadence_s=30, incarnation=incarnation, maximum=None)


def test_an_older_beat_or_life_changes_nothing() -> None:
    """D-S25: delayed, duplicated, out of order, of the old incarnation."""
    known = beat(replace(OPEN, incarnation=2), rev=10, active=1, incarnation=2)
    assert beat(known, rev=10, incarnation=2) is known
    assert beat(known, rev=9, incarnation=2) is known
    assert beat(known, rev=11, incarnation=1) is known


def test_a_beat_with_room_opens_a_workspace_that_was_busy() -> None:
    shut = replace(OPEN, not_before=NOW + 60, busy_streak=3)
    assert beat(shut, rev=1, active=0).not_before is None
    assert beat(shut, rev=1, active=1).not_before == NOW + 60


def test_a_session_ends_as_if_it_had_not_begun_when_it_met_a_busy_agent() -> None:
    known = replace(beat(OPEN, rev=1, at=NOW - 1), floor=PLACE)
    begun = begin(known, 1, PLACE)
    back = end(begun, Ending.NEITHER, begun_at=NOW, now=NOW, back_at=PLACE)
    assert replace(back, rev=known.rev) == known


def test_an_unknown_end_leaves_the_agent_busy_until_its_next_beat() -> None:
    known = begin(beat(OPEN, rev=1, at=NOW - 1), 1, PLACE)
    lost = end(known, Ending.UNKNOWN, begun_at=NOW, now=NOW, back_at=PLACE)
    assert taken(lost, NOW) == 1
    assert taken(beat(lost, rev=2, at=NOW + 5), NOW + 5) == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "beat", "answered", "neither", "unknown"]), st.integers(0, 3)),
        max_size=40,
    )
)
def test_counters_follow_any_sequence(steps: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order: what runs is what began and has not ended, and nothing falls below zero."""
    workspace = replace(OPEN, max_concurrent=4, waiting=0)
    began: list[float] = []
    now = NOW
    for rev, (step, active) in enumerate(steps, start=1):
        now += 1
        if step == "begin":
            workspace = begin(keep(workspace, PLACE), 1, PLACE)
            began.append(now)
        elif step == "beat":
            workspace = beat(workspace, rev=rev, active=active, at=now)
        elif began:
            ending = {"answered": Ending.ANSWERED, "neither": Ending.NEITHER, "unknown": Ending.UNKNOWN}[step]
            back_at = PLACE if step != "answered" else None
            workspace = end(workspace, ending, begun_at=began.pop(0), now=now, back_at=back_at)
        assert workspace.running == len(began)
        assert workspace.started_since >= 0
        assert len(workspace.recent_ended) <= 4
        assert taken(workspace, now) >= len(began)


_PLACES = st.tuples(st.integers(0, 1), st.integers(0, 6))


# Weighted: a floor rises only by claims that follow each other, and what goes back must have been claimed before.
_STEPS = st.sampled_from(["keep", "keep", "later", "due", "claim", "claim", "claim", "back", "drop"])


@settings(max_examples=300)
@given(st.lists(st.tuples(_STEPS, _PLACES), min_size=20, max_size=60))
def test_nothing_that_waits_lies_below_the_floor(steps: list[tuple[str, Place]]) -> None:
    """Whatever comes in late, goes back, waits by its own clock or ends: a claim that begins at the floor meets it."""
    workspace = replace(OPEN, waiting=0)
    due: list[Place] = []
    later: list[Place] = []
    out: list[Place] = []
    for step, place in steps:
        line = sorted(due + later)
        if step in {"keep", "later"}:
            workspace = keep(workspace, place)
            (due if step == "keep" else later).append(place)
        elif step == "due":
            due, later = due + later, []
        elif step == "claim" and due:
            seen = [each for each in line if each >= workspace.floor]
            claimed = min(each for each in seen if each in due)
            assert claimed == min(due), "the order of claims is that of places"
            workspace = begin(workspace, 1, seen[0])
            due.remove(claimed)
            out.append(claimed)
        elif step == "back" and out:
            back = out.pop(0)
            workspace = end(workspace, Ending.NEITHER, begun_at=NOW, now=NOW, back_at=back)
            later.append(back)
        elif step == "drop" and line:
            (due if line[-1] in due else later).remove(line[-1])
            workspace = replace(workspace, waiting=workspace.waiting - 1)
        assert all(each >= workspace.floor for each in due + later)
        assert workspace.waiting == len(due + later)


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("streak", "asked", "jitter", "expected"),
    [(0, None, 1.0, 1.0), (3, None, 1.0, 8.0), (99, None, 1.0, 60.0), (3, None, 0.5, 4.0), (0, None, 0.0, 0.05),
     (9, 2.5, 1.0, 2.5), (9, 0.0, 1.0, 0.05), (9, 500.0, 1.0, 60.0)],
)  # fmt: skip
def test_busy_wait(streak: int, asked: float | None, jitter: float, expected: float) -> None:
    assert busy_wait_s(streak, retry_after_s=asked, base_s=1, cap_s=60, jitter=jitter) == expected


@pytest.mark.parametrize(
    ("position", "sentence"),
    [(1, "next in line: its agent is at 1/1"), (2, "2nd in line: its agent is at 1/1"),
     (3, "3rd in line: its agent is at 1/1"), (11, "11th in line: its agent is at 1/1"),
     (21, "21st in line: its agent is at 1/1")],
)  # fmt: skip
def test_why(position: int, sentence: str) -> None:
    assert why(replace(OPEN, running=1), position, NOW) == sentence


@pytest.mark.parametrize(
    ("read_ms", "kept_ms", "expected"),
    [(100_000, 100_001, 100_000), (90_001, 100_001, 90_001), (90_000, 100_001, 90_001), (1, 100_001, 90_001)],
)
def test_a_place_in_the_line_is_when_the_body_was_read_within_reason(read_ms: int, kept_ms: int, expected: int) -> None:
    """First in, first out, also for a forward that bounced; an old id that a caller brings back wins ten seconds."""
    assert rank(UUID(int=read_ms << 80), UUID(int=kept_ms << 80)) == expected
