"""How a proxy says "not now": the depth of a line, a caller's rate, its quota of CRITICAL; and when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from shared.facts import MessageBusy, WorkspaceStatus
from tests.conftest import Stack, until
from tests.integration.proxy_kit import Proxy, Reply, empty, fresh, proxy
from tests.integration.stand_in_kit import UNKNOWN, StandIn, stand_in

EXTENSION = "urn:bide:queue:1"
CRITICAL = {EXTENSION: {"priority": "CRITICAL"}}


@pytest.fixture
async def queue(stack: Stack) -> AsyncIterator[StandIn]:
    await empty(stack)
    async with stand_in(stack) as there:
        yield there


@pytest.fixture
async def front(stack: Stack, queue: StandIn) -> AsyncIterator[Proxy]:
    async with proxy(stack, query_timeout_s=20.0, kept_wait_s=5.0) as opened:
        queue.says["known"] = lambda _: UNKNOWN
        await opened.ready()
        yield opened


async def key(front: Proxy, caller_id: str, *rights: str) -> str:
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id, rights) VALUES (sha256($1::bytea), $2, $3)"
    await front.service.pool.execute(query, token.encode(), caller_id, list(rights))
    return token


def code(reply: Reply) -> str:
    said: str = reply.json()["error"]["data"]["code"]
    return said


def told_s(reply: Reply) -> int:
    return int(reply.headers["retry-after"])


# ── the line ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("turn_s", "at_a_time", "expected"), [(None, 1, 30), (90.0, 1, 90), (90.0, 4, 23), (0.2, 1, 1)]
)
async def test_a_full_line_says_when_its_agent_will_have_room(
    front: Proxy, queue: StandIn, turn_s: float | None, at_a_time: int, expected: int
) -> None:
    """A-Q-24: from what a turn takes here, not from a guess."""
    name = fresh()
    await front.register(name, max_concurrent_tasks=at_a_time)
    await queue.tell(front, name, 1000, turn_s=turn_s)
    full = await front.say(name)
    assert (full.status, code(full), told_s(full)) == (429, "queue_full", expected)
    assert full.json()["error"]["message"]
    assert front.copies.keeps.pending(name) == 0


async def test_one_caller_cannot_have_all_of_a_line(front: Proxy, queue: StandIn) -> None:
    """A-Q-24: over half of it, where others wait too; the others still get in."""
    name = fresh()
    await front.register(name)
    await front.call("PATCH", f"/workspaces/{name}", {"queue_depth_max": 10})
    assert (await front.say(name, caller="other")).status == 202
    assert [(await front.say(name, caller="greedy")).status for _ in range(6)] == [202] * 6
    await queue.tell(front, name, 7, turn_s=12.0)
    refused = await front.say(name, caller="greedy")
    assert (refused.status, code(refused), told_s(refused)) == (429, "share_exceeded", 12)
    assert (await front.say(name, caller="other")).status == 202


@dataclass(slots=True)
class Storm:
    """Callers who honour Retry-After, on a clock of their own: nobody waits for real."""

    front: Proxy
    queue: StandIn
    name: str
    place_s: float
    due: dict[str, float]
    now: float = 0.0
    freed: int = 0
    let_in: list[list[str]] = field(default_factory=list)
    tries: int = 0

    async def come(self) -> None:
        """The next moment at which somebody comes: free what is free by then, let them all try at once."""
        self.now = min(self.due.values())
        await self._free(int(self.now / self.place_s))
        ready = [caller for caller, due in self.due.items() if due <= self.now]
        self.tries += len(ready)
        replies = await asyncio.gather(*(self.front.say(self.name, caller=caller) for caller in ready))
        self.let_in.append([caller for caller, reply in zip(ready, replies, strict=True) if reply.status == 202])
        for caller, reply in zip(ready, replies, strict=True):
            if reply.status == 202:
                del self.due[caller]
            else:
                assert (reply.status, code(reply)) == (429, "queue_full")
                self.due[caller] = self.now + told_s(reply)

    async def _free(self, by_now: int) -> None:
        line = self.queue.lines.setdefault(self.name, [])
        del line[: by_now - self.freed]
        self.freed = by_now
        await self.queue.tell(self.front, self.name, len(line), turn_s=self.place_s * 2)


async def test_forty_callers_storm_a_busy_workspace_and_come_back_when_told(front: Proxy, queue: StandIn) -> None:
    """A-P-13, A-Q-24: ten wait and thirty are told when; each time they come there is room, and all get in, once."""
    name = fresh()
    await front.register(name, max_concurrent_tasks=2)
    await front.call("PATCH", f"/workspaces/{name}", {"queue_depth_max": 10})
    kept: list[MessageBusy] = []

    def keep(fact: MessageBusy) -> dict[str, Any]:
        kept.append(fact)
        return {}

    queue.on_kept = keep
    storm = Storm(front, queue, name, place_s=30.0, due={f"caller-{number}": 0.0 for number in range(40)})
    while storm.due:
        await storm.come()
        assert len(queue.lines[name]) == 10, "it is full again, and not over"
    assert [len(each) for each in storm.let_in] == [10] + [1] * 30, "nobody was called back for nothing"
    assert storm.now == 30 * 30.0, "as long as thirty places take to free, and no longer"
    assert storm.tries == 40 + sum(range(1, 31))
    assert len({fact.caller_id for fact in kept}) == len(kept) == 40


# ── a caller's rate ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_caller_that_loops_is_held_back_before_its_body_is_read(stack: Stack, queue: StandIn) -> None:
    del queue
    async with proxy(stack, caller_rate_per_s=0.01, caller_burst=3) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        loops, other, ops = await key(front, "loops"), await key(front, "other"), await key(front, "ops", "operator")
        path = f"/workspaces/{name}/a2a"
        before = REGISTRY.get_sample_value("bide_proxy_refused_total", {"code": "rate_limited"}) or 0.0
        assert [(await front.call("POST", path, b"{", token=loops)).status for _ in range(3)] == [400] * 3
        refused = await front.call("POST", path, b"{", token=loops)
        assert (refused.status, code(refused)) == (429, "rate_limited"), "the body would be refused with 400"
        assert 1 < told_s(refused) <= 100
        assert REGISTRY.get_sample_value("bide_proxy_refused_total", {"code": "rate_limited"}) == before + 1
        assert (await front.call("POST", path, b"{", token=other)).status == 400
        assert {(await front.call("POST", path, b"{", token=ops)).status for _ in range(9)} == {400}
        assert (await front.call("GET", "/queue/nonsense", token=loops)).status == 404, "plain routes are not counted"


async def test_zero_is_no_limit(stack: Stack, queue: StandIn) -> None:
    del queue
    async with proxy(stack, caller_rate_per_s=0, caller_burst=1, critical_per_minute=0, kept_wait_s=5.0) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        critical = await key(front, "alarm", "critical")
        replies = [await front.say(name, caller="alarm", token=critical, metadata=CRITICAL) for _ in range(12)]
        assert {reply.status for reply in replies} == {202}


# ── the quota of CRITICAL ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rights", [("critical",), ("critical", "operator")], ids=["caller", "operator"])
async def test_a_caller_has_so_many_critical_messages_a_minute(
    stack: Stack, queue: StandIn, rights: tuple[str, ...]
) -> None:
    """Only what takes a new place counts: a retry of what waits passes, another priority and another caller too."""
    async with proxy(stack, critical_per_minute=2, query_timeout_s=20.0, kept_wait_s=5.0) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        token, other = await key(front, "alarm", *rights), await key(front, "other", "critical")
        first = await front.say(name, caller="alarm", token=token, metadata=CRITICAL, message_id="m-1")
        assert first.status == 202
        assert (await front.say(name, caller="alarm", token=token, metadata=CRITICAL)).status == 202
        spent = await front.say(name, caller="alarm", token=token, metadata=CRITICAL)
        assert (spent.status, code(spent)) == (429, "critical_quota")
        assert 1 < told_s(spent) <= 30, "two a minute"

        queue_id = first.json()["queue_id"]
        queue.says["known"] = lambda asked: (200, {}) if str(asked.queue_id) == queue_id else UNKNOWN
        again: dict[str, Any] = {"metadata": CRITICAL, "message_id": "m-1", "x_queue_id": queue_id}
        assert (await front.say(name, caller="alarm", token=token, **again)).status == 202
        stranger: dict[str, Any] = {"metadata": CRITICAL, "x_queue_id": str(uuid7())}
        assert (await front.say(name, caller="alarm", token=token, **stranger)).status == 429
        assert (await front.say(name, caller="alarm", token=token)).status == 202
        assert (await front.say(name, caller="other", token=other, metadata=CRITICAL)).status == 202


async def test_what_the_queue_knows_already_is_given_back_to_the_quota(stack: Stack, queue: StandIn) -> None:
    """A-P-13: a client's retries under one key are one message, also while the quota lasts; so is one never kept."""
    async with proxy(stack, critical_per_minute=2, query_timeout_s=20.0, kept_wait_s=5.0) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        alarm: dict[str, Any] = {
            "caller": "alarm",
            "token": await key(front, "alarm", "critical"),
            "metadata": CRITICAL,
        }
        first = await front.say(name, **alarm, message_id="m-1")
        queue.on_kept = lambda fact: {"duplicate_of": first.json()["queue_id"]} if fact.explicit_key else {}
        queue.says["item"] = lambda _: UNKNOWN
        for _ in range(4):
            again = await front.say(name, **alarm, message_id="m-1", idempotency_key="k")
            assert (again.status, again.json()["queue_id"]) == (202, first.json()["queue_id"])
        assert (await front.say(name, **alarm)).status == 202
        assert (await front.say(name, **alarm)).status == 429


