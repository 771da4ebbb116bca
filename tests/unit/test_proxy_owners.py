"""Whose an agent's Tasks are: what is remembered, what is written behind, and what an answer tells of it."""

from __future__ import annotations

import json

import pytest

from services.proxy.copies import owners as room
from services.proxy.copies.owners import Owners, task_hash
from services.proxy.forward.watching import FirstTask
from shared.a2a import parse

A, B = b"a" * 32, b"b" * 32


def test_a_task_is_told_once_and_wakes_its_writer_once() -> None:
    owners, woken = Owners(), list[None]()
    owners.wake = lambda: woken.append(None)
    for _ in range(3):
        owners.tell("w", "t", A)
    owners.tell("w", "t", B)
    assert len(woken) == 1
    taken = owners.take_unwritten(10)
    assert taken == [(task_hash("w", "t"), A), (task_hash("w", "t"), B)]
    assert owners.of(task_hash("w", "t")) == {A, B}
    assert not owners.of(task_hash("other", "t")), "an id is its workspace's"
    owners.tell("w", "t", A)
    assert not owners.unwritten, "what was taken is not told again"


def test_what_could_not_be_written_is_written_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And while Postgres is away it is bounded: the oldest is forgotten, and counted."""
    monkeypatch.setattr(room, "_UNWRITTEN_MAX", 2)
    owners = Owners()
    owners.tell("w", "1", A)
    taken = owners.take_unwritten(1)
    owners.tell("w", "2", A)
    owners.put_back(taken)
    assert owners.take_unwritten(9) == [(task_hash("w", "1"), A), (task_hash("w", "2"), A)]
    for number in range(3, 6):
        owners.tell("w", str(number), A)
    assert (owners.dropped, owners.unwritten) == (1, 2)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_REMEMBERED_MAX", 2)
    owners = Owners()
    for number in range(3):
        owners.learn((task_hash("w", str(number)), A))
    assert [bool(owners.of(task_hash("w", str(number)))) for number in range(3)] == [False, True, True]


EVENT = b'data: {"jsonrpc":"2.0","id":1,"result":{"kind":"status-update","taskId":"t","status":{"state":"working"}}}'


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_first_event_that_names_a_task_tells_it_however_it_is_cut(line_end: bytes, size: int) -> None:
    told: list[str] = []
    first = FirstTask(told.append)
    stream = (b": comment\n\n" + EVENT + b"\n\n" + EVENT.replace(b'"t"', b'"later"') + b"\n\n").replace(b"\n", line_end)
    for at in range(0, len(stream), size):
        first.add(stream[at : at + size])
    assert told == ["t"]


NAMED = [
    ("tasks/get", {"id": "t"}, {"t"}),
    ("message/send", {"message": {"taskId": "t", "referenceTaskIds": ["u", None, "v"]}}, {"t", "u", "v"}),
    ("SendMessage", {"message": {"task_id": "t", "reference_task_ids": ["u"]}}, {"t", "u"}),
    ("tasks/pushNotificationConfig/set", {"taskId": "t", "pushNotificationConfig": {"id": "c"}}, {"t"}),
    ("GetTaskPushNotificationConfig", {"taskId": "t", "id": "c"}, {"t", "c"}),
    ("GetTaskPushNotificationConfig", {"name": "tasks/t/pushNotificationConfigs/c"}, {"t"}),
    ("ListTaskPushNotificationConfigs", {"parent": "tasks/t"}, {"t"}),
    ("ListTasks", {"contextId": "x"}, set()),
]


@pytest.mark.parametrize(("method", "params", "expected"), NAMED)
def test_every_way_to_name_a_task_is_seen(method: str, params: dict[str, object], expected: set[str]) -> None:
    assert parse(json.dumps({"method": method, "params": params}).encode()).task_ids == expected


@pytest.mark.parametrize(
    "params",
    [b'{"id":"t","id":"own"}', b'{"taskId":"t","task_id":"own"}', b'{"id":"t"},"params":{"id":"own"}'],
)
def test_a_key_that_stands_twice_hides_nothing(params: bytes) -> None:
    """Readers differ in which of them they take."""
    assert parse(b'{"method":"tasks/get","params":' + params + b"}").task_ids == {"t", "own"}
