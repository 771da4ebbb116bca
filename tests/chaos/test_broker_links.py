"""Connections to RabbitMQ that break, fall silent or lose an answer, and queues that an operator deletes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from bide_agent.agent import Agent
from deploy.local.servers import Servers
from shared import topology
from shared.facts import MessageBusy, SessionStop
from tests.chaos.conftest import LONG, away_s
from tests.chaos.kit.broker import more_runs, operator, outage, refusal, unwell, well
from tests.chaos.kit.processes import Process, Ring, ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack, until
from tests.e2e.conftest import BUSY_S, ENDED, Caller, Reply
from tests.integration.calendar_kit import free
from tests.integration.conftest import make_clean, replica, stop, write_effects

RING = ("proxy-1", "proxy-2", "queue-1", "queue-2")


@asynccontextmanager
async def _fault(services: Ring, what: str, whom: str) -> AsyncIterator[None]:
    begun_at = time.monotonic()
    try:
        yield
    finally:
        services.note(what, whom, begun_at)


async def _books(services: Ring, load: Storm) -> None:
    """Everything flows again, and nothing was delivered twice."""
    await load.more(20)
    await well(services)
    account = await load.account(within_s=240)
    account.check()
    assert account.duplicates == []
    assert account.overlaps() == 0


@pytest.mark.timeout(600)
async def test_connections_reset_again_and_again_duplicate_nothing(faulty: Stack) -> None:
    """B-25, B-30: what was read and not acknowledged comes again, and has no second effect."""
    async with ring(faulty, *RING) as services, storm(services, agents=6) as load:
        load.begin(load.agents)
        for _ in range(30 if LONG else 6):
            await load.more(8)
            async with _fault(services, "reset", "rabbitmq"):
                for link in services.links("rabbitmq"):
                    link.reset()
        await _books(services, load)


async def test_all_processes_come_back_and_declare_the_topology_once_each(faulty: Stack) -> None:
    """B-31: after one reset of every link nobody reconnects twice, and nobody declares twice."""
    async with ring(faulty, *RING) as services, storm(services, agents=4) as load:
        load.begin(load.agents)
        await load.more(10)
        before = {name: _declared(process) for name, process in services.processes.items()}
        async with _fault(services, "reset", "rabbitmq"):
            for link in services.links("rabbitmq"):
                link.reset()

        async def all_declared() -> bool:
            return all(_declared(process) > before[name] for name, process in services.processes.items())

        await until(all_declared)
        await _books(services, load)
        again = {name: _declared(process) - before[name] for name, process in services.processes.items()}
        print(f"topology declared again: {again}")
        assert set(again.values()) == {1}


def _declared(process: Process) -> int:
    return process.logged("topology_declared")


@pytest.mark.timeout(600)
async def test_a_silent_network_is_noticed_and_survived(faulty: Stack) -> None:
    """B-25: a black hole before a proxy and a half-open connection of a queue service, longer than two heartbeats."""
    async with ring(faulty, *RING) as services, storm(services, agents=6) as load:
        load.begin(load.agents)
        await load.more(20)
        async with _fault(services, "black hole", "rabbitmq"):
            services["proxy-2"].rabbitmq.hold()
            services["queue-2"].rabbitmq.hold("up")
            await more_runs(load, 40)
            await asyncio.sleep(away_s(25))  # the silence itself: RabbitMQ gives a connection up after 20 s of it
            await more_runs(load, 40)
            services["proxy-2"].rabbitmq.release()
            services["queue-2"].rabbitmq.release()
        await _books(services, load)


# ── a confirm that is lost ───────────────────────────────────────────────────────────────────────────────────────────


async def _told_unknown(services: Ring, caller: Caller, agent: Agent, text: str, key: str) -> str:
    """Send a message whose confirm does not come back; return the X-Queue-Id that its caller is told.

    Behind another one that waits for its confirm it is refused: it never left, and is sent again.
    """
    lost = services["proxy-1"].rabbitmq
    async with _fault(services, "confirm lost", "proxy-1"):
        lost.hold("down")
        while refusal(reply := await caller.send(agent.workspace, text, key=key, prefer="wait=0")) == "not_kept":
            pass
        lost.reset()
        lost.release()
    return reply.headers["x-queue-id"]


async def _ended(caller: Caller, queue_id: str) -> None:
    """Come back when the second proxy says that the item has ended."""

    async def has_ended() -> bool:
        reply = await caller.call("GET", f"/queue/{queue_id}", proxy=1)
        return reply.status == 200 and reply.json["status"] in ENDED

    await until(has_ended)


def _runs(agent: Agent, key: str) -> int:
    return sum(each.message_id == key for each in agent.received)


async def test_a_retry_after_a_lost_confirm_is_the_same_item(faulty: Stack) -> None:
    """B-28: the publish arrived and its confirm did not; the retry comes through another proxy while it waits."""
    async with ring(faulty, "proxy-1", "proxy-2", "queue-1") as services, storm(services, agents=4) as load:
        agent = await load.agent(work_s=BUSY_S, heartbeat_s=5.0)
        load.begin(load.agents[:-1])
        await load.more(10)
        caller, key = load.caller("told-unknown"), str(uuid4())
        occupied = await load.send(agent, "occupied", prefer="wait=0")
        await agent.until(lambda: agent.active == 1)
        queue_id = await _told_unknown(services, caller, agent, "kept once", key)
        retry = await caller.send(agent.workspace, "kept once", key=key, proxy=1, prefer="wait=0", x_queue_id=queue_id)
        assert retry.status == 202, retry.body
        assert retry.json["queue_id"] == queue_id
        assert _runs(agent, key) == 0
        agent.behave(work_s=0.1)
        free(agent)
        await _ended(caller, queue_id)
        await _books(services, load)
        assert occupied.promised
        assert _runs(agent, key) == 1


async def test_a_retry_after_a_lost_confirm_gets_the_answer_of_what_has_ended(faulty: Stack) -> None:
    """B-28: the message was delivered and answered before its caller came back: it is not executed again."""
    async with ring(faulty, "proxy-1", "proxy-2", "queue-1") as services, storm(services, agents=4) as load:
        agent = await load.agent()
        load.begin(load.agents[:-1])
        await load.more(10)
        caller, key = load.caller("told-unknown"), str(uuid4())
        queue_id = await _told_unknown(services, caller, agent, "executed once", key)
        await _ended(caller, queue_id)
        retry = await caller.send(
            agent.workspace, "executed once", key=key, proxy=1, prefer="wait=20", x_queue_id=queue_id
        )
        assert retry.status == 200, retry.body
        assert "result" in retry.json, retry.body
        assert retry.headers["x-queue-id"] == queue_id
        at_once = await caller.send(
            agent.workspace, "executed once", key=key, proxy=1, prefer="wait=0", x_queue_id=queue_id
        )
        assert _says_same(at_once, queue_id), at_once.body
        await _books(services, load)
        assert _runs(agent, key) == 1


def _says_same(reply: Reply, queue_id: str) -> bool:
    return reply.headers.get("x-queue-id") == queue_id or bool(reply.json.get("queue_id") == queue_id)


# ── queues that are deleted ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(600)
async def test_a_deleted_queue_is_declared_again_and_read_again(faulty: Stack) -> None:
    """B-26: RabbitMQ cancels the consumers of every queue, those of all replicas and each proxy's own."""
    async with ring(faulty, *RING) as services, storm(services, agents=6) as load:
        for lost in ([_shared(MessageBusy)], _everything(services)):
            load.begin(load.agents)
            await load.more(10)
            account = await load.account()  # empty queues: what is in a deleted one is lost by the operator's own hand
            account.check()
            async with _fault(services, "deleted queues", "rabbitmq"), operator(faulty) as channel:
                for name in lost:
                    await channel.queue_delete(name)
            print(f"deleted: {len(lost)}")
        load.begin(load.agents)
        await _books(services, load)
        asking = load.caller("asking")
        for proxy in range(2):
            await until(lambda proxy=proxy: _is_listed(asking, load.agents[0], proxy))  # type: ignore[misc]


