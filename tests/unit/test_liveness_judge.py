"""The table of policies §6, row by row, and what no sequence of evidence may ever do."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.liveness.decide.doubts import doubt_of
from services.liveness.decide.judge import AGAIN_S, BLIND_S, MEMORY_S, SPREAD_S, Doubt, Reason, Verdict, judge
from services.liveness.decide.life import Life, Status, beat, evidence, gone, registered
from services.liveness.decide.seen import Observation, Seen
from shared.facts import EvidenceKind, WorkspaceEvidence, WorkspaceHeartbeat, WorkspaceRegistered

NOW = datetime(2026, 4, 16, 8, 33, 50, tzinfo=UTC)
CALM = Doubt(listening_since=NOW - timedelta(days=1))
RECENTLY, LONG_AGO = 4.0, 300.0


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def life(heard_s: float | None = RECENTLY, **about: Any) -> Life:
    """A healthy agent whose driver has seen it, with a cadence of 7.5 s: its window is 15 s."""
    values: dict[str, Any] = {
        "driver": "process", "known": True, "container_id": "7:1", "cadence_s": 7.5,
        "heard_at": ago(heard_s) if heard_s is not None else None, **about,
    }  # fmt: skip
    return Life("w1", 1, 3, **values)


def suspected(since_s: float, heard_s: float = RECENTLY, **about: Any) -> Life:
    return life(heard_s, suspected_at=ago(since_s), suspected_last_at=ago(since_s), suspicions=1, **about)


def started(boot_left_s: float, **about: Any) -> Life:
    """We started it 120 s before that, and it was not heard since."""
    values: dict[str, Any] = {
        "status": Status.RESTARTING, "restarted_at": ago(120 - boot_left_s), "boot_until": ago(-boot_left_s),
        "unheard": 1, **about,
    }  # fmt: skip
    return life(None, **values)


STOPPED = Observation(Seen.STOPPED, "7:1")
NOT_FOUND = Observation(Seen.NOT_FOUND)
RUNNING = Observation(Seen.RUNNING, "7:1")
ANOTHER = Observation(Seen.RUNNING, "8:1")
TRANSITION = Observation(Seen.TRANSITION, "7:1", why="paused")
UNKNOWN = Observation(Seen.UNKNOWN, why="timeout")

TABLE = [
    ("paused", life(LONG_AGO, paused=True), STOPPED, Verdict.LEFT_ALONE, Reason.PAUSED),
    ("cordoned", life(LONG_AGO, cordoned=True), STOPPED, Verdict.LEFT_ALONE, Reason.CORDONED),
    ("external", life(LONG_AGO, driver=None), STOPPED, Verdict.LEFT_ALONE, Reason.EXTERNAL),
    ("removed", life(LONG_AGO, removed=True), STOPPED, Verdict.LEFT_ALONE, Reason.REMOVED),
    ("meant to be stopped", life(LONG_AGO, desired="stopped"), STOPPED, Verdict.LEFT_ALONE, Reason.DESIRED_STOPPED),
    ("an error is alive, however long silent", life(LONG_AGO), UNKNOWN, Verdict.BLIND, Reason.PROBE_FAILED),
    ("an error of a suspect is alive", suspected(12), UNKNOWN, Verdict.BLIND, Reason.PROBE_FAILED),
    ("blind below the limit", life(blind_since=ago(BLIND_S - 1)), UNKNOWN, Verdict.BLIND, Reason.PROBE_FAILED),
    ("blind at the limit", life(blind_since=ago(BLIND_S)), UNKNOWN, Verdict.BLIND, Reason.PROBE_BLIND),
    ("running is alive, however long silent", life(LONG_AGO), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("running resets a suspicion", suspected(12), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("in transition", life(LONG_AGO), TRANSITION, Verdict.WAIT, Reason.TRANSITION),
    ("in transition while suspect", suspected(12), TRANSITION, Verdict.WAIT, Reason.TRANSITION),
    ("booting", life(None, boot_until=ago(-1)), STOPPED, Verdict.WAIT, Reason.BOOTING),
    ("its boot deadline is over", life(None, boot_until=ago(0)), STOPPED, Verdict.DEAD, Reason.STOPPED),
    ("runs unheard, its boot nearly over", started(0.1), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("runs unheard, its boot over", started(0), RUNNING, Verdict.DEAD, Reason.UNHEARD),
    ("runs unheard for long", started(-600), RUNNING, Verdict.DEAD, Reason.UNHEARD),
    ("paused in the engine, its boot over", started(-600), TRANSITION, Verdict.WAIT, Reason.TRANSITION),
    ("unheard because it never beats", started(0, expects_beats=False), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("unheard, and paused", started(0, paused=True), RUNNING, Verdict.LEFT_ALONE, Reason.PAUSED),
    ("its restart is on its way", started(0, boot_until=None), RUNNING, Verdict.WAIT, Reason.DECLARED),
    ("given up unheard, and runs", started(0, status=Status.GAVE_UP), RUNNING, Verdict.WAIT, Reason.DECLARED),
    ("given up, and somebody started it", started(0, status=Status.GAVE_UP), ANOTHER, Verdict.ALIVE, Reason.RUNNING),
    ("given up, and it is there again", life(status=Status.GAVE_UP), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("declared dead before", life(LONG_AGO, status=Status.OFFLINE), STOPPED, Verdict.WAIT, Reason.DECLARED),
    ("given up", life(LONG_AGO, status=Status.GAVE_UP), STOPPED, Verdict.WAIT, Reason.DECLARED),
    ("stopped and heard recently", life(), STOPPED, Verdict.SUSPECT, Reason.SUSPECTED),
    ("not found and heard recently", life(), NOT_FOUND, Verdict.SUSPECT, Reason.SUSPECTED),
    ("heard just within its window", life(15.0), STOPPED, Verdict.SUSPECT, Reason.SUSPECTED),
    ("heard just outside its window", life(15.1), STOPPED, Verdict.DEAD, Reason.STOPPED),
    ("a second one too soon", suspected(SPREAD_S - 0.1), STOPPED, Verdict.SUSPECT, Reason.SUSPECTED),
    ("a second one far enough apart", suspected(SPREAD_S), STOPPED, Verdict.DEAD, Reason.STOPPED),
    ("a second one, of the other kind", suspected(SPREAD_S), NOT_FOUND, Verdict.DEAD, Reason.NOT_FOUND),
    ("a second one just in time", suspected(MEMORY_S), STOPPED, Verdict.DEAD, Reason.STOPPED),
    ("a second one too late is a first", suspected(MEMORY_S + 0.1), STOPPED, Verdict.SUSPECT, Reason.SUSPECTED),
    ("stopped and silent", life(LONG_AGO), STOPPED, Verdict.DEAD, Reason.STOPPED),
    ("not found and never heard", life(None), NOT_FOUND, Verdict.DEAD, Reason.NOT_FOUND),
    ("its driver has never run it", life(known=False), NOT_FOUND, Verdict.DEAD, Reason.FIRST_START),
    ("silent in the midst of work", life(240, active=1), RUNNING, Verdict.WEDGED, Reason.WEDGED),
    ("silent in the midst of work, not yet long", life(239, active=1), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("silent in work that got on", life(240, active=1, progress_at=ago(9)), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("silent and idle", life(240), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("silent because it boots", life(300, active=1, boot_until=ago(-1)), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("silent since it was started", life(400, active=1, restarted_at=ago(240)), RUNNING, Verdict.WEDGED, Reason.WEDGED),
    ("started not long ago", life(400, active=1, restarted_at=ago(239)), RUNNING, Verdict.ALIVE, Reason.RUNNING),
    ("silent because it never beats", life(240, active=1, expects_beats=False), RUNNING, Verdict.ALIVE, Reason.RUNNING),
]  # fmt: skip


@pytest.mark.parametrize(
    ("was", "seen", "verdict", "reason"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_the_table(was: Life, seen: Observation, verdict: Verdict, reason: Reason) -> None:
    """A-L-01, A-L-03, A-L-04, A-L-12, A-L-15, A-L-18, D-S3, D-S4, D-S7, D-S8, D-S9, D-S17."""
    decision = judge(was, seen, NOW, CALM)
    assert (decision.verdict, decision.reason) == (verdict, reason)
    assert decision.sentence.endswith(".")


@pytest.mark.parametrize("heard_s", [0.0, RECENTLY, LONG_AGO])
def test_the_engines_word_that_this_container_has_ended_is_definitive(heard_s: float) -> None:
    """D-S6: also while everybody is in doubt."""
    decision = judge(life(heard_s), STOPPED, NOW, Doubt(fleet=True, deaf=True, self_slow=True), exited=True)
    assert (decision.verdict, decision.reason) == (Verdict.DEAD, Reason.EXITED)


def test_the_story_of_08_33_46() -> None:
    """D-S3: PONG at 08:33:46, one 503 and one flaky look later it was recycled. Here it is looked at again."""
    first = judge(life(), NOT_FOUND, NOW + timedelta(seconds=3), CALM)
    assert first.verdict is Verdict.SUSPECT
    assert first.sentence == "1 of 2 within 30 s, heard 7 s ago: waiting until 08:34:02."
    assert first.life.next_check_at == NOW + timedelta(seconds=12)
    assert first.life.status is Status.SUSPECT
    second = judge(first.life, RUNNING, NOW + timedelta(seconds=12), CALM)
    assert second.verdict is Verdict.ALIVE
    assert second.life.suspicions == 0
    assert second.life.status is Status.ONLINE


def test_a_suspect_is_looked_at_after_9_s_and_once_more_after_15() -> None:
    """A-L-03, D-S4: most flakes end before the first of them, all before the second."""
    first = judge(life(), STOPPED, NOW, CALM)
    assert first.life.next_check_at == NOW + timedelta(seconds=AGAIN_S)
    second = judge(first.life, STOPPED, NOW + timedelta(seconds=AGAIN_S), CALM)
    assert second.verdict is Verdict.SUSPECT
    assert second.life.next_check_at == NOW + timedelta(seconds=SPREAD_S)
    assert second.sentence == "1 of 2 within 30 s, heard 13 s ago: waiting until 08:34:05."
    third = judge(second.life, STOPPED, NOW + timedelta(seconds=SPREAD_S), CALM)
    assert third.verdict is Verdict.DEAD
    assert third.sentence.startswith("2 of 2 within 30 s, 15 s apart: dead")


@pytest.mark.parametrize(
    "doubt",
    [
        Doubt(deaf=True),
        Doubt(fleet=True, listening_since=ago(999)),
        Doubt(self_slow=True, listening_since=ago(999)),
        Doubt(listening_since=ago(5)),
    ],
    ids=["no proxy is heard", "the fleet falls suspect", "this replica has just started", "proxies are heard again"],
)
def test_in_doubt_silence_is_no_reason_and_a_second_look_is(doubt: Doubt) -> None:
    """D-S1, D-S16, D-S23: held, until two looks far enough apart agree."""
    first = judge(life(LONG_AGO), STOPPED, NOW, doubt)
    assert first.verdict is Verdict.SUSPECT
    second = judge(first.life, STOPPED, NOW + timedelta(seconds=SPREAD_S), doubt)
    assert second.verdict is Verdict.DEAD
    assert judge(life(999, active=1), RUNNING, NOW, replace(doubt, listening_since=ago(100))).verdict is Verdict.ALIVE


@pytest.mark.parametrize(
    ("doubt", "verdict"),
    [
        (Doubt(deaf=True), Verdict.ALIVE),
        (Doubt(fleet=True, listening_since=ago(999)), Verdict.ALIVE),
        (Doubt(self_slow=True, listening_since=ago(999)), Verdict.ALIVE),
        (Doubt(listening_since=ago(119)), Verdict.ALIVE),
        (Doubt(listening_since=ago(120)), Verdict.DEAD),
        (Doubt(listening_since=ago(121)), Verdict.DEAD),
    ],
    ids=["no proxy is heard", "the fleet", "this replica", "heard again 119 s ago", "120 s ago", "121 s ago"],
)
def test_unheard_counts_only_while_it_could_have_been_heard(doubt: Doubt, verdict: Verdict) -> None:
    """D-S1, D-S9: a boot that a broker's outage swallowed begins anew."""
    assert judge(started(-600), RUNNING, NOW, doubt).verdict is verdict


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, (False, False)),
        ({"listening_since": None}, (False, True)),
        ({"suspects": 3}, (True, False)),
        ({"suspects": 2}, (False, False)),
        ({"suspects": 2, "agents": 2}, (False, False)),
        ({"suspects": 4, "agents": 13}, (False, False)),
        ({"last_beat_at": ago(61)}, (True, False)),
        ({"last_beat_at": ago(60)}, (False, False)),
        ({"last_beat_at": ago(61), "expected": 2}, (False, False)),
        ({"last_beat_at": ago(61), "listening_since": None}, (False, True)),
    ],
    ids=[
        "nothing", "no proxy", "a third of nine", "two of nine", "both of two", "four of thirteen",
        "no beat for two cadences", "none for just two", "two agents may die together", "nobody is heard at all",
    ],
)  # fmt: skip
def test_when_liveness_distrusts_itself(about: dict[str, Any], expected: tuple[bool, bool]) -> None:
    """D-S1, D-S16."""
    calm: dict[str, Any] = {
        "agents": 9, "suspects": 0, "expected": 9, "last_beat_at": ago(1), "cadence_s": 30.0,
        "listening_since": ago(999), "self_slow": False, "wedged_after_s": 240.0, "now": NOW,
    }  # fmt: skip
    doubt = doubt_of(**{**calm, **about})
    assert (doubt.fleet, doubt.deaf) == expected


