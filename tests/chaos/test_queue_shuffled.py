"""Every fact three times and shuffled, over a real RabbitMQ: the queue ends where it would have ended in order."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.queue.answers import Answers
from services.queue.drain import Drain
from services.queue.handlers import Handlers
from shared.addresses import AddressRules
from shared.agents import Agents
from shared.facts import (
    Ended,
    Fact,
    MessageBusy,
    Priority,
    ProxyBeat,
    QueueQuery,
    Running,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from shared.telemetry import FACTS_READ
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, clean, replica
from tests.integration.queue_kit import digest, queue_settings

__all__ = ["clean"]

KINDS = (
    MessageBusy, WorkspaceHeartbeat, ProxyBeat, WorkspaceRegistered, WorkspaceChanged, WorkspaceRemoved, QueueQuery,
)  # fmt: skip
EMPTY = (
    "TRUNCATE a2a_queue, a2a_finished, idempotency_keys, workspaces, workspace_ids, replicas, "
    "outbox, inbox, dead_letters"
)
NAMES = [f"shuffled-{number}" for number in range(6)]
START = datetime.now(UTC) - timedelta(seconds=5)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


# ── a history ────────────────────────────────────────────────────────────────────────────────────────────────────────


def registry(name: str, number: int) -> list[Fact]:
    """Two lives; some are changed, paused, removed, or come back."""
    lives = [
        WorkspaceRegistered(
            workspace_id=name, rev=1, incarnation=1, url="http://one.example", max_concurrent_tasks=3,
            heartbeat_interval_s=7, settings={"give_up_after_s": 500},
        ),
        WorkspaceChanged(
            workspace_id=name, rev=2, incarnation=1, url="http://one.example", paused=True,
            settings={"delivery": "at_most_once"},
        ),
        WorkspaceRegistered(
            workspace_id=name, rev=3, incarnation=2, url="http://two.example", max_concurrent_tasks=2,
            settings={"session_ceiling_s": 60},
        ),
        WorkspaceRemoved(workspace_id=name, rev=4),
        WorkspaceRegistered(workspace_id=name, rev=5, incarnation=3, url="http://3.example", agent_authorization="x"),
    ]  # fmt: skip
    return [*lives[: 1 + number % len(lives)]]


def beats(name: str, lives: int) -> list[Fact]:
    """Each life beats twice; the first beat of a life comes through a proxy whose clock is behind."""
    found: list[Fact] = []
    for life in range(1, lives + 1):
        for seconds in (life * 1.0 - 0.9, life * 1.0):
            moment = at(seconds if life != 2 else seconds - 1.05)
            found.append(
                WorkspaceHeartbeat(
                    workspace_id=name, rev=int(moment.timestamp() * 1e6), occurred_at=moment, incarnation=life,
                    active_tasks=life % 3, cadence_s=10.0 + seconds,
                )
            )  # fmt: skip
    return found


def forwards(name: str, chance: random.Random) -> list[ProxyBeat]:
    """Two proxies tell four times each of their live forwards; the last word of one is that there are none."""
    found = []
    for proxy in ("p", "q"):
        for rev in range(1, 5):
            some = chance.randint(1, 3) if (proxy, rev) != ("p", 4) else 0
            running = [Running(session_id=f"{proxy}{rev}{n}", started_at=at(rev)) for n in range(some)]
            ended = [
                Ended(session_id=f"e{rev}{n}", outcome="answered", started_at=at(0), ended_at=at(rev / 2))
                for n in range(some - 1)
            ]
            found.append(
                ProxyBeat(
                    workspace_id=name, rev=rev, proxy_id=proxy, occurred_at=at(rev), forwards=running, ended=ended
                )
            )
    return found


def message(name: str, key: str, chance: random.Random, **changes: Any) -> MessageBusy:
    values: dict[str, Any] = {
        "workspace_id": name,
        "rev": 1,
        "queue_id": uuid7(),
        "caller_id": "c",
        "caller_hash": digest("c"),
        "key_hash": digest(key),
        "body_hash": digest(key[:1]),
        "reason": "backlog",
        "priority": chance.choice(list(Priority)),
        "method": "message/send",
        "body": b"{}",
        "explicit_key": key.startswith("e"),
        "expires_at": at(3600) if chance.random() < 0.3 else None,
    }
    return MessageBusy(**{**values, **changes})


def messages(name: str, chance: random.Random) -> list[MessageBusy]:
    """Some alone; some sent again under the id they were told; some again under the same key and another id."""
    alone = [message(name, f"m{number}", chance) for number in range(6)]
    again = [each.model_copy(update={"fact_id": uuid7()}) for each in alone[:2]]
    twice = [message(name, key, chance) for key in ("k", "k", "k", "e", "e")]
    told = [each.model_copy(update={"beat": beat}) for each, beat in zip(alone, forwards(name, chance), strict=False)]
    return [*told, *again, *twice]


def history(chance: random.Random) -> list[Fact]:
    facts: list[Fact] = []
    for number, name in enumerate(NAMES):
        said = registry(name, number)
        lives = max(getattr(fact, "incarnation", 0) for fact in said)
        facts += [*said, *beats(name, lives), *messages(name, chance)]
        # What it said with its messages is said again by itself, and more.
        told = [
            fact.beat for fact in facts if isinstance(fact, MessageBusy) and fact.beat and fact.workspace_id == name
        ]
        facts += told
    return facts


def cancels(facts: Sequence[Fact]) -> list[Fact]:
    """One message of each workspace is withdrawn by its caller, and one by somebody who may not."""
    found: list[Fact] = []
    for name in NAMES:
        ids = [fact.queue_id for fact in facts if isinstance(fact, MessageBusy) and fact.workspace_id == name]
        for queue_id, caller in ((ids[2], "c"), (ids[3], "other")):
            found.append(
                QueueQuery(
                    workspace_id="-", rev=1, query_id=uuid7(), verb="cancel", queue_id=queue_id,
                    caller_hash=digest(caller), expires_at=datetime.now(UTC) + timedelta(seconds=3600), reply_to="door",
                )
            )  # fmt: skip
    return found


# ── the queue's readers ──────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def readers(stack: Stack) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two replicas that compete for every fact and deliver nothing."""
    agents = Agents(AddressRules())
    async with replica(stack) as one, replica(stack) as two:
        for each in (one, two):
            settings = queue_settings(stack)
            drain = Drain(settings, each.pool, each.publisher, agents)
            handlers = Handlers(settings, each.publisher, drain)
            each.reader.store(MessageBusy, handlers.message_busy)
            each.reader.store(WorkspaceHeartbeat, handlers.heartbeats)
            each.reader.store(ProxyBeat, handlers.proxy_beats)
            each.reader.store(WorkspaceRegistered, handlers.registered)
            each.reader.store(WorkspaceChanged, handlers.registered)
            each.reader.store(WorkspaceRemoved, handlers.removed)
            each.reader.store(QueueQuery, Answers(each.publisher, drain).query)
            await each.reader.start()
        yield one, two
    await agents.close()


