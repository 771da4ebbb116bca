"""The queue service on real servers, with real agents: kept, in order, delivered once, answered, visibly ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from shared.database import open_pool
from tests.conftest import Stack, until
from tests.integration.queue_kit import Door, agent, digest, door, queue_service


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Door]:
    """An empty queue service and a door to it."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(
            "TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, "
            "inbox, outbox, dead_letters"
        )
    async with door(stack) as opened:
        async with queue_service(
            stack, sweep_s=0.5, reconcile_s=0.5, busy_cap_s=2.0, follow_min_s=0.1, follow_max_s=0.2
        ):
            yield opened
        letters = await opened.side.pool.fetch("SELECT fact_type, reason, error FROM dead_letters")
        assert not letters, letters


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


async def test_a_kept_message_is_delivered_and_its_answer_is_there(front: Door) -> None:
    """A-Q-26: the answer is in the row, on a real Postgres."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        fact = front.busy(name, "hello")
        kept = await front.keep(fact)
        assert (kept.position, kept.duplicate_of) == (1, None)
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["attempts"], item["delivery_no"]) == ("completed", 0, 1)
        assert "hello" in str(item["answer"])
        (received,) = worker.received
        assert (received.queue_id, received.delivery) == (str(fact.queue_id), 1)
        await until(lambda: _told(front, fact.queue_id, "completed"))


async def test_what_waits_is_delivered_in_order_and_one_at_a_time(front: Door) -> None:
    """A-Q-14, A-Q-23, B-01: a backlog drains at the agent's own rate, never more than one of ours in flight."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        facts = [front.busy(name, f"{i:02}") for i in range(40)]
        await asyncio.gather(*(front.keep(fact) for fact in facts))
        await front.register(name, worker.url)
        await front.ended(*(fact.queue_id for fact in facts))
        assert [each.text for each in worker.received] == [f"{i:02}" for i in range(40)]
        await until(lambda: _told(front, facts[-1].queue_id, "completed"))
        for fact in facts:  # A-D-03: whoever listens sees each end exactly once
            assert [change.status.value for change in front.changes[fact.queue_id]].count("completed") == 1
        turns = [(each.started_at or 0.0, each.ended_at or 0.0) for each in worker.received]
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(turns))
        assert not worker.refused


async def test_the_next_item_follows_within_milliseconds(front: Door) -> None:
    """From the end of one turn to the begin of the next at a 30 s heartbeat: the drain needs no beat (A-Q-14)."""
    name = fresh()
    async with agent(name, work_s=0.02) as worker:
        facts = [front.busy(name, str(i)) for i in range(30)]
        await asyncio.gather(*(front.keep(fact) for fact in facts))
        await front.register(name, worker.url)
        await front.ended(*(fact.queue_id for fact in facts))
        gaps = sorted(((b.started_at or 0.0) - (a.ended_at or 0.0)) * 1000 for a, b in pairwise(worker.received))
        print(f"freed to next: p50 {gaps[len(gaps) // 2]:.1f} ms, max {gaps[-1]:.1f} ms")


async def test_a_busy_agent_costs_no_attempt_and_no_place(front: Door) -> None:
    """A-Q-01, B-12: a drained item that meets a busy agent goes back, same id, same rank; 1..5 keep their order."""
    name = fresh()
    async with agent(name) as worker:
        worker.busy_for(1.5)
        await front.register(name, worker.url)
        facts = [front.busy(name, str(i)) for i in range(5)]
        for fact in facts:
            await front.keep(fact)
        await until(lambda: _refused_once(worker))
        rank = "SELECT rank_ms FROM a2a_queue WHERE queue_id = $1"
        assert await front.side.pool.fetchval(rank, facts[0].queue_id) == facts[0].queue_id.int >> 80
        items = await front.ended(*(fact.queue_id for fact in facts))
        assert [each.text for each in worker.received] == ["0", "1", "2", "3", "4"]
        assert {item["attempts"] for item in items} == {0}
        assert {refused.queue_id for refused in worker.refused} == {str(facts[0].queue_id)}, "busy closes the workspace"


