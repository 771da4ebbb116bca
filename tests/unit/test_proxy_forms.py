"""What may stand in the body of a verb."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.proxy.api.forms import CancelMany, Patch, Why
from services.proxy.api.wire import Refused, validated
from services.proxy.api.workspaces import noted
from shared.facts import Priority

NOTES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b" \n", None),
    (b"{}", None),
    (b'{"note": null}', None),
    (b'{"note": ""}', None),
    (b'{"note": "deploy"}', "deploy"),
    (b'{"note": "a\\u0000b"}', "a\\u0000b"),
]


@pytest.mark.parametrize(("body", "note"), NOTES)
def test_a_note_may_be_left_out_and_can_always_be_stored(body: bytes, note: str | None) -> None:
    assert noted(body) == note


REFUSED: list[tuple[Any, int]] = [
    ("no json", 400),
    ([], 422),
    ({"note": 5}, 422),
    ({"note": "x" * 1001}, 422),
    ({"notes": "x"}, 422),
]


@pytest.mark.parametrize(("body", "status"), REFUSED, ids=str)
def test_a_body_that_is_no_note_is_refused(body: Any, status: int) -> None:
    with pytest.raises(Refused) as caught:
        noted(body.encode() if isinstance(body, str) else json.dumps(body).encode())
    assert caught.value.refuse.status == status


def test_a_filter_says_what_is_named_and_no_more() -> None:
    assert validated(CancelMany, b"{}") == CancelMany()
    said = {"priority": "INFO", "caller": "lead", "older_than_s": 60, "count_only": True, "note": "stale"}
    form = validated(CancelMany, json.dumps(said).encode())
    assert form == CancelMany(priority=Priority.INFO, caller="lead", older_than_s=60, count_only=True, note="stale")


BAD: list[dict[str, Any]] = [
    {"priority": "info"},
    {"older_than_s": -1},
    {"older_than_s": "60"},
    {"older_than_s": True},
    {"caller": ""},
    {"count_only": "yes"},
    {"older_then_s": 60},
]


@pytest.mark.parametrize("body", BAD, ids=str)
def test_a_filter_that_was_not_meant_so_cancels_nothing(body: dict[str, Any]) -> None:
    """A misspelt filter that was ignored would cancel everything."""
    with pytest.raises(Refused) as caught:
        validated(CancelMany, json.dumps(body).encode())
    assert (caught.value.refuse.status, caught.value.refuse.code) == (422, "bad_value")


SETTINGS: list[tuple[str, Any, Any]] = [
    ("session_ceiling_s", 0, -1),
    ("session_min_s", 0, "600"),
    ("checkpoint_grace_s", 120, 86_401),
    ("stop_grace_s", 30.5, -0.1),
    ("tick_preempt_after_s", 900, True),
    ("tick_preempts", "all", "some"),
    ("critical_preempt_after_s", 60, -1),
]


@pytest.mark.parametrize(("name", "good", "bad"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_how_sessions_end_is_a_setting_of_each_workspace(name: str, good: Any, bad: Any) -> None:
    assert getattr(validated(Patch, json.dumps({name: good}).encode()), name) == good
    assert getattr(validated(Patch, json.dumps({name: None}).encode()), name) is None
    with pytest.raises(Refused) as caught:
        validated(Patch, json.dumps({name: bad}).encode())
    assert caught.value.refuse.code == "bad_value"


def test_a_reason_is_given_as_such() -> None:
    assert validated(Why, b'{"reason": "deploy"}').reason == "deploy"
    with pytest.raises(Refused):
        validated(Why, b'{"note": "deploy"}')
