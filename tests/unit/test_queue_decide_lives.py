"""Which life of an agent is over, and what becomes of a delivery to one that is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.queue.decide import (
    Closed,
    Waiting,
    Workspace,
    begin_life,
    closed,
    hear_beat,
    hear_status,
    is_outlived,
    why,
)

NOW = 1_000_000.0
LIVING = Workspace("w", url="http://agent.example", incarnation=3, waiting=1)


def heard(*words: tuple[int, int, str], workspace: Workspace = LIVING) -> Workspace:
    """After these words of liveness: (rev, incarnation, status), a second apart."""
    for number, (rev, incarnation, status) in enumerate(words):
        workspace = hear_status(workspace, rev=rev, incarnation=incarnation, status=status, now=NOW + number)
    return workspace


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param([(1, 3, "offline")], Closed.OFFLINE, id="dead"),
        pytest.param([(1, 3, "restarting")], Closed.OFFLINE, id="started and not heard yet"),
        pytest.param([(1, 3, "gave_up")], Closed.OFFLINE, id="given up"),
        pytest.param([(1, 4, "offline")], Closed.OFFLINE, id="of a life that nobody else has told of"),
        pytest.param([(1, 3, "suspect")], None, id="suspect"),
        pytest.param([(1, 3, "wedged")], None, id="wedged"),
        pytest.param([(1, 3, "busy")], None, id="busy"),
        pytest.param([(1, 3, "paused")], None, id="paused is the registry's to say"),
        pytest.param([(1, 2, "offline")], None, id="D-S25: of the life before"),
        pytest.param([(1, 3, "offline"), (2, 3, "online")], None, id="A-L-07: it was alive after all"),
        pytest.param([(1, 3, "offline"), (2, 4, "online")], None, id="the next one lives"),
        pytest.param([(2, 3, "online"), (1, 3, "offline")], None, id="D-S25: an older word comes late"),
        pytest.param([(2, 3, "offline"), (1, 3, "online")], Closed.OFFLINE, id="D-S25: the other way round"),
        pytest.param([(1, 3, "offline"), (2, 3, "paused")], Closed.OFFLINE, id="paused brings nobody back"),
        pytest.param([(1, 4, "online"), (2, 3, "offline")], None, id="D-S25: a later word about an older life"),
    ],
)
def test_whether_anything_is_delivered(words: list[tuple[int, int, str]], expected: Closed | None) -> None:
    """A-P-14."""
    assert closed(heard(*words), NOW) is expected


def test_a_new_life_opens_whoever_tells_of_it() -> None:
    """A-L-07: a registration or a beat of another process is proof enough."""
    dead = heard((1, 3, "gave_up"))
    beat: dict[str, Any] = {"rev": 9, "at": NOW + 5, "active": 0, "cadence_s": 30.0, "maximum": None, "now": NOW}
    assert closed(hear_beat(dead, incarnation=3, **beat), NOW) is Closed.OFFLINE, "D-S25: of the old one"
    assert closed(hear_beat(dead, incarnation=4, **beat), NOW) is None
    assert closed(begin_life(dead, 4, NOW + 5), NOW) is None
    assert begin_life(dead, 3, NOW + 5) is dead


def test_a_new_life_begins_with_nothing_of_the_old_one() -> None:
    old = replace(LIVING, beat_rev=5, beat_at=NOW, beat_active=1, not_before=NOW + 60, busy_streak=4)
    for new in (begin_life(old, 4, NOW), heard((1, 4, "online"), workspace=old)):
        assert (new.incarnation, new.beat_rev, new.beat_at, new.beat_active) == (4, 0, None, 0)
        assert (new.not_before, new.busy_streak, new.life_at) == (None, 0, NOW)


def test_a_death_is_as_old_as_its_first_word() -> None:
    assert heard((1, 3, "offline"), (2, 3, "restarting"), (3, 3, "gave_up")).dead_at == NOW
    assert heard((1, 3, "offline"), (2, 3, "online"), (3, 3, "offline")).dead_at == NOW + 2
    again = heard((1, 3, "offline"), (2, 4, "online"), (3, 4, "offline"))
    assert (again.dead_incarnation, again.dead_at) == (4, NOW + 2)
    kept = heard((1, 3, "offline"), (2, 4, "online"))
    assert (kept.dead_incarnation, kept.dead_at) == (3, NOW), "the life that died stays dead"


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("offline", "next in line: its agent is dead and is being started again"),
        ("restarting", "next in line: its agent has been started again and has not been heard yet"),
        ("gave_up", "next in line: its agent has died too often: an operator must look"),
    ],
)
def test_what_waits_for_the_next_life_says_so(status: str, sentence: str) -> None:
    """A-P-14."""
    said, fields = why(heard((1, 3, status)), Waiting(position=1), NOW)
    assert (said, fields["reason"]) == (sentence, "offline")


ALIVE: dict[str, Any] = {
    "life": 3, "incarnation": 3, "dead_incarnation": 0, "dead_age_s": None, "led_s": None, "grace_s": 30.0,
    "is_followed": False,
}  # fmt: skip
DEAD = {"dead_incarnation": 3, "dead_age_s": 30.0}
REPLACED = {"incarnation": 4, "led_s": 10.0}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param({}, False, id="alive"),
        pytest.param(DEAD | {"dead_age_s": 29.9}, False, id="dead, and within the grace"),
        pytest.param(DEAD, True, id="dead, and the grace is over"),
        pytest.param(DEAD | {"dead_age_s": 30.1}, True, id="dead for longer"),
        pytest.param(DEAD | {"is_followed": True}, True, id="nobody can be asked for its task"),
        pytest.param(DEAD | {"dead_incarnation": 2}, False, id="the life before it is dead"),
        pytest.param(DEAD | {"dead_incarnation": 4, "incarnation": 4}, True, id="and so is the one after it"),
        pytest.param(
            DEAD | {"dead_age_s": 1.0, "incarnation": 4, "led_s": 0.0}, True, id="dead, and replaced: at once"
        ),
        pytest.param(REPLACED, True, id="replaced, and nobody said that it was dead"),
        pytest.param(REPLACED | {"led_s": 9.9}, False, id="it may have met the new life before that was heard"),
        pytest.param(REPLACED | {"led_s": 10.1}, True, id="it cannot have"),
        pytest.param(REPLACED | {"led_s": None}, False, id="nobody knows when the new one was heard"),
        pytest.param(REPLACED | {"is_followed": True}, False, id="the new life is asked for the task"),
        pytest.param(DEAD | REPLACED | {"is_followed": True}, False, id="also where the old one was declared dead"),
    ],
)
def test_when_an_owner_hangs_up_on_a_life_that_is_over(facts: dict[str, Any], expected: bool) -> None:
    """A-Q-18, C-K13."""
    assert is_outlived(**{**ALIVE, **facts}) is expected