# ── what is said, always ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", ["offline", "restarting", "gave_up", "paused"])
async def test_a_workspace_that_cannot_be_reached_is_kept_for(front: Proxy, queue: StandIn, status: str) -> None:
    """A-P-14: hibernated, restarting, given up on: the answer is a promise and never a 503."""
    name = fresh()
    await front.register(name, "http://127.0.0.1:9/")
    word: dict[str, Any] = {"workspace_id": name, "rev": 1, "incarnation": 1, "status": status, "reason": "a test"}
    await queue.publisher.publish(WorkspaceStatus(**word))

    async def is_heard() -> bool:
        workspace = front.copies.registry.find(name)
        return workspace is not None and front.copies.registry.status(workspace) is not None

    await until(is_heard)
    reply = await front.say(name)
    assert (reply.status, reply.json()["result"]["metadata"][EXTENSION]["reason"]) == (202, status)
    assert [fact.reason for fact in queue.lines[name]] == [status]


async def test_every_way_in_which_a_message_is_not_new_has_its_own_answer(front: Proxy, queue: StandIn) -> None:
    """B-17: kept, known under another id, another body under its key: no caller is left to guess."""
    name = fresh()
    await front.register(name)
    first = await front.say(name)
    assert (first.status, first.json()["queued"]) == (202, True)
    queue.on_kept = lambda _: {"duplicate_of": first.json()["queue_id"]}
    known = await front.say(name)
    assert (known.status, known.json()["queue_id"]) == (202, first.json()["queue_id"])
    assert known.headers["x-queue-id"] == first.json()["queue_id"]
    queue.on_kept = lambda _: {"conflict": True}
    other = await front.say(name)
    assert (other.status, code(other), other.json()["error"]["code"]) == (422, "key_conflict", -32600)
    assert other.json()["error"]["data"]["target"] == name
