"""Live forwards to a life that is over, and what a replica remembers of who died."""

from __future__ import annotations

from typing import Any

import pytest

from services.proxy.copies.registry import Registry
from services.proxy.decide import Workspace, is_outlived, said_s
from shared.facts import WorkspaceStatus

HOME = Workspace("w", "ops", "http://agent.example/", b"t" * 32, 3, 1)
DEAD = {"life": 3, "incarnation": 3, "dead_incarnation": 3, "dead_age_s": 30.0, "grace_s": 30.0}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param({"dead_age_s": 29.9}, False, id="within the grace"),
        pytest.param({}, True, id="the grace is over"),
        pytest.param({"dead_age_s": 30.1}, True, id="for longer"),
        pytest.param({"dead_age_s": 0.0, "incarnation": 4}, True, id="another life is heard"),
        pytest.param({"life": 4, "incarnation": 4}, False, id="it went to the next life"),
        pytest.param({"life": 2}, True, id="it went to the one before"),
    ],
)
def test_when_a_live_forward_is_let_go(facts: dict[str, Any], expected: bool) -> None:
    """A-Q-18."""
    assert is_outlived(**{**DEAD, **facts}) is expected


def heard(*words: tuple[int, int, Any]) -> Registry:
    registry = Registry()
    registry.put(HOME)
    for rev, incarnation, status in words:
        registry.hear_status(
            WorkspaceStatus(workspace_id="w", rev=rev, incarnation=incarnation, status=status, reason="")
        )
    return registry


@pytest.mark.parametrize(
    ("words", "dead"),
    [
        pytest.param([(1, 3, "offline")], 3, id="offline"),
        pytest.param([(1, 3, "offline"), (2, 3, "online")], None, id="A-L-07: it was alive after all"),
        pytest.param([(1, 3, "offline"), (2, 4, "online")], 3, id="another lives"),
        pytest.param([(1, 3, "offline"), (2, 3, "paused")], 3, id="paused brings nobody back"),
        pytest.param([(2, 3, "online"), (1, 3, "offline")], None, id="D-S25: an older word comes late"),
        pytest.param([(1, 3, "gave_up"), (2, 2, "offline")], 3, id="D-S25: a later word about an older life"),
    ],
)
def test_which_life_is_over(words: list[tuple[int, int, Any]], dead: int | None) -> None:
    death = heard(*words).deaths.get("w")
    assert (death.incarnation if death else None) == dead


def test_a_death_is_as_old_as_its_first_word() -> None:
    registry = heard((1, 3, "offline"))
    first = registry.deaths["w"]
    registry.hear_status(WorkspaceStatus(workspace_id="w", rev=2, incarnation=3, status="restarting", reason=""))
    assert registry.deaths["w"] is first


def test_a_word_about_the_life_before_holds_nothing() -> None:
    """A-P-14, D-S25: the copy of it may be older than the registration of the next."""
    assert heard((1, 2, "gave_up")).status(HOME) is None
    said = heard((1, 3, "gave_up")).status(HOME)
    assert said is not None
    assert said.status == "gave_up"


def test_a_workspace_s_own_grace_wins() -> None:
    own = Workspace("w", "ops", "http://agent.example/", b"t" * 32, 3, 1, settings={"stop_grace_s": 0})
    assert (said_s(own, "stop_grace_s", 30.0), said_s(HOME, "stop_grace_s", 30.0)) == (0.0, 30.0)
