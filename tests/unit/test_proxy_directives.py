"""What is asked of agents: told until acknowledged or past, to this life alone; one stop or the newest checkpoint."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.proxy.control import cancel_body, control_url
from services.proxy.copies import Calls, Copies, Directives
from services.proxy.copies.directives import shape, taken
from services.proxy.handlers import Handlers
from shared.facts import Acknowledged, DirectiveKind, SessionDirective, WorkspaceHeartbeat

T0 = 1_700_000_000.0


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(T0 + seconds, UTC)


def directive(reason: str = "ceiling", kind: str = "checkpoint", **more: Any) -> SessionDirective:
    values: dict[str, Any] = {
        "workspace_id": "w", "rev": 1, "directive_id": uuid7(), "session_id": "s", "incarnation": 1,
        "kind": kind, "reason": reason, "deadline": None,
    }  # fmt: skip
    return SessionDirective(**{**values, **more})


def told(directives: Directives, seconds: float, incarnation: int = 1) -> list[str]:
    return [f"{each.kind.value} {each.reason}" for each in directives.of("w", incarnation, T0 + seconds)]


@pytest.mark.parametrize(("seconds", "is_told"), [(29.9, True), (30.0, False), (30.1, False)])
def test_what_is_said_no_more_is_told_no_more(seconds: float, is_told: bool) -> None:
    directives = Directives()
    assert directives.hear(directive(), T0)
    assert bool(told(directives, seconds)) is is_told


def test_a_repeat_keeps_it_alive_and_is_no_news() -> None:
    directives, one = Directives(), directive()
    assert directives.hear(one, T0)
    assert not directives.hear(one.model_copy(update={"fact_id": uuid7(), "rev": 2}), T0 + 20)
    assert told(directives, 49) == ["checkpoint ceiling"]
    assert told(directives, 50) == []


@pytest.mark.parametrize(("seconds", "is_told"), [(4.9, True), (5.0, False), (5.1, False)])
def test_what_is_past_its_deadline_is_told_no_more(seconds: float, is_told: bool) -> None:
    directives, one = Directives(), directive(deadline=at(5))
    directives.hear(one, T0)
    assert bool(told(directives, seconds)) is is_told
    assert directives.wants(one, 1, T0 + seconds) is is_told
    directives.hear(one, T0 + 6)
    assert told(directives, 6) == [], "a repeat that was on its way does not bring it back"


@pytest.mark.parametrize(
    ("incarnation", "is_told", "afterwards"), [(0, False, True), (1, True, True), (2, False, False)]
)
def test_only_the_life_that_is_meant_is_told(incarnation: int, is_told: bool, afterwards: bool) -> None:
    """A replica whose registry lags keeps it; what a life before was asked is void."""
    directives, one = Directives(), directive()
    directives.hear(one, T0)
    assert bool(told(directives, 1, incarnation)) is is_told
    assert directives.wants(one, incarnation, T0 + 1) is is_told
    assert bool(told(directives, 1, 1)) is afterwards


def test_what_was_acknowledged_is_not_told_again_however_often_it_is_said() -> None:
    directives, one, other = Directives(), directive(), directive("tick_waiting")
    directives.hear(one, T0)
    directives.hear(other, T0)
    assert directives.acknowledge("w", [one.directive_id]) == [one.directive_id]
    assert directives.acknowledge("w", [one.directive_id]) == [], "an agent may say it with each beat"
    assert not directives.hear(one, T0 + 10)
    assert told(directives, 10) == ["checkpoint tick_waiting"]
    assert not directives.wants(one, 1, T0 + 10)


def test_an_acknowledgement_that_comes_before_the_directive_counts() -> None:
    """Facts come in any order: another replica heard both before this one heard the first."""
    directives, one = Directives(), directive()
    directives.acknowledge("w", [one.directive_id])
    assert not directives.hear(one, T0)
    assert told(directives, 0) == []


def test_who_finds_no_such_session_has_taken_nothing() -> None:
    """The directive was quicker than its message: it is told again until it is past."""
    words = [Acknowledged(directive_id=uuid7(), result=word) for word in ("saving", "ended", "ignored")]
    assert taken(words) == {words[0].directive_id: "saving", words[2].directive_id: "ignored"}


async def test_an_acknowledgement_at_any_replica_counts() -> None:
    copies, one = Copies("me"), directive()
    handlers = Handlers(copies, unread=lambda: None)
    await handlers.directives([one])
    beat = WorkspaceHeartbeat(
        workspace_id="w", rev=1, incarnation=1, active_tasks=0,
        acknowledged=[Acknowledged(directive_id=one.directive_id, result="noted")],
    )  # fmt: skip
    await handlers.heartbeats([beat])
    await handlers.directives([one])
    assert copies.directives.of("w", 1, T0) == []


REPLACED: list[tuple[str, list[tuple[str, str]], list[str]]] = [
    ("a stop replaces all checkpoints", [("ceiling_near", "checkpoint"), ("ceiling", "stop")], ["stop ceiling"]),
    ("after a stop no checkpoint is told", [("operator", "stop"), ("ceiling", "checkpoint")], ["stop operator"]),
    ("a newer checkpoint of the same reason", [("tick_waiting", "checkpoint")] * 2, ["checkpoint tick_waiting"]),
    (
        "checkpoints of different reasons",
        [("ceiling_near", "checkpoint"), ("tick_waiting", "checkpoint")],
        ["checkpoint ceiling_near", "checkpoint tick_waiting"],
    ),
    ("a second stop", [("ceiling", "stop"), ("operator", "stop")], ["stop operator"]),
]


@pytest.mark.parametrize(("said", "expected"), [row[1:] for row in REPLACED], ids=[row[0] for row in REPLACED])
def test_one_session_has_one_stop_or_the_newest_checkpoint_of_each_reason(
    said: list[tuple[str, str]], expected: list[str]
) -> None:
    directives = Directives()
    for reason, kind in said:
        directives.hear(directive(reason, kind), T0)
    assert told(directives, 0) == expected


def test_the_older_of_two_does_not_come_back_with_its_repeat() -> None:
    """Whatever their ids are, which the scheduler derives from what it asks."""
    ids = [UUID(int=1), UUID(int=2)]
    for first, second in (ids, reversed(ids)):
        directives = Directives()
        older = directive("tick_waiting", directive_id=first, deadline=at(120))
        newer = directive("tick_waiting", directive_id=second, deadline=at(150))
        for each in (older, newer, older.model_copy(update={"fact_id": uuid7(), "rev": 9})):
            directives.hear(each, T0)
        assert [each.directive_id for each in directives.of("w", 1, T0)] == [second]


def test_sessions_do_not_mind_each_other() -> None:
    directives = Directives()
    directives.hear(directive(session_id="a"), T0)
    directives.hear(directive("operator", "stop", session_id="b"), T0)
    assert told(directives, 0) == ["checkpoint ceiling", "stop operator"]


def test_workspaces_that_send_no_heartbeats_hold_no_memory() -> None:
    directives = Directives()
    for number in range(100):
        directives.hear(directive(workspace_id=f"w{number}"), T0)
    directives.hear(directive(), T0 + 31)
    assert list(directives._told) == ["w"]


def test_a_directive_is_shaped_as_agents_read_it() -> None:
    one = directive(deadline=at(0), directive_id=UUID("018bcfe5-6800-7000-8000-000000000000"))
    assert json.loads(json.dumps(shape(one))) == {
        "id": "018bcfe5-6800-7000-8000-000000000000",
        "kind": "checkpoint",
        "reason": "ceiling",
        "session_id": "s",
        "deadline": "2023-11-14T22:13:20+00:00",
    }
    assert shape(directive())["deadline"] is None


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_gets_one_call_at_a_time_and_the_fleet_so_many() -> None:
    calls = Calls()
    first, second, other, third = [directive(workspace_id=name) for name in ("a", "a", "b", "c")]
    for each in (first, second, other, third):
        calls.add(each, T0)
    assert calls.take(2, T0) == [first, other]
    assert calls.take(0, T0) == []
    assert calls.take(9, T0) == [third], "the second of a waits for the first"
    calls.done("a")
    assert calls.take(9, T0) == [second]


def test_what_waits_is_replaced_by_its_repeat() -> None:
    calls, one = Calls(), directive()
    again = one.model_copy(update={"rev": 2})
    calls.add(one, T0)
    calls.add(again, T0 + 9)
    assert calls.take(9, T0 + 19) == [again]


@pytest.mark.parametrize(("seconds", "is_called"), [(9.9, True), (10.0, True), (10.1, False)])
def test_what_has_waited_until_it_was_said_again_is_left_to_who_reads_that(seconds: float, is_called: bool) -> None:
    calls = Calls()
    calls.add(directive(), T0)
    assert bool(calls.take(9, T0 + seconds)) is is_called


URLS = [
    ("http://a:1", "http://a:1/control/stop"),
    ("http://a:1/", "http://a:1/control/stop"),
    ("https://a/agents/x/", "https://a/agents/x/control/stop"),
    ("http://a/rpc?key=1", "http://a/rpc/control/stop"),
]


@pytest.mark.parametrize(("url", "expected"), URLS)
def test_directives_go_below_the_agent_s_url(url: str, expected: str) -> None:
    assert control_url(url, DirectiveKind.STOP.value) == expected


@pytest.mark.parametrize(
    ("method", "named"), [("message/stream", "tasks/cancel"), ("SendStreamingMessage", "CancelTask")]
)
def test_a_cancel_is_in_the_dialect_of_its_message(method: str, named: str) -> None:
    said = json.loads(cancel_body(method, 't"1'))
    assert (said["jsonrpc"], said["method"], said["params"]) == ("2.0", named, {"id": 't"1'})