async def test_a_beat_that_opens_a_busy_workspace_finds_the_same_message_first(front: Door) -> None:
    """I3, A-Q-01: the agent asked for a pause longer than it needed; nobody may pass whom it turned away."""
    name = fresh()
    async with agent(name, work_s=0.05) as worker:
        worker.behave(retry_after_s=2)
        worker.busy_for(60)
        await front.register(name, worker.url)
        facts = [front.busy(name, str(number)) for number in range(3)]
        for fact in facts:
            await front.keep(fact)
        await worker.until(lambda: len(worker.refused) == 1)
        query = "SELECT not_before IS NOT NULL FROM workspaces WHERE workspace_id = $1"

        async def closed() -> bool:
            return bool(await front.side.pool.fetchval(query, name))

        await until(closed)
        worker.busy_for(0)
        await front.heartbeat(name, active=0)
        await front.ended(*(fact.queue_id for fact in facts))
        assert [each.text for each in worker.received] == ["0", "1", "2"]


async def test_two_callers_with_one_message_id_are_two_items(front: Door) -> None:
    """A-Q-02."""
    name = fresh()
    one = front.busy(name, "one", key="1", caller="a")
    two = front.busy(name, "two", key="1", caller="b")
    assert (await front.keep(one)).duplicate_of is None
    assert (await front.keep(two)).duplicate_of is None


async def test_twenty_concurrent_sends_of_one_message_are_one_item(front: Door) -> None:
    """B-15: one row, and everybody gets its id."""
    name = fresh()
    body = front.busy(name, "same", key="k").body
    facts = [front.busy(name, "same", key="k", body=body) for _ in range(20)]
    kept = await asyncio.gather(*(front.keep(fact) for fact in facts))
    firsts = {word.duplicate_of or fact.queue_id for fact, word in zip(facts, kept, strict=True)}
    assert len(firsts) == 1
    count = "SELECT count(*) FROM a2a_queue WHERE workspace_id = $1"
    assert await front.side.pool.fetchval(count, name) == 1
    others = [fact.queue_id for fact in facts if fact.queue_id not in firsts]
    for item in await front.ended(*others):
        assert (item["status"], item["superseded_by"]) == ("superseded", str(next(iter(firsts))))


async def test_the_same_key_with_another_body_is_a_visible_conflict(front: Door) -> None:
    """A-Q-02, B-16: reported, never swallowed."""
    name = fresh()
    first, other = front.busy(name, "one", key="k"), front.busy(name, "two", key="k")
    await front.keep(first)
    assert (await front.keep(other)).conflict
    (item,) = await front.ended(other.queue_id)
    assert (item["status"], item["reason"]) == ("failed", "key_conflict")


async def test_a_retry_with_its_queue_id_is_the_same_item_also_when_it_has_ended(front: Door) -> None:
    name = fresh()
    async with agent(name) as worker:
        fact = front.busy(name, "once")
        await front.keep(fact)
        again = fact.model_copy(update={"fact_id": uuid7()})
        assert (await front.keep(again)).duplicate_of == fact.queue_id
        await front.register(name, worker.url)
        await front.ended(fact.queue_id)
        front.kept.clear()
        late = fact.model_copy(update={"fact_id": uuid7()})
        assert (await front.keep(late)).duplicate_of == fact.queue_id
        assert len(worker.received) == 1


