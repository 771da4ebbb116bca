"""The lines of a workspace on real servers: whose turn it is, commands over what waits, its clocks, and its figures."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from services.queue import decide, store
from services.queue.decide import Head
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import MessageBusy, Priority, WorkspaceRemoved
from tests.conftest import Stack, until
from tests.integration.queue_kit import Door, agent, digest, door, queue_service
from tests.integration.rows_kit import enqueue, message

TABLES = "a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, inbox, outbox, dead_letters"
NOBODY = "http://127.0.0.1:20001"
LIMIT_S = 60.0


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[Pool]:
    """The queue's tables, empty, and no service that works on them."""
    async with open_pool(stack.settings()) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        yield pool


@pytest.fixture
async def front(rows: Pool, stack: Stack) -> AsyncIterator[Door]:
    """An empty queue service and a door to it."""
    async with door(stack) as opened, queue_service(stack, sweep_s=0.3, snapshot_s=0.5, snapshot_pause_s=0.1):
        yield opened
        letters = await rows.fetch("SELECT fact_type, reason, error FROM dead_letters")
        assert not letters, letters


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


# ── the pure order, and that of the rows ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Row:
    """What the oracle knows of a row."""

    fact: MessageBusy
    enqueued_at: float

    @property
    def lane(self) -> int:
        return decide.lane(self.fact.priority)

    @property
    def key(self) -> tuple[int, int, UUID]:
        return (self.lane, decide.rank(self.fact.queue_id, self.fact.fact_id, self.fact.priority), self.fact.queue_id)


def _random_rows(lot: random.Random, names: list[str], now: float) -> list[Row]:
    """Messages of all priorities whose ids, facts and waits lie around every limit there is."""
    rows = []
    for _ in range(lot.randint(5, 30)):
        made = now - lot.choice([0, 1, 59, 61, 119, 121, 300])
        read = made - lot.choice([0, 0, 0.001, 5, 11, 600])
        changes = {
            "fact_id": _id_of(made),
            "queue_id": _id_of(read),
            "priority": lot.choice([Priority.CRITICAL, Priority.TASK, Priority.TASK, Priority.INFO]),
            "not_before": datetime.fromtimestamp(now + lot.choice([-5, 5]), UTC) if lot.random() < 0.3 else None,
        }
        fact = message(lot.choice(names)).model_copy(update=changes)
        rows.append(Row(fact, now - LIMIT_S + lot.choice([-30, -0.001, 0.001, 30])))
    return rows


def _id_of(at: float) -> UUID:
    return UUID(int=(int(at * 1000) << 80) | (uuid7().int & ((1 << 80) - 1)))


def _expected(waiting: list[Row], room: int, now: float, *, served_critical: bool) -> list[Row]:
    """Who goes, by the pure functions alone."""
    ready = [row for row in waiting if row.fact.not_before is None or row.fact.not_before.timestamp() <= now]
    lanes: tuple[list[Head], list[Head]] = ([], [])
    line = sorted(ready, key=lambda row: row.key)
    for number, row in enumerate(line):
        lanes[row.lane].append(Head((0, number), row.lane, row.enqueued_at))
    chosen = decide.turns(
        *lanes, room=room, served_critical=served_critical, now=now, starvation_limit_s=LIMIT_S
    )  # fmt: skip
    return [line[head.version[1]] for head in chosen]


async def test_rows_are_claimed_in_the_order_that_the_pure_functions_say(rows: Pool) -> None:
    """I3, B-01: rank, lanes and turns against the SQL, claim after claim, until nobody is left who may go."""
    seed = secrets.randbelow(2**32) if os.environ.get("BIDE_TEST_LONG") else 20_261_129
    print(f"seed {seed}")
    lot, now, claims, passed = random.Random(seed), datetime.now(UTC).timestamp(), 0, 0
    for _ in range(25):
        names = [fresh() for _ in range(lot.randint(1, 3))]
        waiting = _random_rows(lot, names, now)
        assert len(await enqueue(rows, *(row.fact for row in waiting))) == len(waiting)
        aged = "UPDATE a2a_queue SET enqueued_at = to_timestamp($2) WHERE queue_id = $1"
        await rows.executemany(aged, [(row.fact.queue_id, row.enqueued_at) for row in waiting])
        served = dict.fromkeys(names, False)
        while True:
            room = {name: lot.randint(1, 5) for name in names}
            wanted = {
                name: _expected(
                    [row for row in waiting if row.fact.workspace_id == name], room[name], now,
                    served_critical=served[name],
                )
                for name in names
            }  # fmt: skip
            claimed = await transact(rows, lambda connection, room=room: _claim(connection, room, now))  # type: ignore[misc]
            for name, chosen in wanted.items():
                found = claimed[name].items if name in claimed else []
                inside = sorted(chosen, key=lambda row: row.key)
                assert [item.queue_id for item in found] == [row.fact.queue_id for row in inside], f"seed {seed}"
                if chosen:
                    served[name] = chosen[-1].lane == decide.CRITICAL_LANE
                    assert claimed[name].served_critical == served[name], f"seed {seed}"
                passed += claimed[name].starved if name in claimed else 0
            gone = {row.fact.queue_id for chosen in wanted.values() for row in chosen}
            waiting = [row for row in waiting if row.fact.queue_id not in gone]
            claims += len(gone)
            if not gone:
                break
    print(f"{claims} claimed, {passed} of them before CRITICAL that waited")
    assert passed > 0


