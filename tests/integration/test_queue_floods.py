"""Floods of one priority: what they may do to the others is written in policies §3, and no more than that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.queue import store
from services.queue.backlogs import read_backlogs
from services.queue.deliver import Ending
from services.queue.handlers import Handlers
from shared.database import Connection
from shared.facts import MessageBusy, Priority, WorkspaceBacklog
from tests.conftest import Stack
from tests.integration import claim_kit
from tests.integration.claim_kit import Bench
from tests.integration.queue_kit import digest

LIMIT = timedelta(seconds=1800)


@pytest.fixture
async def bench(stack: Stack) -> AsyncIterator[Bench]:
    async with claim_kit.bench(stack) as made:
        await claim_kit.empty(made.pool)
        yield made
        await claim_kit.empty(made.pool)


async def put(bench: Bench, connection: Connection, priority: Priority, count: int, *, ago_s: float = 0) -> list[UUID]:
    """Keep messages that came so long ago, one per millisecond."""
    handlers = Handlers(bench.drain._settings, bench.drain._publisher, bench.drain)
    before_ms = int(ago_s * 1000)
    facts = [_message(priority, back_ms=before_ms + count - number) for number in range(count)]
    for fact in facts:
        async with connection.transaction():
            await handlers.message_busy(connection, [fact])
    ids = [fact.queue_id for fact in facts]
    await connection.execute(
        "UPDATE a2a_queue SET enqueued_at = now() - make_interval(secs => $2) WHERE queue_id = ANY($1)", ids, ago_s
    )
    return ids


def _message(priority: Priority, *, back_ms: int) -> MessageBusy:
    queue_id, fact_id = (UUID(int=uuid7().int - (back_ms << 80)) for _ in range(2))
    return MessageBusy(
        fact_id=fact_id, workspace_id="w", rev=1, queue_id=queue_id, caller_id="c", caller_hash=digest("c"),
        priority=priority, key_hash=digest(str(queue_id)), body_hash=digest("b"), reason="backlog",
        method="message/send", body=b"{}",
    )  # fmt: skip


async def serve(bench: Bench, connection: Connection, turns: int, now: datetime | None = None) -> list[UUID]:
    """One delivery after the other; the order of them."""
    endings: Sequence[Ending] = ()
    served: list[UUID] = []
    for _ in range(turns):
        turn = await bench.turn(connection, "w", endings, now=now)
        served += [item.queue_id for item in turn.items]
        endings = [Ending(item, "delivered", b"{}") for item in turn.items]
    await bench.turn(connection, "w", endings, room=0, now=now)
    return served


async def test_a_critical_flood_leaves_every_second_turn_to_what_has_waited_too_long(bench: Bench) -> None:
    """Ten TASK from before the limit, five that are not: CRITICAL keeps coming, and the ten are out in twenty turns."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        starving = await put(bench, connection, Priority.TASK, 10, ago_s=LIMIT.total_seconds() + 60)
        patient = await put(bench, connection, Priority.TASK, 5)
        critical: list[UUID] = []
        served: list[UUID] = []
        for _ in range(6):  # the flood is never over
            critical += await put(bench, connection, Priority.CRITICAL, 5)
            served += await serve(bench, connection, 5)
        assert [each for each in served if each in critical] == critical[: len(served) - 10], "CRITICAL keeps its order"
        assert [each for each in served if each in starving] == starving
        assert served.index(starving[-1]) == 19, "every second turn was theirs"
        assert not set(patient) & set(served), "and nobody else's"


async def test_an_info_flood_lets_every_task_pass(bench: Bench) -> None:
    """A-Q-16: a thousand INFO wait already; what a TASK waits for is the TASK messages before it, as without them."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        flood = await put(bench, connection, Priority.INFO, 300)
        tasks = await put(bench, connection, Priority.TASK, 20)
        assert await serve(bench, connection, 20) == tasks
        assert await serve(bench, connection, 5) == flood[:5]


async def test_info_that_has_had_patience_goes_before_newer_tasks(bench: Bench) -> None:
    """Ageing: two minutes are what TASK is ahead, and not more, however many come."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        old = await put(bench, connection, Priority.INFO, 3, ago_s=121)
        older_task = await put(bench, connection, Priority.TASK, 1, ago_s=2)
        young = await put(bench, connection, Priority.INFO, 1, ago_s=100)
        newer = await put(bench, connection, Priority.TASK, 3)
        first, *rest = older_task, newer
        assert await serve(bench, connection, 8) == [*first, *old, *rest[0], *young]