async def test_a_message_id_may_be_used_again_after_its_item_ended_an_explicit_key_not(front: Door) -> None:
    """A-Q-21, B-16: an explicit key covers the whole retention."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        body = front.busy(name, "x", key="m").body
        for explicit, executions in ((False, 2), (True, 1)):
            first = front.busy(name, "x", key=f"m{explicit}", body=body, explicit_key=explicit)
            await front.keep(first)
            await front.ended(first.queue_id)
            second = front.busy(name, "x", key=f"m{explicit}", body=body, explicit_key=explicit)
            assert (await front.keep(second)).duplicate_of == (first.queue_id if explicit else None)
            await front.ended(second.queue_id)
            ours = {str(first.queue_id), str(second.queue_id)}
            assert len([each for each in worker.received if each.queue_id in ours]) == executions


async def test_a_paused_workspace_stays_paused_when_its_agent_registers_again(front: Door) -> None:
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url, paused=True)
        fact = front.busy(name, "x")
        await front.keep(fact)
        item = await front.item(fact.queue_id)
        assert (item["status"], item["waits"]["reason"]) == ("queued", "paused")
        assert item["why"].startswith("next in line: the workspace has been paused for ")
        await front.register(name, worker.url)
        await front.ended(fact.queue_id)


async def test_any_legal_body_arrives_byte_exact(front: Door) -> None:
    """A-Q-06, A-Q-25: NUL escape, lone surrogate, 20-digit integer, odd spacing; such a key is kept too."""
    name = fresh()
    body = (
        b'{ "jsonrpc":"2.0","id" :12345678901234567890, "method":"message/send",\n "params":{"message":{'
        b'"role":"user","kind":"message","messageId":"\\u0000\\ud800","n":1e3,'
        b'"parts":[{"kind":"text","text":"\\u0000 \\ud800 1e3"}]}}}'
    )
    async with agent(name) as worker:
        await front.register(name, worker.url)
        fact = front.busy(name, "", key="\0\N{SNOWMAN}", body=body, caller="system:x\\u0000")
        await front.keep(fact)
        await front.ended(fact.queue_id)
        (received,) = worker.received
        assert received.body == body


async def test_a_live_forward_holds_its_slot_until_its_proxy_says_it_ended(front: Door) -> None:
    """Capacity 1: a message kept 20 ms after a forward began waits for its end, and then not for a sweep (A-Q-23)."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        fact = front.busy(name, "next", beat=front.beat(name, "f1"))
        await front.keep(fact)
        await asyncio.sleep(0.7)  # more than a sweep: it is the forward that holds it
        assert not worker.received
        ended_at = time.monotonic()
        await front.publisher.publish(front.beat(name))
        await front.ended(fact.queue_id)
        assert len(worker.received) == 1
        print(f"forward ended to delivered: {(time.monotonic() - ended_at) * 1000:.0f} ms with the turn of 50 ms")


async def test_a_beat_that_shows_the_agent_busy_holds_and_one_with_room_drains(front: Door) -> None:
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        await front.heartbeat(name, active=1)
        await until(lambda: _beat_is(front, name, 1))
        fact = front.busy(name, "held")
        await front.keep(fact)
        item = await front.item(fact.queue_id)
        assert (item["status"], item["position"]) == ("queued", 1)
        assert item["why"] == "next in line: its agent is at 1/1"
        await front.heartbeat(name, active=0)
        await front.ended(fact.queue_id)
        assert len(worker.received) == 1


async def test_an_accepted_task_holds_its_slot_and_is_followed_through_failing_polls(front: Door) -> None:
    name = fresh()
    async with agent(name, behaviour={"asynchronous": True, "work_s": 1.0, "polls_fail_s": 0.6}) as worker:
        await front.register(name, worker.url)
        first, second = front.busy(name, "slow"), front.busy(name, "after")
        await front.keep(first)
        await front.keep(second)
        one, _two = await front.ended(first.queue_id, second.queue_id)
        assert one["status"] == "completed"
        assert one["agent_task_id"]
        assert [each.text for each in worker.received] == ["slow", "after"]
        assert (worker.received[1].started_at or 0.0) >= (worker.received[0].ended_at or 0.0) > 0