async def _claim(connection: Connection, room: dict[str, int], now: float) -> dict[str, store.Claimed]:
    before = await store.lock(connection, room)
    moment = datetime.fromtimestamp(now, UTC)
    claimed = await store.claim(connection, room, before, "o", moment, starvation_limit_s=LIMIT_S)
    after = {
        name: decide.begin(
            before[name], [item.priority for item in mine.items], mine.floors, served_critical=mine.served_critical
        )
        for name, mine in claimed.items()
    }
    await store.save_counters(connection, before, after)
    return claimed


# ── expiry ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_stale_info_ends_before_its_agent_comes_back_and_is_not_counted_any_more(front: Door) -> None:
    """A-Q-03, A-Q-04, A-Q-16: a transition with a reason that is told; the keys are free; depth is what waits."""
    name = fresh()
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    stale = [
        front.busy(name, str(number), key=str(number), priority=Priority.INFO, expires_at=soon) for number in range(12)
    ]
    for fact in stale:
        await front.keep(fact)
    for item in await front.ended(*(fact.queue_id for fact in stale)):
        assert (item["status"], item["reason"], item["delivery_no"]) == ("expired", "expired", 0)

    async def all_told() -> bool:
        return all(front.changes.get(fact.queue_id) for fact in stale)

    await until(all_told)
    assert {(change.status.value, change.reason) for fact in stale for change in front.changes[fact.queue_id]} == {
        ("expired", "expired")
    }
    again = front.busy(name, "again", key="0", priority=Priority.INFO)
    kept = await front.keep(again)
    assert (kept.duplicate_of, kept.depth) == (None, 1)
    async with agent(name) as worker:
        await front.register(name, worker.url)
        await front.ended(again.queue_id)
        assert [each.text for each in worker.received] == ["again"]


async def test_what_waits_in_a_paused_workspace_ends_once_that_is_removed(front: Door) -> None:
    """I1, A-Q-03: nobody will ever end that pause, and what waits must not wait for ever."""
    name = fresh()
    await front.register(name, NOBODY, paused=True)
    fact = front.busy(name, "x", expires_at=datetime.now(UTC))
    await front.keep(fact)
    await front.publisher.publish(WorkspaceRemoved(workspace_id=name, rev=uuid7().int >> 80))
    (item,) = await front.ended(fact.queue_id)
    assert (item["status"], item["reason"]) == ("expired", "expired")


async def test_a_pause_gives_what_waits_its_time_back_also_to_what_came_meanwhile(front: Door) -> None:
    """Both clocks stand still; the item shows it, and after the pause the row has it."""
    name = fresh()
    due = datetime.now(UTC) + timedelta(seconds=3600)
    first, second = (front.busy(name, text, expires_at=due) for text in ("first", "second"))
    await front.register(name, NOBODY)
    await front.keep(first)
    await front.register(name, NOBODY, paused=True)
    await front.keep(second)
    shown = [await front.item(first.queue_id) for _ in range(2)]
    assert shown[0]["expires_at"] < shown[1]["expires_at"], "while the clock stands, the end moves on"
    pool = front.side.pool
    since = await pool.fetchval("SELECT paused_at FROM workspaces WHERE workspace_id = $1", name)
    before = {row["queue_id"]: row for row in await pool.fetch("SELECT * FROM a2a_queue WHERE workspace_id = $1", name)}
    resumed_after = await pool.fetchval("SELECT clock_timestamp()")
    await front.register(name, NOBODY)
    resumed_before = await pool.fetchval("SELECT clock_timestamp()")
    for row in await pool.fetch("SELECT * FROM a2a_queue WHERE workspace_id = $1", name):
        was = before[row["queue_id"]]
        stood_since = max(since, row["enqueued_at"])
        for clock in ("expires_at", "give_up_at"):
            assert resumed_after - stood_since <= row[clock] - was[clock] <= resumed_before - stood_since
    assert before[second.queue_id]["enqueued_at"] > since, "one came during the pause"


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_retry_is_one_new_item_without_the_key_of_the_first(front: Door) -> None:
    """Twice is once; the first says what repeats it, the new one what it repeats; and it is delivered."""
    name = fresh()
    fact = front.busy(name, "x", key="k", priority=Priority.INFO)
    await front.keep(fact)
    assert (await front.ask("retry", queue_id=fact.queue_id))[0] == 409, "it still waits"
    await front.ask("cancel", queue_id=fact.queue_id)
    status, again = await front.ask("retry", queue_id=fact.queue_id, caller_hash=digest("caller"))
    assert (status, again["status"], again["retry_of"], again["priority"]) == (
        201,
        "queued",
        str(fact.queue_id),
        "INFO",
    )
    assert again["queue_id"] != str(fact.queue_id)
    assert again["expires_at"] is not None, "INFO does not wait for ever, the second time neither"
    status, twice = await front.ask("retry", queue_id=fact.queue_id)
    assert (status, twice["queue_id"]) == (200, again["queue_id"])
    assert (await front.item(fact.queue_id))["retried_by"] == again["queue_id"]
    other = front.busy(name, "x", key="k")
    assert (await front.keep(other)).duplicate_of is None, "the key is its caller's again"
    async with agent(name) as worker:
        await front.register(name, worker.url)
        await front.ended(UUID(again["queue_id"]), other.queue_id)
        assert [each.queue_id for each in worker.received] == [str(other.queue_id), again["queue_id"]]
        status, refused = await front.ask("retry", queue_id=UUID(again["queue_id"]))
        assert (status, refused["code"]) == (409, "not_ended_badly"), "what was answered is not sent again"