# ── what is heard ────────────────────────────────────────────────────────────────────────────────────────────────────


def heartbeat(rev: int, *, incarnation: int = 3, **about: Any) -> WorkspaceHeartbeat:
    return WorkspaceHeartbeat(workspace_id="w1", rev=rev, incarnation=incarnation, active_tasks=0, **about)


def said(kind: EvidenceKind, *, incarnation: int = 3) -> WorkspaceEvidence:
    return WorkspaceEvidence(workspace_id="w1", rev=1, incarnation=incarnation, kind=kind)


def test_a_beat_of_an_older_incarnation_or_that_comes_twice_is_not_heard() -> None:
    """D-S25: it neither refreshes a life nor ends a boot."""
    booting = life(LONG_AGO, beat_rev=10, status=Status.RESTARTING, boot_until=ago(-60))
    assert beat(booting, heartbeat(99, incarnation=2), NOW) is None
    assert beat(booting, heartbeat(10), NOW) is None
    assert beat(booting, heartbeat(9), NOW) is None
    up = beat(booting, heartbeat(11, incarnation=4), NOW)
    assert up is not None
    assert (up.status, up.boot_until, up.container_id) == (Status.ONLINE, None, "7:1")


@pytest.mark.parametrize("kind", [EvidenceKind.ANSWERED, EvidenceKind.BUSY, EvidenceKind.SERVER_ERROR])
def test_any_answer_of_the_agent_itself_is_life(kind: EvidenceKind) -> None:
    """D-S22: overloaded is alive."""
    told = evidence(life(LONG_AGO), said(kind), NOW)
    assert told is not None
    assert told.heard_at == NOW