@pytest.mark.parametrize(
    ("behaviour", "status", "reason", "deliveries"),
    [
        ({"refusing": 1}, "failed", "refused", 1),
        ({"failing": 1}, "completed", None, 2),
        ({"cut": 1}, "completed", None, 2),
        ({"bare_503": 1}, "completed", None, 2),
        ({"preempted": 1}, "completed", None, 2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_what_comes_back_decides(
    front: Door, behaviour: dict[str, int], status: str, reason: str | None, deliveries: int
) -> None:
    """A-Q-10, A-Q-11, A-Q-18, A-Q-19: the row of policies §2, with the same X-Queue-Id and a higher X-Bide-Delivery."""
    name = fresh()
    async with agent(name, behaviour=behaviour) as worker:
        await front.register(name, worker.url)
        fact = front.busy(name, "x")
        await front.keep(fact)
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["reason"], item["delivery_no"]) == (status, reason, deliveries)
        if status == "failed":
            assert item["answer"]["error"]["code"] == -32602, "the agent's own error is passed on"


async def test_a_waiting_item_is_canceled_and_frees_its_key(front: Door) -> None:
    name = fresh()
    fact = front.busy(name, "x", key="k")
    await front.keep(fact)
    status, body = await front.ask("cancel", name, queue_id=fact.queue_id)
    assert (status, body["status"]) == (200, "canceled")
    status, body = await front.ask("cancel", name, queue_id=fact.queue_id)
    assert (status, body["status"]) == (200, "canceled"), "said twice it is the same"
    again = front.busy(name, "x", key="k")
    assert (await front.keep(again)).duplicate_of is None


async def test_another_callers_item_is_not_told_from_none(front: Door) -> None:
    name = fresh()
    fact = front.busy(name, "x", caller="a")
    await front.keep(fact)
    assert (await front.ask("item", queue_id=fact.queue_id, caller_hash=digest("b")))[0] == 404
    assert (await front.ask("cancel", queue_id=fact.queue_id, caller_hash=digest("b")))[0] == 404
    assert (await front.ask("item", queue_id=fact.queue_id, caller_hash=digest("a")))[0] == 200


async def test_a_listing_comes_in_delivery_order_page_by_page(front: Door) -> None:
    name = fresh()
    facts = [front.busy(name, str(i), caller="a" if i % 2 else "b") for i in range(25)]
    await asyncio.gather(*(front.keep(fact) for fact in facts))
    seen: list[str] = []
    cursor = None
    while True:
        _, page = await front.ask("list", name, limit=10, cursor=cursor)
        seen += [item["queue_id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [str(fact.queue_id) for fact in facts]
    _, ours = await front.ask("list", name, caller_hash=digest("a"))
    assert [item["position"] for item in ours["items"]] == list(range(2, 26, 2))


async def test_a_command_that_comes_too_late_is_refused(front: Door) -> None:
    name = fresh()
    fact = front.busy(name, "x")
    await front.keep(fact)
    status, body = await front.ask("cancel", name, queue_id=fact.queue_id, expires_at="2020-01-01T00:00:00Z")
    assert (status, body["code"]) == (408, "too_late")
    assert (await front.item(fact.queue_id))["status"] == "queued"


async def test_a_message_that_waited_past_its_time_expires_visibly(front: Door) -> None:
    """A-Q-03, A-Q-04: a transition with a reason; the key is free again."""
    name = fresh()
    fact = front.busy(name, "x", key="k", expires_at="2020-01-01T00:00:00Z")
    await front.keep(fact)
    (item,) = await front.ended(fact.queue_id)
    assert (item["status"], item["reason"]) == ("expired", "expired")
    assert (await front.keep(front.busy(name, "x", key="k"))).duplicate_of is None


async def test_one_workspace_that_cannot_be_reached_stops_no_other(front: Door) -> None:
    """A-Q-13, B-11: it waits for itself."""
    dead, living = fresh(), fresh()
    async with agent(living) as worker:
        await front.register(dead, "http://127.0.0.1:20001")
        await front.register(living, worker.url)
        stuck = front.busy(dead, "x")
        await front.keep(stuck)
        facts = [front.busy(living, str(i)) for i in range(5)]
        for fact in facts:
            await front.keep(fact)
        await front.ended(*(fact.queue_id for fact in facts))
        item = await front.item(stuck.queue_id)
        assert item["status"] in {"queued", "dispatched"}, "it waits, or is just being tried again"
        assert item["attempts"] == 0, "a refused connection costs no attempt"


async def test_a_dead_owners_deliveries_are_taken_over_without_a_death(front: Door, stack: Stack) -> None:
    """A-Q-12, B-04, B-07: claimed by a replica that is gone; the row comes back, its late finish has no effect."""
    name = fresh()
    async with agent(name) as worker:
        fact = front.busy(name, "x")
        await front.keep(fact)
        pool = front.side.pool
        await pool.execute(
            """UPDATE a2a_queue SET status = 'dispatched', owner = 'gone', delivery_no = 7, dispatched_at = now()
               WHERE queue_id = $1""",
            fact.queue_id,
        )
        await pool.execute("UPDATE workspaces SET waiting = 0, running = 1 WHERE workspace_id = $1", name)
        await front.register(name, worker.url)
        async with queue_service(stack, owner_beat_s=0.1, owner_silent_s=2.0, sweep_s=0.5):
            (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["attempts"], item["delivery_no"]) == ("completed", 1, 8)
        assert len(worker.received) == 1


async def test_a_claim_that_was_never_confirmed_to_its_owner_is_written_back(front: Door) -> None:
    """B-04, B-06: the commit's answer was lost: the row is ours, nobody delivers it, and we go on beating."""
    name = fresh()
    async with agent(name) as worker:
        fact = front.busy(name, "x")
        await front.keep(fact)
        await front.side.pool.execute(
            """UPDATE a2a_queue SET status = 'dispatched', delivery_no = 1, dispatched_at = now(),
                                    owner = (SELECT replica_id FROM replicas LIMIT 1) WHERE queue_id = $1""",
            fact.queue_id,
        )
        await front.side.pool.execute("UPDATE workspaces SET waiting = 0, running = 1 WHERE workspace_id = $1", name)
        await front.register(name, worker.url)
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["attempts"], item["delivery_no"]) == ("completed", 0, 2)
        assert len(worker.received) == 1


async def test_a_cancel_of_what_is_under_way_holds_when_it_comes_back(front: Door) -> None:
    """B-13: the agent gives it back; it ends as canceled instead of being delivered again."""
    name = fresh()
    async with agent(name, behaviour={"slow_s": 1.0, "preempted": 1}) as worker:
        await front.register(name, worker.url)
        fact = front.busy(name, "x")
        await front.keep(fact)
        await until(lambda: _is_dispatched(front, fact.queue_id))
        status, body = await front.ask("cancel", name, queue_id=fact.queue_id)
        assert (status, body["code"]) == (202, "cancel_requested")
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["delivery_no"]) == ("canceled", 1)


async def test_no_clock_runs_while_a_workspace_is_paused(front: Door) -> None:
    name = fresh()
    await front.register(name, "http://127.0.0.1:20001", paused=True)
    fact = front.busy(name, "x", expires_at="2020-01-01T00:00:00Z")
    other = front.busy(fresh(), "x", expires_at="2020-01-01T00:00:00Z")
    await front.keep(fact)
    await front.keep(other)
    await front.ended(other.queue_id)
    assert (await front.item(fact.queue_id))["status"] == "queued"


async def test_an_agent_that_says_come_at_once_is_not_asked_in_a_loop(front: Door) -> None:
    name = fresh()
    async with agent(name, behaviour={"retry_after_s": 0}) as worker:
        worker.busy_for(1.0)
        await front.register(name, worker.url)
        fact = front.busy(name, "x")
        await front.keep(fact)
        await front.ended(fact.queue_id)
        assert 1 <= len(worker.refused) <= 25, "a turn each 50 ms is the most"


async def test_counters_that_leaked_are_corrected(front: Door) -> None:
    """B-06: a slot that nobody holds must not close a workspace for ever."""
    name = fresh()
    async with agent(name) as worker:
        await front.register(name, worker.url)
        await front.heartbeat(name)
        await until(lambda: _beat_is(front, name, 0))
        await front.side.pool.execute("UPDATE workspaces SET running = 1 WHERE workspace_id = $1", name)
        fact = front.busy(name, "x")
        await front.keep(fact)
        await front.ended(fact.queue_id)
        assert len(worker.received) == 1


async def test_a_stopping_replica_writes_back_what_it_cannot_finish(stack: Stack, front: Door) -> None:
    """B-05, B-30: on SIGTERM neither an attempt nor a death; the accepted task's id goes along and is followed on."""
    name = fresh()
    async with agent(name, behaviour={"asynchronous": True, "work_s": 3.0}) as worker:
        async with queue_service(stack, drain_s=0.0, follow_min_s=0.1):
            await front.register(name, worker.url)
            fact = front.busy(name, "x")
            await front.keep(fact)
            await until(lambda: _has_task(front, fact.queue_id))
        (item,) = await front.ended(fact.queue_id)
        assert (item["status"], item["attempts"]) == ("completed", 0)
        assert len(worker.received) == 1, "followed, not sent again"


async def _told(front: Door, queue_id: UUID, status: str) -> bool:
    return any(change.status.value == status for change in front.changes.get(queue_id, []))


async def _refused_once(worker: object) -> bool:
    return bool(worker.refused)  # type: ignore[attr-defined]


async def _beat_is(front: Door, name: str, active: int) -> bool:
    row: asyncpg.Record | None = await front.side.pool.fetchrow(
        "SELECT beat_active, beat_at FROM workspaces WHERE workspace_id = $1", name
    )
    return row is not None and row["beat_at"] is not None and row["beat_active"] == active


async def _is_dispatched(front: Door, queue_id: UUID) -> bool:
    query = "SELECT status = 'dispatched' FROM a2a_queue WHERE queue_id = $1"
    return bool(await front.side.pool.fetchval(query, queue_id))


async def _has_task(front: Door, queue_id: UUID) -> bool:
    query = "SELECT agent_task_id IS NOT NULL FROM a2a_queue WHERE queue_id = $1"
    return bool(await front.side.pool.fetchval(query, queue_id))