async def test_nobody_repeats_or_promotes_what_is_anothers(front: Door) -> None:
    fact = front.busy(fresh(), "x", caller="a")
    await front.keep(fact)
    assert (await front.ask("promote", queue_id=fact.queue_id, caller_hash=digest("b")))[0] == 404
    await front.ask("cancel", queue_id=fact.queue_id)
    assert (await front.ask("retry", queue_id=fact.queue_id, caller_hash=digest("b")))[0] == 404
    assert (await front.ask("retry", queue_id=uuid7()))[0] == 404
    status, body = await front.ask("promote", queue_id=fact.queue_id)
    assert (status, body["code"]) == (409, "not_waiting")


async def test_a_promoted_item_goes_first_but_for_critical_and_twice_is_once(front: Door) -> None:
    name = fresh()
    texts = [("t0", "TASK"), ("t1", "TASK"), ("i0", "INFO"), ("c0", "CRITICAL")]
    facts = {text: front.busy(name, text, priority=Priority(word)) for text, word in texts}
    for fact in facts.values():
        await front.keep(fact)
    _, page = await front.ask("list", name)
    assert [item["queue_id"] for item in page["items"]] == [
        str(facts[text].queue_id) for text in ("c0", "t0", "t1", "i0")
    ]
    for _ in range(2):
        status, shown = await front.ask("promote", queue_id=facts["i0"].queue_id)
        assert (status, shown["position"]) == (200, 2)
    rank = "SELECT rank_ms FROM a2a_queue WHERE queue_id = $1"
    ranks = [await front.side.pool.fetchval(rank, facts[text].queue_id) for text in ("i0", "t0")]
    assert ranks[0] == ranks[1] - 1, "said twice it is the same"
    async with agent(name, work_s=0.01) as worker:
        await front.register(name, worker.url)
        await front.ended(*(fact.queue_id for fact in facts.values()))
        assert [each.text for each in worker.received] == ["c0", "i0", "t0", "t1"]


async def test_what_matches_is_counted_or_ended_and_nothing_else(front: Door) -> None:
    """A-Q-16: what piled up in an incident is dropped by who sent it, how urgent it is and how long it has waited."""
    name, other = fresh(), fresh()
    facts = [
        front.busy(name, f"{caller}{word}{number}", caller=caller, priority=Priority(word))
        for number in range(2) for caller in "ab" for word in ("TASK", "INFO", "CRITICAL")
    ]  # fmt: skip
    facts.append(front.busy(other, "x", caller="a", priority=Priority.INFO))
    await asyncio.gather(*(front.keep(fact) for fact in facts))
    old = [fact.queue_id for fact in facts[:6]]
    pool = front.side.pool
    await pool.execute(
        "UPDATE a2a_queue SET enqueued_at = now() - interval '3 h' WHERE queue_id = ANY($1::uuid[])", old
    )

    async def drop(**about: Any) -> tuple[int, int, int]:
        status, said = await front.ask("cancel_many", name, **about)
        assert status == 200
        return said["matched"], said["canceled"], said["remaining"]

    assert await drop(count_only=True) == (12, 0, 12)
    about = {"priority": Priority.INFO, "caller_hash": digest("a"), "older_than_s": 7200.0}
    assert await drop(**about, count_only=True) == (1, 0, 1)
    assert await drop(**about) == (1, 1, 0)
    assert await drop(**about) == (0, 0, 0), "said twice it is done once"
    (item,) = await front.ended(facts[1].queue_id)
    assert (item["status"], item["reason"]) == ("canceled", "dropped")
    assert await drop(older_than_s=7200.0) == (5, 5, 0)
    assert await drop(priority=Priority.CRITICAL) == (2, 2, 0)
    _, page = await front.ask("list", name, priority=Priority.TASK)
    assert [(item["priority"], item["position"]) for item in page["items"]] == [("TASK", 1), ("TASK", 2)]
    _, page = await front.ask("list", name)
    assert [item["priority"] for item in page["items"]] == ["TASK", "TASK", "INFO", "INFO"]
    assert (await front.item(facts[-1].queue_id))["status"] == "queued", "another workspace's is not touched"
    counters = "SELECT waiting, waiting_critical, waiting_info FROM workspaces WHERE workspace_id = $1"
    assert tuple(await pool.fetchrow(counters, name) or ()) == (4, 0, 2)


