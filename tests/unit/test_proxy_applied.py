"""What proxy itself judges of schedules: the right to plan CRITICAL, If-Match, and when a change is in effect."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.proxy.api.identity import Caller
from services.proxy.api.schedules import _refuse_priority, _rev
from services.proxy.api.wire import Refused, Request
from services.proxy.copies.applied import Applied
from shared.facts import ScheduleApplied


def caller(*rights: str) -> Caller:
    return Caller("c", b"c", frozenset(rights))


def test_critical_is_planned_only_with_its_right() -> None:
    """What may not be sent may not be sent later either."""
    _refuse_priority(caller(), b'{"priority": "TASK"}')
    _refuse_priority(caller("critical"), b'{"priority": "CRITICAL"}')
    with pytest.raises(Refused) as refused:
        _refuse_priority(caller(), b'{"priority": "CRITICAL"}')
    assert (refused.value.refuse.status, refused.value.refuse.code) == (403, "priority_not_allowed")


@pytest.mark.parametrize(("said", "rev"), [(None, None), (b"*", None), (b"3", 3), (b'"3"', 3), (b'W/"3"', 3)])
def test_if_match_is_a_rev(said: bytes | None, rev: int | None) -> None:
    assert _rev(_request(said)) == rev


@pytest.mark.parametrize("said", [b"x", b'"', b"-1", b"9" * 40])
def test_what_is_no_rev_is_refused(said: bytes) -> None:
    with pytest.raises(Refused):
        _rev(_request(said))


def _request(if_match: bytes | None) -> Request:
    headers = [(b"if-match", if_match)] if if_match is not None else []
    scope = {"type": "http", "method": "PATCH", "path": "/", "headers": headers}
    return Request(scope, _receive, _send)


async def _receive() -> dict[str, object]:
    return {}


async def _send(_: object) -> None:
    pass


def applied(schedule_id: UUID, rev: int) -> ScheduleApplied:
    return ScheduleApplied(workspace_id="w", rev=rev, schedule_id=schedule_id)


async def test_a_change_is_in_effect_once_the_queue_holds_its_rev_or_a_newer_one() -> None:
    copies, schedule_id = Applied(), uuid7()
    copies.hear(applied(schedule_id, 1))
    assert await copies.wait(schedule_id, 1, 5)
    waiting = asyncio.create_task(copies.wait(schedule_id, 2, 5))
    await asyncio.sleep(0)
    copies.hear(applied(uuid7(), 2))
    copies.hear(applied(schedule_id, 3))
    assert await waiting
    copies.hear(applied(schedule_id, 2))
    assert await copies.wait(schedule_id, 3, 5), "an older word takes nothing back"


async def test_a_change_that_the_queue_does_not_confirm_is_said_to_be_not_applied() -> None:
    assert not await Applied().wait(uuid7(), 1, 0)