def facts_read() -> float:
    labels = [(kind.__name__, outcome) for kind in KINDS for outcome in ("applied", "duplicate")]
    return float(sum(FACTS_READ.labels(*each)._value.get() for each in labels))


async def tell(side: Replica, facts: Sequence[Fact]) -> None:
    """Publish at once what may leave in one batch; come back when all of it has been read."""
    before = facts_read()
    await asyncio.gather(*(side.publisher.publish(fact) for fact in facts))

    async def read() -> bool:
        return facts_read() >= before + len(facts)

    await until(read, within_s=120)


async def state(side: Replica) -> dict[str, object]:
    """What must not depend on order. Which of two with one key became the item may; that there is one may not."""
    workspaces = await side.pool.fetch("SELECT * FROM workspaces ORDER BY workspace_id")
    items = await side.pool.fetch("SELECT *, NULL AS superseded_by FROM a2a_queue")
    finished = await side.pool.fetch("SELECT * FROM a2a_finished")
    told = await side.pool.fetch("SELECT convert_from(fact, 'UTF8')::jsonb AS fact FROM outbox")
    registry = ("registry_rev", "removed", "waiting", "running")
    settings = (
        "url", "agent_authorization", "max_concurrent", "at_most_once", "give_up_after_s", "ceiling_s", "paused",
        "incarnation", "beat_rev", "beat_at", "beat_active", "beat_cadence_s", "not_before", "busy_streak",
    )  # fmt: skip
    contested = Counter[tuple[str, bytes]]()
    for row in [*items, *finished]:
        contested[row["workspace_id"], row["key_hash"]] += 1
    alone: dict[UUID, tuple[object, ...]] = {}
    shared: Counter[tuple[object, ...]] = Counter()
    for row in [*items, *finished]:
        key = (row["workspace_id"], row["key_hash"])
        if contested[key] > 1:
            shared[*key, row["status"]] += 1
        else:
            place = (
                row.get("lane"),
                row.get("rank_ms"),
                row.get("expires_at") is not None,  # when: a pause gave back as long as it was known here
                row.get("cancel_at"),
                row.get("reason"),
            )
            alone[row["queue_id"]] = (*key, row["body_hash"], row["priority"], row["status"], *place)
    return {
        "registry": [tuple(row[name] for name in registry) for row in workspaces],
        # Of one that was removed, nothing else is promised: an older word may have come or not.
        "settings": [tuple(row[name] for name in settings) for row in workspaces if not row["removed"]],
        "forwards": [row["forwards"] for row in workspaces],
        "items": alone,
        "contested": shared,
        "told": len(told),
        "inbox": await side.pool.fetchval("SELECT count(*) FROM inbox"),
        "aside": await side.pool.fetchval("SELECT count(*) FROM dead_letters"),
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_fact_three_times_and_shuffled_ends_as_once_and_in_order(clean: Stack, seed: int) -> None:
    """3-bus rules 2 and 5, D-S25: nothing relies on order between batches, queues or replicas."""
    chance = random.Random(seed)
    facts = history(chance)
    withdrawn = cancels(facts)
    async with readers(clean) as (one, two):
        await one.pool.execute(EMPTY)
        for fact in [*facts, *withdrawn]:
            await tell(one, [fact])
        in_order = await state(one)
        await one.pool.execute(EMPTY)
        # A cancel is sent by who was told of its item: it comes after that, but before what is delivered again.
        for part in ([*facts, *facts], [*withdrawn, *withdrawn, *withdrawn], facts):
            shuffled = list(part)
            chance.shuffle(shuffled)
            while shuffled:
                size = chance.randint(1, 60)
                batch, shuffled = shuffled[:size], shuffled[size:]
                await tell(chance.choice((one, two)), batch)
        assert await state(one) == in_order
    print(
        f"seed {seed}: {len(facts)} facts and {len(withdrawn)} cancels, three times each: {in_order['told']} ends told"
    )
    assert in_order["aside"] == 0