# ── why, and the figures ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_item_that_waits_says_why(front: Door) -> None:
    name = fresh()
    later = datetime.now(UTC) + timedelta(seconds=3600)
    info = front.busy(name, "i", priority=Priority.INFO)
    late = front.busy(name, "l", not_before=later)
    for fact in (info, late):
        await front.keep(fact)

    async def why(fact: MessageBusy) -> tuple[str, dict[str, Any]]:
        item = await front.item(fact.queue_id)
        return item["why"], item["waits"]

    assert (await why(late))[0] == "next in line: its agent has not registered yet"
    async with agent(name, work_s=30, max_concurrent=3) as worker:
        await front.register(name, worker.url, paused=True)
        words, fields = await why(info)
        assert words.startswith("2nd in line: the workspace has been paused for ")
        assert (fields["reason"], fields["ahead"]) == ("paused", 1)
        assert 0 < fields["passable_s"] <= 120
        critical = front.busy(name, "c", priority=Priority.CRITICAL)
        await front.keep(critical)
        words, fields = await why(late)
        assert words.endswith("; CRITICAL goes first (1 of it here)")
        assert (fields["critical_ahead"], fields["ahead"]) == (1, 1)
        await front.register(name, worker.url)
        await worker.until(lambda: len(worker.received) == 1)
        words, fields = await why(late)
        assert fields["reason"] == "not_before"
        assert (fields["in_use"], fields["max_concurrent_tasks"]) == (1, 1)
        await front.register(name, worker.url, maximum=2)
        await worker.until(lambda: len(worker.received) == 2)
        await front.register(name, worker.url, maximum=3)
        words, fields = await why(late)
        assert words.startswith("next in line: it waits for another ")
        assert fields["reason"] == "not_before"
        assert fields["session_ceiling_s"] == 1800
        assert "s of 30 m" in words


async def test_depth_age_and_wait_are_measured(front: Door) -> None:
    name = fresh()
    pool = front.side.pool
    facts = [front.busy(name, word, priority=Priority(word)) for word in ("TASK", "INFO", "INFO", "CRITICAL")]
    for fact in facts:
        await front.keep(fact)
    await pool.execute(
        "UPDATE a2a_queue SET enqueued_at = now() - make_interval(hours => CASE lane WHEN 0 THEN 1 ELSE 2 END)"
    )

    def figure(metric: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"bide_queue_{metric}", labels) or 0.0

    async def shown(critical: int, task: int, info: int) -> None:
        async def is_shown() -> bool:
            found = [figure("depth", priority=each) for each in ("CRITICAL", "TASK", "INFO")]
            return found == [critical, task, info]

        await front.ask("snapshot")
        await until(is_shown)

    await shown(1, 1, 2)

    async def ages_shown() -> bool:
        ages = [figure("oldest_age_seconds", lane=lane) // 3600 for lane in ("critical", "rest")]
        return ages == [1, 2]

    await until(ages_shown)
    before = {word: figure("wait_seconds_count", priority=word) for word in ("CRITICAL", "TASK", "INFO")}
    sums = {word: figure("wait_seconds_sum", priority=word) for word in before}
    async with agent(name, work_s=0.01, behaviour={"preempted": 1}) as worker:
        await front.register(name, worker.url)
        await front.ended(*(fact.queue_id for fact in facts))
    counted = {word: figure("wait_seconds_count", priority=word) - before[word] for word in before}
    assert counted == {"CRITICAL": 1, "TASK": 1, "INFO": 2}, "its first delivery only, not what came back"
    hours = {word: (figure("wait_seconds_sum", priority=word) - sums[word]) // 3600 for word in before}
    assert hours == {"CRITICAL": 1, "TASK": 2, "INFO": 4}
    await shown(0, 0, 0)
    assert [figure("oldest_age_seconds", lane=lane) for lane in ("critical", "rest")] == [0, 0]