@pytest.mark.parametrize("kind", [EvidenceKind.REFUSED, EvidenceKind.RESET, EvidenceKind.TIMEOUT])
def test_a_failed_delivery_is_looked_into_at_once_and_is_no_death(kind: EvidenceKind) -> None:
    """D-S2, D-S7."""
    told = evidence(life(LONG_AGO, next_check_at=ago(-9)), said(kind), NOW)
    assert told is not None
    assert (told.heard_at, told.status, told.next_check_at) == (ago(LONG_AGO), Status.ONLINE, NOW)
    assert evidence(life(), said(kind, incarnation=2), NOW) is None


@pytest.mark.parametrize("status", [Status.WEDGED, Status.GAVE_UP])
def test_any_beat_recovers_what_was_believed_lost(status: Status) -> None:
    """A-L-07, A-L-13."""
    up = beat(life(status=status), heartbeat(5), NOW)
    assert up is not None
    assert up.status is Status.ONLINE


def test_a_proxy_whose_clock_is_ahead_makes_nobody_elses_beats_late() -> None:
    """D-S24, I7: its agent goes on by another proxy, and is heard."""
    ahead = beat(life(), heartbeat(int((NOW + timedelta(seconds=60)).timestamp() * 1e6)), NOW)
    assert ahead is not None
    later = NOW + timedelta(seconds=5)
    after = beat(ahead, heartbeat(int(later.timestamp() * 1e6)), later)
    assert after is not None
    assert after.heard_at == later


