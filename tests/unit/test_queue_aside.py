"""What can still be read of a message that cannot: its id, its workspace, its caller; never what a caller pretends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from services.queue.aside import Remains, read_remains
from shared.batches import encode
from shared.facts import MessageBusy, ProxyBeat

QUEUE_ID = uuid7()


def busy(**changes: Any) -> MessageBusy:
    values: dict[str, Any] = {
        "workspace_id": "w", "rev": 1, "queue_id": QUEUE_ID, "caller_id": "c", "caller_hash": b"\xfb" * 32,
        "key_hash": b"\xff" * 32, "body_hash": b"\x03" * 32, "reason": "backlog", "method": "message/send",
        "body": b"x", "beat": ProxyBeat(workspace_id="other", rev=1, proxy_id="p"), **changes,
    }  # fmt: skip
    return MessageBusy(**values)


READABLE = Remains(QUEUE_ID, "w", "c", b"\xfb" * 32, b"\xff" * 32, b"\x03" * 32)


@pytest.mark.parametrize(
    "harm",
    [
        lambda raw: raw,
        lambda raw: raw.replace(b'"TASK"', b'"URGENT"'),
        lambda raw: raw.replace(b'"message/send"', b'"\\ud800"'),
        lambda raw: raw.replace(b'"message/send"', b'"\xff\xfe"'),
        lambda raw: raw.replace(b'"hops":0', b'"hops":' + b"[" * 100_000),
        lambda raw: raw.replace(b'"hops":0', b'"hops":' + b"9" * 10_000),
        lambda raw: raw.replace(b'":', b'" : '),
        lambda raw: raw[: raw.index(b'"reason"')],
    ],
    ids=["nothing", "another enum", "lone surrogate", "no utf-8", "deep", "long number", "spaces", "cut"],
)
def test_whatever_is_wrong_elsewhere_takes_no_id_along(harm: Any) -> None:
    """B-14."""
    assert read_remains(harm(encode(busy()))) == READABLE


@pytest.mark.parametrize(
    "raw",
    [
        b'{"workspace_id":"w","rev":1}',
        b'{"queue_id":"no id","workspace_id":"w"}',
        f'{{"queue_id":"{QUEUE_ID}","workspace_id":"a b"}}'.encode(),
        f'[{{"queue_id":"{QUEUE_ID}","workspace_id":"w"}}'.encode(),
        b"\xff",
    ],
    ids=["no queue_id", "no uuid", "no workspace", "a broken batch", "noise"],
)
def test_nothing_is_owed_without_an_id_and_a_workspace(raw: bytes) -> None:
    assert read_remains(raw) is None


def test_what_a_caller_writes_is_not_taken_for_a_member() -> None:
    pretended = f'","queue_id":"{uuid7()}","workspace_id":"stolen","x":"'
    raw = b'{"caller_id":' + json.dumps(pretended).encode() + b"," + encode(busy())[1:]
    found = read_remains(raw)
    assert found is not None
    assert (found.queue_id, found.workspace_id) == (QUEUE_ID, "w")


@pytest.mark.parametrize(
    ("caller_id", "shown"), [("a\0b", "a\\0b"), ("é", "é"), ('q"u', 'q"u'), ("x" * 300, "x" * 256)]
)
def test_a_caller_is_shown_as_a_column_can_hold_it(caller_id: str, shown: str) -> None:
    found = read_remains(encode(busy(caller_id=caller_id)))
    assert found is not None
    assert found.caller_id == shown
