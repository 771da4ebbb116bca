"""The bus on the real servers: each fact in effect once, one bad fact alone set aside, group commit, no silent loss."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from uuid import UUID

import aio_pika
import pytest
from prometheus_client import REGISTRY

from shared import topology
from shared.batches import encode, encode_batch
from shared.broker import NotPublished, Publisher, PublishUnknown, open_publisher
from shared.database import Connection
from shared.facts import (
    ItemChanged,
    ItemKept,
    ItemStatus,
    MessageBusy,
    SessionGate,
    SessionStop,
    WorkspaceHeartbeat,
    routing_key,
)
from shared.topology import Kind, Route
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, gate, replica, stop, write_effects


def three_times(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch of `publisher` be delivered three times."""
    once: Callable[..., Awaitable[None]] = publisher._publish

    async def thrice(*arguments: Any) -> None:
        for _ in range(3):
            await once(*arguments)

    monkeypatch.setattr(publisher, "_publish", thrice)


async def test_every_fact_takes_effect_once_however_often_its_batch_is_delivered(
    clean: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 facts from 50 tasks, each batch three times, two replicas that compete."""
    async with replica(clean) as one, replica(clean) as two:
        for each in (one, two):
            each.reader.store(SessionStop, write_effects)
            await each.reader.start()
        three_times(one.publisher, monkeypatch)

        async def task(number: int) -> None:
            await asyncio.gather(*(one.publisher.publish(stop(f"{number}-{i}")) for i in range(20)))

        await asyncio.gather(*(task(number) for number in range(50)))
        await until(lambda: _at_least(one, 1000))
        await until(lambda: _empty(clean))
        await two.reader.stop()
        await one.reader.stop()
        assert await one.effects() == sorted(f"{number}-{i}" for number in range(50) for i in range(20))
        assert await one.dead_letters() == []


async def test_only_the_bad_facts_of_a_batch_are_set_aside(clean: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 300: one that is no SessionStop, one with NUL in a key; one of 3 MiB is large, not bad. Each thrice."""
    good = [stop(f"s{i:03}") for i in range(297)]
    nul = stop("nul\0key")
    large = stop("large", reason="x" * (3 << 20))
    async with replica(clean) as one:
        one.reader.store(SessionStop, write_effects)
        await one.reader.start()
        three_times(one.publisher, monkeypatch)
        posted = [one.publisher.post(fact) for fact in [*good[:100], nul, *good[100:200], large, *good[200:]]]
        posted.insert(50, one.publisher.post_encoded(SessionStop, b'{"workspace_id":"w1","rev":1}'))
        await asyncio.gather(*posted)
        await until(lambda: _empty(clean))
        await one.reader.stop()
        assert await one.effects() == sorted([fact.session_id for fact in good] + ["large"])
        reasons = [reason for reason, _ in await one.dead_letters()]
        assert sorted(reasons) == ["invalid", "unstorable"]


async def test_a_handler_that_breaks_on_one_fact_keeps_the_others(clean: Stack) -> None:
    """B-14, A-Q-08: a bug in a handler costs the fact that met it, visibly, and no loop."""

    async def broken(connection: Connection, facts: Sequence[SessionStop]) -> None:
        if any(fact.session_id == "bug" for fact in facts):
            raise KeyError("a bug")
        await write_effects(connection, facts)

    async with replica(clean) as one:
        one.reader.store(SessionStop, broken)
        await one.reader.start()
        await asyncio.gather(*(one.publisher.publish(stop(name)) for name in ("a", "bug", "b")))
        await until(lambda: _empty(clean))
        await one.reader.stop()
        assert await one.effects() == ["a", "b"]
        assert await one.dead_letters() == [("handler_error", "KeyError: 'a bug'")]


async def test_what_a_handler_wants_told_is_told_after_its_commit(clean: Stack) -> None:
    told: asyncio.Queue[list[str]] = asyncio.Queue()
    async with replica(clean) as one:

        async def handle(connection: Connection, facts: Sequence[SessionStop]) -> Callable[[], None]:
            await write_effects(connection, facts)
            return lambda: told.put_nowait([fact.session_id for fact in facts])

        one.reader.store(SessionStop, handle)
        await one.reader.start()
        await one.publisher.publish(stop("a"))
        assert await asyncio.wait_for(told.get(), 10) == ["a"]
        assert await one.effects() == ["a"]


async def test_a_tell_that_raises_blocks_nothing(clean: Stack) -> None:
    """The batch has committed: nine of them, more than the prefetch, and the next one is read all the same."""

    def broken() -> None:
        raise KeyError("a bug")

    async def handle(connection: Connection, facts: Sequence[SessionStop]) -> Callable[[], None]:
        await write_effects(connection, facts)
        return broken

    async with replica(clean) as one:
        one.reader.store(SessionStop, handle)
        await one.reader.start()
        for number in range(9):
            await one.publisher.publish(stop(str(number)))
            await until(lambda number=number: _has(one, [str(i) for i in range(number + 1)]))  # type: ignore[misc]


async def test_a_queue_that_is_deleted_under_its_reader_is_read_on(clean: Stack) -> None:
    """B-26."""
    async with replica(clean) as one, _channel(clean) as channel:
        one.reader.store(SessionGate, write_effects)
        await one.reader.start()
        await one.publisher.publish(gate("before"))
        await until(lambda: _has(one, ["before"]))
        await channel.queue_delete("queue.session.gate")

        async def published() -> bool:
            try:
                await one.publisher.publish(gate("after"))
            except NotPublished:  # nobody has made the queue again yet
                return False
            return True

        await until(published)
        await until(lambda: _has(one, ["after", "before"]))


async def test_what_the_broker_gave_up_on_is_kept(clean: Stack) -> None:
    """B-29: the delivery limit is a million, and what reaches it all the same is not lost."""
    async with replica(clean) as one, _channel(clean) as channel:
        one.reader.store_undeliverable()
        await one.reader.start()
        await channel.default_exchange.publish(aio_pika.Message(b"[given up]"), topology.DEAD_QUEUE)

        async def kept() -> bool:
            return [reason for reason, _ in await one.dead_letters()] == ["undeliverable"]

        await until(kept)


async def test_a_publish_that_the_driver_refuses_is_told(clean: Stack) -> None:
    async with open_publisher(clean.settings()) as publisher:
        kept = ItemKept(workspace_id="w", rev=1, queue_id=stop("x").fact_id, depth=1, position=1)
        with pytest.raises(PublishUnknown, match="ValueError"):
            await asyncio.wait_for(publisher.publish(kept, to="x" * 300), 5)


async def test_what_waits_leaves_together(clean: Stack) -> None:
    """Group commit: a thousand facts posted at once are a handful of messages of at most 256."""
    async with replica(clean) as one:
        await asyncio.gather(*(one.publisher.publish(stop(str(i))) for i in range(1000)))
        assert await depth(clean, "queue.session.stop") == 4


async def test_a_batch_stays_below_a_mebibyte_unless_one_fact_is_larger(clean: Stack) -> None:
    async with replica(clean) as one:
        sizes = [300_000] * 6 + [3 << 20] + [300_000] * 3
        await asyncio.gather(*(one.publisher.publish(stop(str(i), reason="x" * n)) for i, n in enumerate(sizes)))
        bodies = [len(message.body) for message in await take(clean, "queue.session.stop", 5)]
        assert len(bodies) == 4
        assert sum(size > 1 << 20 for size in bodies) == 1


async def test_only_what_nobody_says_again_is_written_to_disk(clean: Stack) -> None:
    """`persist=False` is the library's default and once lost 100 of 100 messages on a broker kill."""
    async with replica(clean) as one:
        await one.publisher.publish(stop("kept"))
        beat = WorkspaceHeartbeat(workspace_id="w1", rev=1, incarnation=1, active_tasks=0)
        await one.publisher.publish(beat)
        (kept,) = await take(clean, "queue.session.stop", 1)
        (perishable,) = await take(clean, "queue.workspace.heartbeat", 1)
        assert kept.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
        assert perishable.delivery_mode == aio_pika.DeliveryMode.NOT_PERSISTENT


async def test_a_fact_without_a_queue_is_not_published(clean: Stack) -> None:
    """B-28: an unroutable publish returns quietly unless one asks."""
    async with replica(clean) as one, _channel(clean) as channel:
        await channel.queue_delete("queue.session.gate")
        with pytest.raises(NotPublished, match="refused"):
            await one.publisher.publish(gate("nowhere"))
        await topology.declare(channel)
        await one.publisher.publish(gate("somewhere"))


async def test_a_full_queue_is_not_published(clean: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of kept messages is limited: the broker says no, and nobody is promised anything."""
    small = Route(MessageBusy, "queue", Kind.QUORUM, bytes_max=20_000)
    monkeypatch.setattr(topology, "ROUTES", tuple(small if r.fact is MessageBusy else r for r in topology.ROUTES))
    async with _channel(clean) as channel:
        await channel.queue_delete("queue.message.busy")
    outcomes: list[BaseException | None] = []
    async with open_publisher(clean.settings()) as publisher:
        for _ in range(60):
            outcomes += await asyncio.gather(publisher.publish(busy(b"x" * 5000)), return_exceptions=True)
            if outcomes[-1] is not None:
                break
    assert outcomes[0] is None
    assert isinstance(outcomes[-1], NotPublished)
    async with _channel(clean) as channel:
        await channel.queue_delete("queue.message.busy")


async def test_a_reply_to_an_asker_who_is_gone_is_no_error(clean: Stack) -> None:
    async with open_publisher(clean.settings()) as publisher:
        kept = ItemKept(workspace_id="w", rev=1, queue_id=stop("x").fact_id, depth=1, position=1)
        await publisher.publish(kept, to="nobody.listens.here")


async def test_every_replica_hears_what_is_for_each_of_them(clean: Stack) -> None:
    heard: dict[str, asyncio.Queue[UUID]] = {"one": asyncio.Queue(), "two": asyncio.Queue()}
    async with AsyncExitStack() as exits:
        replicas = {name: await exits.enter_async_context(replica(clean, "proxy")) for name in heard}
        for name, each in replicas.items():

            async def hear(facts: Sequence[ItemChanged], name: str = name) -> None:
                for fact in facts:
                    heard[name].put_nowait(fact.queue_id)

            each.reader.hear(ItemChanged, hear)
            await each.reader.start()
        changed = ItemChanged(workspace_id="w", rev=1, queue_id=stop("x").fact_id, status=ItemStatus.COMPLETED)
        await replicas["one"].publisher.publish(changed)
        for queue in heard.values():
            assert await asyncio.wait_for(queue.get(), 10) == changed.queue_id


async def test_what_a_replica_said_itself_it_need_not_hear(clean: Stack) -> None:
    heard: dict[str, list[int]] = {"all": [], "others": []}

    async def hear(where: str, facts: Sequence[WorkspaceHeartbeat]) -> None:
        heard[where] += [fact.rev for fact in facts]

    async with replica(clean, "proxy") as one, replica(clean, "proxy") as two:
        one.reader.hear(WorkspaceHeartbeat, partial(hear, "others"), own=False)
        two.reader.hear(WorkspaceHeartbeat, partial(hear, "all"))
        await one.reader.start()
        await two.reader.start()
        for number, side in enumerate((one, two, one, two)):
            await side.publisher.publish(
                WorkspaceHeartbeat(workspace_id="w", rev=number + 1, incarnation=1, active_tasks=0)
            )

        async def both() -> bool:
            return (len(heard["all"]), len(heard["others"])) == (4, 2)

        await until(both)
        assert heard == {"all": [1, 2, 3, 4], "others": [2, 4]}


async def test_the_outcome_of_every_publish_is_counted(clean: Stack) -> None:
    def count() -> float:
        labels = {"fact": "SessionStop", "outcome": "confirmed"}
        return REGISTRY.get_sample_value("bide_facts_published_total", labels) or 0.0

    before = count()
    async with open_publisher(clean.settings()) as publisher:
        await asyncio.gather(*(publisher.publish(stop(str(i))) for i in range(10)))
    assert count() - before == 10


async def test_a_batch_from_elsewhere_is_read_like_our_own(clean: Stack) -> None:
    """Whoever writes the JSON array of the schema is understood: the contract is the bytes."""
    async with replica(clean) as one, _channel(clean) as channel:
        one.reader.store(SessionStop, write_effects)
        await one.reader.start()
        exchange = await channel.get_exchange(topology.EXCHANGE)
        await exchange.publish(aio_pika.Message(encode_batch([encode(stop("by hand"))])), routing_key(SessionStop))
        await until(lambda: _has(one, ["by hand"]))


async def _at_least(one: Replica, count: int) -> bool:
    return len(await one.effects()) >= count


async def _has(one: Replica, effects: list[str]) -> bool:
    return await one.effects() == effects


def busy(body: bytes) -> MessageBusy:
    digest = bytes(32)
    return MessageBusy(
        workspace_id="w", rev=1, queue_id=stop("x").fact_id, caller_id="c", caller_hash=digest, key_hash=digest,
        body_hash=digest, reason="backlog", method="message/send", body=body,
    )  # fmt: skip


def _channel(stack: Stack) -> Any:
    return _Channel(stack.amqp_url)


class _Channel:
    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> aio_pika.abc.AbstractChannel:
        self._connection = await aio_pika.connect(self._url)
        return await self._connection.channel()

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()


async def depth(stack: Stack, name: str) -> int:
    async with _channel(stack) as channel:
        queue = await channel.declare_queue(name, passive=True)
        return int(queue.declaration_result.message_count or 0)


async def take(stack: Stack, name: str, most: int) -> list[aio_pika.abc.AbstractIncomingMessage]:
    async with _channel(stack) as channel:
        queue = await channel.get_queue(name)
        taken: list[aio_pika.abc.AbstractIncomingMessage] = []
        while len(taken) < most and (message := await queue.get(fail=False, no_ack=True)):
            taken.append(message)
        return taken


async def _empty(stack: Stack) -> bool:
    return await depth(stack, "queue.session.stop") == 0