@pytest.mark.parametrize("status", [Status.OFFLINE, Status.RESTARTING, Status.GAVE_UP, Status.SUSPECT])
def test_one_that_becomes_external_is_believed_alive(status: Status) -> None:
    """A-L-18: nobody looks at it any more, so what is down would stay so, and nothing would be sent to it."""
    fact = WorkspaceRegistered(workspace_id="w1", rev=9, incarnation=3, url="http://a/")
    after = registered(life(status=status, boot_until=NOW), fact, driver=None, now=NOW, by_agent=False)
    assert after is not None
    assert (after.status, after.boot_until, after.next_check_at) == (Status.ONLINE, None, None)


def test_what_was_removed_comes_back_by_no_fact() -> None:
    """A-L-08, D-S18."""
    removed = gone(life(), "w1", 9)
    assert removed is not None
    assert beat(removed, heartbeat(99, incarnation=9), NOW) is None
    assert evidence(removed, said(EvidenceKind.ANSWERED), NOW) is None
    again = WorkspaceRegistered(workspace_id="w1", rev=10, incarnation=9, url="http://a/")
    assert registered(removed, again, driver="process", now=NOW, by_agent=True) is None
    assert judge(removed, STOPPED, NOW, CALM).verdict is Verdict.LEFT_ALONE


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["beat", "late beat", "old beat", "unknown", "running", "transition", "doubt", "old doubt", "flake"]
        ),
        st.floats(0.05, 20.0),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_no_sequence_of_errors_and_stale_facts_restarts_an_agent_that_was_heard_within_its_window(
    steps: list[tuple[str, float]],
) -> None:
    """I7, D-S19, D-S25: nothing but a driver that says twice, far enough apart, that it is gone.

    A database error is a step that is not written: the state is the one before it, as with every step left out here.
    """
    at = NOW
    now_life = life(0.0)
    rev = 100
    flakes: list[datetime] = []
    for what, gap_s in steps:
        at += timedelta(seconds=gap_s)
        rev += 1
        recent = now_life.heard_at is not None and (at - now_life.heard_at).total_seconds() <= now_life.window_s
        told: Life | None = None
        match what:
            case "beat":
                told = beat(now_life, heartbeat(rev), at)
            case "late beat":
                told = beat(now_life, heartbeat(now_life.beat_rev), at) if now_life.beat_rev else None
            case "old beat":
                told = beat(now_life, heartbeat(rev, incarnation=2), at)
                assert told is None
            case "doubt":
                told = evidence(now_life, said(EvidenceKind.RESET), at)
            case "old doubt":
                assert evidence(now_life, said(EvidenceKind.RESET, incarnation=2), at) is None
            case _:
                seen = {"unknown": UNKNOWN, "running": RUNNING, "transition": TRANSITION, "flake": STOPPED}[what]
                decision = judge(now_life, seen, at, CALM)
                if what == "running":
                    flakes.clear()
                if what == "flake":
                    flakes.append(at)
                twice = any(SPREAD_S <= (at - each).total_seconds() <= MEMORY_S for each in flakes)
                assert decision.verdict is not Verdict.DEAD or (what == "flake" and (twice or not recent))
                told = None if decision.verdict is Verdict.DEAD else decision.life
        now_life = told or now_life
