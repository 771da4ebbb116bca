"""Contracts: names, batches, what an unknown or broken fact does, and the snapshot that a change shows up in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from shared.batches import decode_batch, encode, encode_batch
from shared.facts import Fact, MessageBusy, ScheduleChanged, SessionStop, WorkspaceHeartbeat, routing_key
from shared.topology import REPLIES, ROUTES

SNAPSHOT = Path(__file__).parent / "facts.schema.json"
KINDS = sorted({route.fact for route in ROUTES} | REPLIES, key=lambda kind: kind.__name__)


def stop(**changes: Any) -> SessionStop:
    return SessionStop(
        **{"workspace_id": "w1", "rev": 1, "session_id": "s", "incarnation": 1, "reason": "r", **changes}
    )


def test_the_class_name_is_the_routing_key() -> None:
    assert routing_key(WorkspaceHeartbeat) == "workspace.heartbeat"
    assert routing_key(MessageBusy) == "message.busy"


def test_a_batch_comes_back_as_it_was() -> None:
    facts = [stop(reason="\N{SNOWMAN} \0"), stop(rev=2)]
    assert decode_batch(SessionStop, encode_batch(map(encode, facts))) == (facts, [])


def test_bytes_travel_as_they_are() -> None:
    digest, body = bytes(range(32)), b'{"a": 1e3, "b": "\\u0000\\ud800"}\xff'
    fact = MessageBusy(
        workspace_id="w", rev=1, queue_id=stop().fact_id, caller_id="c", caller_hash=digest, key_hash=digest,
        body_hash=digest, reason="backlog", method="message/send", body=body,
    )  # fmt: skip
    ((read,), _) = decode_batch(MessageBusy, encode_batch([encode(fact)]))
    assert read.body == body
    assert read.caller_hash == digest


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b'{"workspace_id":"w1","rev":1}', "session_id"),
        (encode(stop()).replace(b'"w1"', b'"w 1"'), "workspace_id"),
        (encode(stop()).replace(b'"w1"', b'"w\\ud800"'), "surrogate|hex"),
        (encode(stop()).replace(b'"rev":1', b'"rev":-1'), "rev"),
        (b"7", "object"),
    ],
)
def test_one_bad_fact_takes_no_others_along(bad: bytes, word: str) -> None:
    good = [stop(), stop()]
    facts, unreadable = decode_batch(SessionStop, encode_batch([encode(good[0]), bad, encode(good[1])]))
    assert facts == good
    assert len(unreadable) == 1
    assert json.loads(unreadable[0].raw) == json.loads(bad)
    assert any(part in unreadable[0].error for part in word.split("|"))


@pytest.mark.parametrize("strange", [b'{"n":' + b"9" * 5000 + b"}", b"[" * 5000 + b"]" * 5000, b'"a,\\"]b"', b"1e999"])
def test_no_element_however_strange_takes_the_others_along(strange: bytes) -> None:
    """A parser would stop at it; and it is kept byte for byte."""
    good = [stop(), stop(reason='a "quoted, [bracketed] } word')]
    facts, unreadable = decode_batch(SessionStop, encode_batch([encode(good[0]), strange, encode(good[1])]))
    assert facts == good
    assert [bad.raw for bad in unreadable] == [strange]


@pytest.mark.parametrize("body", [b"", b"{}", b"[", b"\xff", b"[" * 100_000, b"[1] [2]", b"[1}]"])
def test_what_is_no_batch_is_kept_whole(body: bytes) -> None:
    facts, unreadable = decode_batch(SessionStop, body)
    assert facts == []
    assert [bad.raw for bad in unreadable] == [body]


def test_unknown_fields_are_ignored() -> None:
    """A newer writer adds a field; an older reader goes on."""
    newer = encode(stop()).replace(b'"reason":', b'"invented_later":{"x":1},"reason":')
    ((read,), unreadable) = decode_batch(SessionStop, encode_batch([newer]))
    assert read.reason == "r"
    assert not unreadable


def test_a_fact_id_carries_its_time() -> None:
    with pytest.raises(ValidationError, match="uuid7"):
        stop(fact_id=uuid4())


def test_a_fact_from_the_far_future_is_refused() -> None:
    """Its part of the inbox would never be forgotten, and the last of all has no end."""
    with pytest.raises(ValidationError, match="future"):
        stop(fact_id="ffffffff-ffff-7fff-bfff-ffffffffffff")


def test_facts_are_made_in_order() -> None:
    ids = [stop().fact_id for _ in range(1000)]
    assert ids == sorted(ids)


def test_a_time_without_zone_is_refused() -> None:
    raw = encode(stop(occurred_at="2026-01-01T00:00:00Z")).replace(b"2026-01-01T00:00:00Z", b"2026-01-01T00:00:00")
    facts, unreadable = decode_batch(SessionStop, encode_batch([raw]))
    assert not facts
    assert "timezone" in unreadable[0].error


def test_a_lone_surrogate_is_refused_by_the_writer() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        encode(ScheduleChanged.model_construct(workspace_id="w", rev=1, schedule_id=stop().fact_id, prompt="\ud800"))


def schemas() -> dict[str, Any]:
    """What readers and writers must agree on; the words about it may change."""
    return {kind.__name__: _without_words(kind.model_json_schema()) for kind in KINDS}


def _without_words(schema: Any) -> Any:
    match schema:
        case dict():
            words = {"description", "title"} if isinstance(schema.get("title", ""), str) else set()
            return {name: _without_words(value) for name, value in schema.items() if name not in words}
        case list():
            return [_without_words(value) for value in schema]
        case _:
            return schema


def test_the_contracts_are_those_of_the_snapshot() -> None:
    """A change of a contract shows in review. BIDE_TEST_SNAPSHOT=write writes it anew."""
    if os.environ.get("BIDE_TEST_SNAPSHOT") == "write":
        SNAPSHOT.write_text(json.dumps(schemas(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert schemas() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_fact_says_when_of_whom_and_which_rev() -> None:
    for kind in KINDS:
        assert issubclass(kind, Fact)
        assert {"fact_id", "occurred_at", "workspace_id", "rev"} <= set(kind.model_fields)
