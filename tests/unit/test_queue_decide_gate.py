"""The policies of a session's end in the queue: the gate and who has seen it, what is named, what a stop ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any, get_args

import pytest

from services.queue.decide import (
    Closed,
    Ending,
    Finish,
    Forwards,
    Gate,
    Reply,
    Waiting,
    Workspace,
    closed,
    closed_until,
    fate,
    foreign,
    gate_until,
    hear_beat,
    hear_gate,
    in_gate,
    is_abandoned,
    is_being_let_go,
    is_engaged,
    is_named,
    living,
    outcome,
    spare,
    why,
)
from shared.facts import ItemStatus

NOW = 1000.0
OPEN = Workspace("w", url="http://a", waiting=1)
SHUT = replace(OPEN, gates={"s": Gate(5, NOW + 120)}, gate_generation=3)
TWO = replace(SHUT, gates={**SHUT.gates, "t": Gate(1, NOW + 60)})


@pytest.mark.parametrize(
    ("before", "word", "until", "generation"),
    [
        pytest.param(OPEN, ("s", 1, True, 120), 120, 1, id="the first session closes it"),
        pytest.param(OPEN, ("s", 1, True, 0), None, 0, id="a word that comes when its time is over closes nothing"),
        pytest.param(SHUT, ("s", 6, True, 125), 125, 3, id="renewed: the same closing"),
        pytest.param(SHUT, ("s", 6, True, 30), 120, 3, id="renewed for less: its moment only grows"),
        pytest.param(SHUT, ("s", 4, True, 200), 120, 3, id="an older word changes nothing"),
        pytest.param(SHUT, ("s", 4, False, 0), 120, 3, id="an older word that it has left neither"),
        pytest.param(SHUT, ("s", 5, True, 120), 120, 3, id="said twice"),
        pytest.param(SHUT, ("s", 6, False, 120), None, 3, id="the last one leaves"),
        pytest.param(SHUT, ("s", 5, False, 120), None, 3, id="it leaves with the rev of its last renewal"),
        pytest.param(SHUT, ("t", 1, True, 180), 180, 3, id="a second session: the same closing"),
        pytest.param(SHUT, ("t", 1, False, 180), 120, 3, id="one leaves that was never in it"),
        pytest.param(TWO, ("s", 6, False, 120), 60, 3, id="one of two leaves"),
    ],
)
def test_a_word_about_the_gate(
    before: Workspace, word: tuple[str, int, bool, float], until: float | None, generation: int
) -> None:
    session_id, rev, is_closed, until_s = word
    after = hear_gate(before, session_id, rev=rev, closed=is_closed, until=NOW + until_s, now=NOW)
    assert gate_until(after, NOW) == (NOW + until if until is not None else None)
    assert after.gate_generation == generation
    assert (after.rev > before.rev) == (after != before), "whoever is told applies a higher rev only"


def test_a_gate_opens_by_itself_and_its_next_closing_is_a_new_one() -> None:
    """Just before, at and after the moment until which it is closed."""
    moments = (NOW + 119.9, NOW + 120, NOW + 120.1)
    assert [closed(SHUT, moment) for moment in moments] == [Closed.GATE, None, None]
    assert [spare(SHUT, moment) for moment in moments] == [0, 1, 1]
    again = hear_gate(SHUT, "s", rev=6, closed=True, until=NOW + 240, now=NOW + 120)
    assert (gate_until(again, NOW + 120), again.gate_generation) == (NOW + 240, 4)
    in_time = hear_gate(SHUT, "s", rev=6, closed=True, until=NOW + 240, now=NOW + 119.9)
    assert in_time.gate_generation == 3


def test_while_it_is_closed_its_moment_only_grows() -> None:
    """I6: what was told of it licenses a kill, whoever leaves meanwhile and however unevenly it is renewed."""
    shut = hear_gate(SHUT, "t", rev=1, closed=True, until=NOW + 60, now=NOW)
    assert gate_until(shut, NOW) == NOW + 120
    assert in_gate(shut, NOW + 119) == ["s", "t"], "none lapses before the others"
    left = hear_gate(shut, "s", rev=6, closed=False, until=NOW + 100, now=NOW + 100)
    assert gate_until(left, NOW + 100) == NOW + 120
    assert gate_until(hear_gate(left, "t", rev=2, closed=False, until=NOW, now=NOW + 110), NOW + 110) is None
    assert gate_until(left, NOW + 120) is None


def test_the_order_of_words_does_not_matter() -> None:
    words = [("s", 1, True), ("s", 2, True), ("s", 3, False), ("t", 1, True), ("t", 2, False)]
    for order in permutations(words):
        workspace = OPEN
        for session_id, rev, is_closed in order:
            workspace = hear_gate(workspace, session_id, rev=rev, closed=is_closed, until=NOW + 100 + rev, now=NOW)
        assert in_gate(workspace, NOW) == [], order


def test_that_a_session_has_left_outlasts_what_is_on_its_way_and_is_forgotten() -> None:
    left = hear_gate(SHUT, "s", rev=6, closed=False, until=NOW + 120, now=NOW)
    late = hear_gate(left, "s", rev=5, closed=True, until=NOW + 500, now=NOW + 300)
    assert gate_until(late, NOW + 300) is None
    assert not is_engaged(left)
    beaten = hear_beat(left, rev=1, at=NOW, active=0, cadence_s=30, incarnation=1, maximum=None, now=NOW + 3600)
    assert beaten.gates == {}


def test_a_beat_by_a_clock_that_is_ahead_opens_no_gate() -> None:
    beaten = hear_beat(SHUT, rev=1, at=NOW + 3600, active=0, cadence_s=30, incarnation=1, maximum=None, now=NOW)
    assert closed(beaten, NOW) is Closed.GATE


def test_a_new_life_opens_no_gate() -> None:
    beaten = hear_beat(SHUT, rev=1, at=NOW, active=0, cadence_s=30, incarnation=9, maximum=None, now=NOW)
    assert closed(beaten, NOW) is Closed.GATE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"removed": True}, Closed.REMOVED),
        ({"paused": True}, Closed.PAUSED),
        ({"url": None}, Closed.NO_URL),
        ({"not_before": NOW + 5}, Closed.GATE),
    ],
)
def test_what_closes_a_workspace_besides(changes: dict[str, object], expected: Closed) -> None:
    assert closed(replace(SHUT, **changes), NOW) is expected  # type: ignore[arg-type]


def test_why_it_waits_at_a_gate() -> None:
    said, fields = why(SHUT, Waiting(position=1), NOW)
    assert said == ("next in line: its session is being ended: nothing begins before it is over, or for another 2 m")
    assert fields["reason"] == "gate"


# ── who has seen it ──────────────────────────────────────────────────────────────────────────────────────────────────


def told(generation: int = 3, until_s: float | None = 115, age_s: float = 1) -> Forwards:
    until = NOW + until_s if until_s is not None else None
    return Forwards(rev=1, at=NOW - age_s, generation=generation, gate_until=until)


@pytest.mark.parametrize(
    ("forwards", "proxies", "until"),
    [
        pytest.param({"p": told()}, "p", 115, id="the one there is"),
        pytest.param({"p": told(until_s=200)}, "p", 120, id="no longer than the queue says"),
        pytest.param({"p": told(), "q": told(until_s=90)}, "pq", 90, id="as long as the first to open"),
        pytest.param({"p": told()}, "pq", None, id="another has said nothing"),
        pytest.param({"p": told(), "q": told(2)}, "pq", None, id="another speaks of an older closing"),
        pytest.param({"p": told(), "q": told(until_s=None)}, "pq", None, id="another knows of no closed gate"),
        pytest.param({"p": told(until_s=0)}, "p", None, id="its own time is over"),
        pytest.param({"p": told(), "q": told(2)}, "p", 115, id="who does not live is not waited for"),
        pytest.param({"p": told(age_s=50)}, "p", 115, id="what it said holds however long ago"),
        pytest.param({}, "", None, id="no proxy is known: nobody can say"),
    ],
)
def test_a_gate_is_closed_when_each_living_proxy_has_seen_it(
    forwards: dict[str, Forwards], proxies: str, until: float | None
) -> None:
    workspace = replace(SHUT, forwards=forwards)
    assert closed_until(workspace, set(proxies), NOW) == (NOW + until if until is not None else None)
    assert closed_until(replace(workspace, gates={}), set(proxies), NOW) is None


def test_who_speaks_of_the_workspace_lives() -> None:
    workspace = replace(SHUT, forwards={"p": told(age_s=59.9), "q": told(age_s=60)})
    assert living(workspace, {"r"}, 60, NOW) == {"p", "r"}


# ── what a snapshot names ────────────────────────────────────────────────────────────────────────────────────────────

IDLE = Workspace("w", url="http://a", beat_at=NOW, max_concurrent=4)
ONE = Forwards(rev=1, at=NOW, running=(("f", "", NOW - 5),))


@pytest.mark.parametrize(
    ("workspace", "extra", "named", "engaged"),
    [
        pytest.param(IDLE, 0, False, False, id="nothing"),
        pytest.param(replace(IDLE, beat_active=2), 2, True, True, id="the agent does something else"),
        pytest.param(replace(IDLE, beat_active=2, running=1), 1, True, True, id="one of them is ours"),
        pytest.param(replace(IDLE, beat_active=1, forwards={"p": ONE}), 0, True, True, id="it is a live forward"),
        pytest.param(replace(IDLE, forwards={"p": ONE}), 0, True, True, id="a live forward that no beat shows"),
        pytest.param(
            replace(IDLE, forwards={"p": replace(ONE, at=NOW - 15)}), 0, False, True, id="its proxy is silent"
        ),
        pytest.param(replace(IDLE, beat_active=1, ended_since=1), 0, False, True, id="what the beat shows has ended"),
        pytest.param(replace(IDLE, beat_active=1, beat_at=NOW - 66), 0, False, True, id="the beat is no beat any more"),
        pytest.param(replace(IDLE, gates=SHUT.gates), 0, True, True, id="its gate is closed"),
        pytest.param(replace(IDLE, gates={"s": Gate(1, NOW)}), 0, False, True, id="its gate has opened by itself"),
        pytest.param(replace(IDLE, waiting=1), 0, True, False, id="something waits"),
    ],
)
def test_what_is_named(workspace: Workspace, extra: int, named: bool, engaged: bool) -> None:
    assert (foreign(workspace, NOW), is_named(workspace, NOW)) == (extra, named)
    assert is_engaged(workspace) == engaged


# ── a stop ───────────────────────────────────────────────────────────────────────────────────────────────────────────

REAL = {"delivered", "answer_too_large"}


@pytest.mark.parametrize("reply", get_args(Reply))
@pytest.mark.parametrize(
    ("reason", "ends"),
    [("ceiling", (ItemStatus.FAILED, "ceiling")), ("operator", (ItemStatus.CANCELED, "stopped"))],
)
def test_what_was_told_to_stop_ends_whatever_comes(
    reply: Reply, reason: str, ends: tuple[ItemStatus, str]
) -> None:  # fmt: skip
    """It never goes back; only a real answer completes it as it would."""
    usual = fate(reply, attempts=4, deaths=2, at_most_once=False, cancel_requested=True)
    stopped = fate(reply, attempts=4, deaths=2, at_most_once=False, cancel_requested=True, stopped_for=reason)
    assert isinstance(stopped, Finish)
    if reply in REAL:
        assert stopped == usual
    elif reply == "abandoned" and reason == "ceiling":
        assert (stopped.status, stopped.reason) == (ItemStatus.FAILED, "abandoned")
    else:
        assert (stopped.status, stopped.reason) == ends
        assert stopped.ending == usual.ending, "whose slot is taken does not change"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (None, (ItemStatus.COMPLETED, None)),
        ("ceiling", (ItemStatus.FAILED, "ceiling")),
        ("operator", (ItemStatus.CANCELED, "stopped")),
    ],
)
def test_a_task_that_was_canceled_is_no_answer_after_our_stop(
    reason: str | None, expected: tuple[ItemStatus, str | None]
) -> None:
    decided = fate(
        "delivered", attempts=0, deaths=0, at_most_once=False, cancel_requested=False, stopped_for=reason,
        task_canceled=True,
    )  # fmt: skip
    assert isinstance(decided, Finish)
    assert (decided.status, decided.reason, decided.ending) == (*expected, Ending.ANSWERED)


def test_what_a_stop_is_for_a_fire() -> None:
    assert outcome(ItemStatus.FAILED, "ceiling") == ("ceiling", None)
    assert outcome(ItemStatus.CANCELED, "stopped") == ("canceled", "stopped")
    assert outcome(ItemStatus.FAILED, "abandoned") == ("failed", "abandoned")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"beat_age_s": 9.9}, True, id="a beat after the grace shows nothing"),
        pytest.param({"beat_age_s": 10.0}, True, id="just at its end"),
        pytest.param({"beat_age_s": 10.1}, False, id="just before"),
        pytest.param({"beat_age_s": None}, False, id="no beat of this life"),
        pytest.param({"active": 1}, False, id="it shows something"),
        pytest.param({"ever_active": False}, False, id="an agent that always says 0"),
        pytest.param({"silent_s": 39.9}, False, id="a byte has come since the stop"),
    ],
)
def test_a_stopped_delivery_is_abandoned(changes: dict[str, object], expected: bool) -> None:
    facts: dict[str, object] = {
        "stop_age_s": 40.0, "beat_age_s": 5.0, "silent_s": 40.0, "active": 0, "ever_active": True, "grace_s": 30.0,
    }  # fmt: skip
    assert is_abandoned(**{**facts, **changes}) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "since_s", "expected"),
    [
        pytest.param({}, 0.0, True, id="the beats show nothing when it is told"),
        pytest.param({}, 62.999, True, id="a grace, a cadence and the owner's look later, almost"),
        pytest.param({}, 63.0, False, id="at it: bytes have come, or he would have"),
        pytest.param({}, 63.001, False, id="after it"),
        pytest.param({"beat_active": 1}, 0.0, False, id="the beats show it"),
        pytest.param({"ever_active": False}, 0.0, False, id="they always show nothing"),
        pytest.param({"beat_at": None}, 0.0, False, id="there are none"),
    ],
)
def test_what_its_owner_is_about_to_let_go(changes: dict[str, Any], since_s: float, expected: bool) -> None:
    plain = replace(OPEN, beat_at=NOW, beat_active=0, ever_active=True, beat_cadence_s=30.0, stop_grace_s=30.0)
    assert is_being_let_go(replace(plain, **changes), NOW, NOW + since_s) is expected
    assert not is_being_let_go(plain, None, NOW), "nobody told it to stop"
