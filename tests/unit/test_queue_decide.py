"""The policies of the queue, row by row: §2 what came back, §3 what becomes of the row, and whose slot is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args
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
    Head,
    Place,
    Reply,
    Requeue,
    Waiting,
    Workspace,
    begin,
    busy_wait_s,
    closed,
    end,
    fate,
    hear_beat,
    hear_forwards,
    keep,
    leave,
    paused,
    rank,
    spare,
    taken,
    turn_s,
    turns,
    why,
)
from shared.facts import ItemStatus, Priority

NOW = 1000.0
PLACE = (1, 7)
TASK = Priority.TASK
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
        pytest.param("preempted", {"attempts": 4}, 0, 0, True, id="preempted by nobody: as busy, no attempt"),
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
    return hear_beat(
        workspace, rev=rev, at=at, active=active, cadence_s=30, incarnation=incarnation, maximum=None, now=NOW
    )


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
    known = replace(beat(OPEN, rev=1, at=NOW - 1), floors=(0, PLACE[1]))
    begun = begin(known, [TASK], (0, PLACE[1]))
    back = end(begun, Ending.NEITHER, begun_at=NOW, now=NOW, back_at=PLACE)
    assert replace(back, rev=known.rev) == known


def test_a_new_life_whose_first_beat_came_before_the_last_of_the_old_one_forgets_no_unknown_end() -> None:
    """B-01, A-Q-23: begun after that beat, it may still run there; a later beat of the old life settles nothing."""
    old = replace(OPEN, recent_ended=((NOW - 1, 0.0),), max_concurrent=2)
    heard = beat(old, rev=1, at=NOW)
    new = hear_beat(
        heard, rev=2, at=NOW - 2, active=0, cadence_s=30.0, incarnation=heard.incarnation + 1, maximum=None, now=NOW
    )
    assert taken(new, NOW) == 1


def test_an_unknown_end_leaves_the_agent_busy_until_its_next_beat() -> None:
    known = begin(beat(OPEN, rev=1, at=NOW - 1), [TASK], (0, PLACE[1]))
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
            workspace = begin(keep(workspace, PLACE, TASK), [TASK], (0, PLACE[1]))
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
_OF_LANE = {0: Priority.CRITICAL, 1: TASK}


@settings(max_examples=300)
@given(st.lists(st.tuples(_STEPS, _PLACES), min_size=20, max_size=60))
def test_nothing_that_waits_lies_below_the_floor_of_its_lane(steps: list[tuple[str, Place]]) -> None:
    """Whatever comes in late, goes back, waits by its own clock or ends: a claim that begins at the floor meets it."""
    workspace = replace(OPEN, waiting=0)
    due: list[Place] = []
    later: list[Place] = []
    out: list[Place] = []
    for step, place in steps:
        if step in {"keep", "later"}:
            workspace = keep(workspace, place, _OF_LANE[place[0]])
            (due if step == "keep" else later).append(place)
        elif step == "due":
            due, later = due + later, []
        elif step == "claim" and due:
            claimed, floors = min(due), list(workspace.floors)
            seen = sorted(each for each in due + later if each[0] == claimed[0] and each[1] >= floors[claimed[0]])
            assert claimed in seen
            floors[claimed[0]] = seen[0][1]
            workspace = begin(workspace, [_OF_LANE[claimed[0]]], (floors[0], floors[1]))
            due.remove(claimed)
            out.append(claimed)
        elif step == "back" and out:
            back = out.pop(0)
            priority = _OF_LANE[back[0]]
            workspace = end(workspace, Ending.NEITHER, begun_at=NOW, now=NOW, back_at=back, priority=priority)
            later.append(back)
        elif step == "drop" and due + later:
            gone = max(due + later)
            (due if gone in due else later).remove(gone)
            workspace = leave(workspace, _OF_LANE[gone[0]])
        assert all(rank_ms >= workspace.floors[of] for of, rank_ms in due + later)
        assert workspace.waiting == len(due + later)
        assert workspace.waiting_critical == sum(of == 0 for of, _ in due + later)


# ── whose turn it is ─────────────────────────────────────────────────────────────────────────────────────────────────


def _heads(of: int, ages: str) -> list[Head]:
    """`n` came just now, `o` is older than the limit."""
    return [Head((of, n), of, NOW - (2000 if age == "o" else 1)) for n, age in enumerate(ages)]


@pytest.mark.parametrize(
    ("critical", "rest", "room", "served_critical", "expected"),
    [
        pytest.param("", "nn", 1, False, "r", id="no CRITICAL: the rest"),
        pytest.param("nn", "", 2, True, "cc", id="only CRITICAL"),
        pytest.param("nn", "nn", 3, True, "ccr", id="CRITICAL first, whoever went last"),
        pytest.param("nn", "oo", 1, False, "c", id="one that starves lets CRITICAL begin"),
        pytest.param("nn", "oo", 1, True, "r", id="and takes the turn after it"),
        pytest.param("nnn", "ooo", 6, True, "rcrcrc", id="every second turn, within one claim too"),
        pytest.param("nnn", "on", 4, True, "rccc", id="who has not waited too long waits on"),
        pytest.param("n", "oo", 5, False, "crr", id="the room may be larger than the line"),
    ],
)
def test_turns(critical: str, rest: str, room: int, served_critical: bool, expected: str) -> None:
    chosen = turns(
        _heads(0, critical), _heads(1, rest), room=room, served_critical=served_critical, now=NOW,
        starvation_limit_s=1800,
    )  # fmt: skip
    assert "".join("cr"[head.lane] for head in chosen) == expected
    for of in (0, 1):
        places = [head.version for head in chosen if head.lane == of]
        assert places == sorted(places), "each lane keeps its order"


@pytest.mark.parametrize(("critical_waits", "closes"), [(True, False), (False, True)])
def test_a_preempted_item_keeps_its_place_and_costs_no_attempt(critical_waits: bool, closes: bool) -> None:
    """Where nobody pre-empted it, it is as busy: else it would be offered again at once, for ever."""
    decided = fate(
        "preempted", attempts=4, deaths=2, at_most_once=True, cancel_requested=False, critical_waits=critical_waits
    )
    assert decided == Requeue("preempted", Ending.ANSWERED, closes=closes)


def test_a_pause_is_counted_from_its_first_word_to_the_last() -> None:
    first, _ = paused(OPEN, NOW, is_paused=True)
    again, _ = paused(first, NOW + 5, is_paused=True)
    assert again.paused_at == NOW
    assert paused(again, NOW + 9, is_paused=False) == (replace(again, paused=False, paused_at=None), NOW)
    assert paused(OPEN, NOW, is_paused=False) == (OPEN, None)


def test_a_turn_takes_the_median_of_the_last_twenty() -> None:
    workspace = OPEN
    for length in (100.0, *range(1, 21)):
        workspace = end(replace(workspace, running=1), Ending.ANSWERED, begun_at=NOW - length, now=NOW)
    assert len(workspace.turns_s) == 20
    assert turn_s(workspace) == 11
    assert turn_s(OPEN) is None


# ── why ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

FULL = replace(OPEN, running=1, ceiling_s=1800)


@pytest.mark.parametrize(
    ("workspace", "item", "sentence", "reason"),
    [
        pytest.param(FULL, {}, "next in line: its agent is at 1/1", "at_capacity", id="next"),
        pytest.param(FULL, {"position": 2}, "2nd in line: its agent is at 1/1", "at_capacity", id="2nd"),
        pytest.param(FULL, {"position": 11}, "11th in line: its agent is at 1/1", "at_capacity", id="11th"),
        pytest.param(
            FULL,
            {"position": 3, "session_began": NOW - 720, "priority": Priority.INFO, "rank_ms": int(NOW * 1000) + 80_000},
            "3rd in line: its agent is at 1/1, its session runs for 12 m of 30 m; "
            "in 80 s a newer TASK can no longer overtake it",
            "at_capacity",
            id="INFO behind a session",
        ),
        pytest.param(
            replace(FULL, waiting_critical=2),
            {"position": 4},
            "4th in line: its agent is at 1/1; CRITICAL goes first (2 of it here)",
            "at_capacity",
            id="behind CRITICAL",
        ),
        pytest.param(OPEN, {}, "next in line: its agent is at 0/1", "in_line", id="it is about to go"),
        pytest.param(
            OPEN, {"not_before": NOW + 5, "attempts": 1},
            "next in line: after a failed attempt it waits for another 5 s", "not_before", id="its own clock",
        ),
        pytest.param(
            FULL, {"not_before": NOW + 5}, "next in line: it waits for another 5 s", "not_before",
            id="its own clock, and its agent is full",
        ),
        pytest.param(
            replace(OPEN, paused=True, paused_at=NOW - 12_000), {},
            "next in line: the workspace has been paused for 3 h 20 m, and its clocks stand still", "paused",
            id="paused",
        ),
        pytest.param(
            replace(OPEN, not_before=NOW + 3), {},
            "next in line: its agent said it is busy and is asked again in 3 s", "busy", id="busy",
        ),
        pytest.param(
            replace(OPEN, url=None), {}, "next in line: its agent has not registered yet", "no_url", id="no agent"
        ),
        pytest.param(
            replace(OPEN, removed=True), {}, "next in line: the workspace was removed", "removed", id="removed"
        ),
    ],
)  # fmt: skip
def test_why(workspace: Workspace, item: dict[str, Any], sentence: str, reason: str) -> None:
    said, fields = why(workspace, Waiting(**{"position": 1, **item}), NOW)
    assert said == sentence
    assert fields["reason"] == reason
    assert fields["ahead"] == item.get("position", 1) - 1


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("streak", "asked", "jitter", "expected"),
    [(0, None, 1.0, 1.0), (3, None, 1.0, 8.0), (99, None, 1.0, 60.0), (3, None, 0.5, 4.0), (0, None, 0.0, 0.05),
     (9, 2.5, 1.0, 2.5), (9, 0.0, 1.0, 0.05), (9, 500.0, 1.0, 60.0)],
)  # fmt: skip
def test_busy_wait(streak: int, asked: float | None, jitter: float, expected: float) -> None:
    assert busy_wait_s(streak, retry_after_s=asked, base_s=1, cap_s=60, jitter=jitter) == expected


@pytest.mark.parametrize(
    ("read_ms", "kept_ms", "expected"),
    [(100_000, 100_001, 100_000), (90_001, 100_001, 90_001), (90_000, 100_001, 90_001), (1, 100_001, 90_001)],
)
def test_a_place_in_the_line_is_when_the_body_was_read_within_reason(read_ms: int, kept_ms: int, expected: int) -> None:
    """First in, first out, also for a forward that bounced; an old id that a caller brings back wins ten seconds."""
    ids = UUID(int=read_ms << 80), UUID(int=kept_ms << 80)
    assert rank(*ids, TASK) == rank(*ids, Priority.CRITICAL) == expected
    assert rank(*ids, Priority.INFO) == expected + 120_000