@pytest.mark.timeout(600)
async def test_a_broker_that_lost_all_its_data_is_filled_again(faulty: Stack, own_servers: Servers) -> None:
    """B-26: the vhost is gone and comes back empty; every process declares what it needs, and none is restarted."""
    broker = own_servers.rabbitmq
    name = faulty.amqp_url.rpartition("/")[2]
    async with ring(faulty, *RING) as services, storm(services, agents=4) as load:
        load.begin(load.agents)
        await load.more(10)
        account = await load.account()
        account.check()
        async with outage(services, "lost data", lambda: broker.control(["delete_vhost", name]), lambda: None):
            await unwell(services)
            await asyncio.to_thread(broker.vhost, name)
        await well(services)
        load.begin(load.agents)
        await _books(services, load)


def _shared(fact: type[MessageBusy]) -> str:
    return topology.route(fact, "queue").queue("")


def _everything(services: Ring) -> list[str]:
    """Every queue that there is: the shared ones, and each proxy's own."""
    shared = {route.queue("") for route in topology.ROUTES if route.kind is not topology.Kind.REPLICA}
    own = {
        route.queue(_replica_id(process))
        for process in services.of("proxy")
        for route in topology.ROUTES
        if route.kind is topology.Kind.REPLICA
    }
    return [*sorted(shared | own), topology.DEAD_QUEUE]


def _replica_id(process: Process) -> str:
    for line in process.log.read_text().splitlines():
        if line.startswith("{") and '"replica"' in line:
            return str(json.loads(line)["replica"])
    raise AssertionError(process.tail())


async def _is_listed(caller: Caller, agent: Agent, proxy: int) -> bool:
    """A question to the queue service, which is answered to the proxy's own queue."""
    reply = await caller.call("GET", f"/workspaces/{agent.workspace}/queue", proxy=proxy)
    return reply.status == 200


async def test_a_connection_that_breaks_while_a_consumer_comes_back_is_made_again(faulty: Stack) -> None:
    """B-25, B-26: the driver would wait for itself for ever, as two of some eighty did that lost their vhost."""
    await make_clean(faulty)
    async with replica(faulty) as one:
        one.reader.store(SessionStop, write_effects)
        await one.reader.start()
        connection: Any = await one.reader.broker.connect()
        # The moment itself: a consumer is to come back, and the connection is lost before that has begun.
        connection.connected.clear()
        connection._request_recovery()

        async def is_taken_up() -> bool:
            return not connection._RobustConnection__restore_event.is_set()

        await until(is_taken_up)
        await connection.transport.connection.close(ConnectionResetError("the node stops"))
        await one.publisher.publish(stop("after"))

        async def is_read() -> bool:
            return await one.effects() == ["after"]

        await until(is_read)
        await one.reader.probe()