async def test_a_flood_in_one_workspace_is_none_in_another(bench: Bench) -> None:
    """B-34: another's line is not longer for it, and its claim touches as few buffers."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "calm", 50)
        await bench.cycles(connection, "calm", 8)
        await claim_kit.load(connection, "flooded", 10_000, after=1_000)
        turn, beside = await bench.claim(connection, "calm")
        assert [item.workspace_id for item in turn.items] == ["calm"]
        assert beside <= 34, "as many as a turn touches anyway"


async def told(connection: Connection) -> WorkspaceBacklog:
    workspaces = await store.read(connection, ["w"])
    (backlog,) = await read_backlogs(connection, workspaces, datetime.now(UTC).timestamp())
    return backlog


async def test_since_when_critical_waits_is_told(bench: Bench) -> None:
    """What a session is pre-empted by: since when the first CRITICAL waits; null once none does."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        await put(bench, connection, Priority.TASK, 1)
        assert (await told(connection)).critical_waiting_since is None
        await put(bench, connection, Priority.CRITICAL, 1, ago_s=70)
        await put(bench, connection, Priority.CRITICAL, 1)
        waits = await told(connection)
        assert waits.critical_waiting_since is not None
        age = datetime.now(UTC) - waits.critical_waiting_since
        assert timedelta(seconds=70) <= age < timedelta(seconds=100)
        assert waits.waiting_by_priority == {Priority.CRITICAL: 2, Priority.TASK: 1}
        await serve(bench, connection, 2)
        assert (await told(connection)).critical_waiting_since is None


async def test_critical_that_is_to_wait_pre_empts_nobody(bench: Bench) -> None:
    """Since when CRITICAL waits is said of what could go: not of one whose own time has not come."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        (later,) = await put(bench, connection, Priority.CRITICAL, 1, ago_s=70)
        at = "UPDATE a2a_queue SET not_before = now() + make_interval(secs => $2) WHERE queue_id = $1"
        await connection.execute(at, later, 3600.0)
        assert (await told(connection)).critical_waiting_since is None
        await put(bench, connection, Priority.CRITICAL, 1, ago_s=20)
        since = (await told(connection)).critical_waiting_since
        assert since is not None
        assert timedelta(seconds=20) <= datetime.now(UTC) - since < timedelta(seconds=60), "the one that may go"
        await connection.execute(at, later, -1.0)
        since = (await told(connection)).critical_waiting_since
        assert since is not None
        assert datetime.now(UTC) - since >= timedelta(seconds=70), "its time has come"


@pytest.mark.parametrize("critical", [False, True], ids=["the rest", "both lanes"])
@pytest.mark.parametrize(
    ("left_s", "goes"), [(-0.01, False), (0.0, False), (0.01, True)], ids=["past", "at its end", "in time"]
)
async def test_what_is_past_its_time_is_not_delivered(
    bench: Bench, left_s: float, *, goes: bool, critical: bool
) -> None:
    """A-Q-16: the sweep that ends it may come seconds later; nobody is to be fed with it meanwhile."""
    async with bench.pool.acquire() as connection:
        await claim_kit.load(connection, "w", 0)
        (stale,) = await put(bench, connection, Priority.INFO, 1)
        (task,) = await put(bench, connection, Priority.TASK, 1)
        urgent = await put(bench, connection, Priority.CRITICAL, 1) if critical else []
        now = datetime.now(UTC)
        ends = "UPDATE a2a_queue SET expires_at = $2 WHERE queue_id = $1"
        await connection.execute(ends, stale, now + timedelta(seconds=left_s))
        assert await serve(bench, connection, 3, now) == [*urgent, task, *([stale] if goes else [])]
