"""Schedules over HTTP, on the real scheduler and the real queue: who may, what is answered, when it counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Stack, until
from tests.integration.proxy_kit import Proxy, empty, fresh, proxy
from tests.integration.queue_kit import agent, queue_service
from tests.integration.scheduler_kit import scheduler_service

RULE = {"name": "report", "every_s": 3600, "prompt": "before"}


@pytest.fixture
async def ring(stack: Stack) -> AsyncIterator[Proxy]:
    await empty(stack)
    async with (
        proxy(stack, kept_wait_s=5.0, query_timeout_s=20.0, applied_wait_s=20.0) as front,
        queue_service(stack, sweep_s=0.3, snapshot_s=0.3),
        scheduler_service(stack),
    ):
        await front.ready()
        yield front


async def seated(front: Proxy, name: str, url: str = "") -> str:
    token: str = (await front.register(name, url))["auth_token"]
    await front.beat(name, token)

    async def is_answered() -> bool:
        return (await front.call("GET", f"/workspaces/{name}/schedules")).status == 200

    await until(is_answered)
    return token


async def made(front: Proxy, name: str, **more: Any) -> str:
    reply = await front.call("POST", f"/workspaces/{name}/schedules", {**RULE, **more})
    assert reply.status == 201, reply.body
    assert reply.headers["location"].endswith(reply.json()["schedule_id"])
    schedule_id: str = reply.json()["schedule_id"]
    return f"/workspaces/{name}/schedules/{schedule_id}"


async def test_a_schedule_is_made_shown_changed_and_deleted(ring: Proxy) -> None:
    """C-E6, C-V4: If-Match is the rev that was read; a change is answered once the queue holds it."""
    name = fresh()
    await seated(ring, name)
    path = await made(ring, name, cron="0 9 * * mon-fri", every_s=None, timezone="Europe/Berlin")
    shown = (await ring.call("GET", path)).json()
    assert (shown["name"], shown["rev"], shown["paused"]) == ("report", 1, False)
    assert (await ring.call("GET", f"{path}/preview?n=3")).status == 200
    stale = await ring.call("PATCH", path, {"prompt": "x"}, if_match="7")
    assert (stale.status, stale.json()["status"]) == (412, 412)
    changed = await ring.call("PATCH", path, {"prompt": "after"}, if_match='"1"')
    assert (changed.status, changed.json()["applied"], changed.json()["rev"]) == (200, True, 2)
    paused = await ring.call("POST", f"{path}/pause", {"note": "holidays"})
    assert (paused.status, paused.json()["paused"], paused.json()["pause_note"]) == (200, True, "holidays")
    assert (await ring.call("POST", f"{path}/resume")).json()["paused"] is False
    assert [each["name"] for each in (await ring.call("GET", f"/workspaces/{name}/schedules")).json()["items"]]
    assert (await ring.call("DELETE", path)).status == 200
    assert not (await ring.call("GET", f"/workspaces/{name}/schedules")).json()["items"]


async def test_a_run_by_hand_reaches_the_agent_with_the_newest_prompt(ring: Proxy) -> None:
    """C-E1, C-E8."""
    name = fresh()
    async with agent(name) as worker:
        await seated(ring, name, worker.url)
        path = await made(ring, name)
        assert (await ring.call("PATCH", path, {"prompt": "after"})).json()["applied"]
        assert (await ring.call("POST", f"{path}/run")).status in {200, 201, 202}
        await worker.until(lambda: len(worker.received) == 1, 20)
        assert worker.received[0].text == "after"

        async def is_settled() -> bool:
            fires = (await ring.call("GET", f"{path}/fires")).json()["items"]
            return [each["outcome"] for each in fires] == ["delivered"]

        await until(is_settled)


async def test_schedules_are_their_owners_and_operators(ring: Proxy) -> None:
    name, other = fresh(), fresh()
    await seated(ring, name)
    stranger = await seated(ring, other)
    path = await made(ring, name)
    for method, where in (("GET", path), ("PATCH", path), ("DELETE", path), ("POST", f"{path}/run")):
        assert (await ring.call(method, where, {}, token=stranger)).status == 404, where
    assert (await ring.call("GET", path, token=None)).status == 401


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"\xff", 400, "not_json"),
        (b"[]", 400, "not_json"),
        (b'{"name": "x", "prompt": "p", "cron": "0 0 30 2 *"}', 422, None),
        (b'{"name": "x", "prompt": "p"}', 422, None),
    ],
)
async def test_what_cannot_be_a_schedule_is_refused(ring: Proxy, body: bytes, status: int, code: str | None) -> None:
    name = fresh()
    await seated(ring, name)
    reply = await ring.call("POST", f"/workspaces/{name}/schedules", body)
    assert reply.status == status, reply.body
    assert reply.json()["detail"]
    assert code is None or reply.json()["code"] == code
