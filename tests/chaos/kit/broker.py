"""What befalls RabbitMQ in a test, and what callers and agents must be spared meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import aio_pika
from aio_pika.abc import AbstractChannel

from bide_agent.agent import Agent
from deploy.local.services import probe_ready
from shared.agents import AgentError
from tests.chaos.kit.processes import Process, Ring
from tests.chaos.kit.storm import Storm
from tests.conftest import Stack, until
from tests.e2e.conftest import Reply

BOUND_S = 20.0
"""A caller who has not been answered by then was left hanging; the product's own bound is two confirms, 4 s."""
_PACE_S = 0.5


@dataclass(slots=True)
class Watch:
    """What was seen during an outage."""

    refusals: Counter[str] = field(default_factory=Counter)
    """Of single messages to an agent with a backlog, by code."""
    told: Counter[str] = field(default_factory=Counter)
    """Refusals that the storm's callers met on their way."""
    idle_answered: int = 0
    delivered: int = 0


@asynccontextmanager
async def outage(
    services: Ring, what: str, begin: Callable[[], object], end: Callable[[], object]
) -> AsyncIterator[None]:
    """RabbitMQ is in trouble for the length of the block."""
    begun_at = time.monotonic()
    await asyncio.to_thread(begin)
    try:
        yield
    finally:
        await asyncio.to_thread(end)
        services.note(what, "rabbitmq", begun_at)


async def fill(load: Storm, agent: Agent, count: int) -> None:
    """Let so many messages wait for this agent, each of another caller: their order is of no account."""
    texts = [f"backlog-{number:04}" for number in range(count)]
    await asyncio.gather(*(load.send(agent, text, caller=text, prefer="wait=0") for text in texts))


async def watch(load: Storm, *, busy: Agent, idle: Agent, for_s: float) -> Watch:
    """Look on for `for_s`: messages for `busy` are refused, `idle` answers, deliveries go on.

    Raises:
        AssertionError: an answer that is none of these, or none at all.
    """
    seen = Watch()
    before = len(busy.received)
    began = time.monotonic()
    proxies = len(load.ring.ready.proxies)
    number = 0
    while time.monotonic() < began + for_s:
        proxy = number % proxies
        number += 1
        reply, at_idle = await asyncio.gather(
            _ask(load, busy, proxy), load.send(idle, f"idle {number}", caller="one-at-a-time", proxy=proxy)
        )
        seen.refusals[refusal(reply)] += 1
        assert at_idle.answered, at_idle
        assert not at_idle.told, at_idle
        seen.idle_answered += 1
        await asyncio.sleep(_PACE_S)
    # On a slow machine the backlog's next turn may still be under way: it is waited for, within the outage.
    await busy.until(lambda: len(busy.received) > before, within_s=60)
    seen.delivered = len(busy.received) - before
    return seen


async def _ask(load: Storm, agent: Agent, proxy: int) -> Reply:
    async with asyncio.timeout(BOUND_S):
        return await load.caller("impatient").send(agent.workspace, "may it be kept?", proxy=proxy)


def refusal(reply: Reply) -> str:
    """The code of an answer that promises nothing, in all the forms that it must have."""
    assert reply.status == 503, (reply.status, reply.body)
    assert int(reply.headers["retry-after"]) > 0
    code = str(reply.json["error"]["data"]["code"])
    assert code in {"not_kept", "keep_unknown"}
    if code == "keep_unknown":
        assert reply.headers["x-queue-id"]
    return code


async def more_runs(load: Storm, count: int) -> None:
    """Come back when so many more messages have reached an agent, forwarded or delivered."""
    goal = load.runs() + count

    async def enough() -> bool:
        return load.runs() >= goal

    await until(enough, within_s=60)


@asynccontextmanager
async def operator(stack: Stack) -> AsyncIterator[AbstractChannel]:
    """A channel of somebody who looks after this vhost, past every link."""
    async with await aio_pika.connect(stack.amqp_url) as connection, connection.channel() as channel:
        yield channel


async def depth(stack: Stack, queue: str) -> int:
    """How many messages wait in this queue, without those that a reader has in hand."""
    async with operator(stack) as channel:
        declared = await channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


async def well(services: Ring) -> None:
    """Come back when every process says that it is ready."""
    await asyncio.gather(*(process.ready() for process in services.processes.values()))


async def unwell(services: Ring) -> None:
    """Come back when every process has noticed that it is not ready."""

    async def is_unwell(process: Process) -> bool:
        try:
            await asyncio.to_thread(probe_ready, process.port)
        except OSError:
            return True
        return False

    for process in services.processes.values():
        await until(partial(is_unwell, process))


async def health(load: Storm, path: str, proxy: int = 0) -> tuple[int, dict[str, object]]:
    """What /livez or /readyz of a proxy says; (0, {}) when it says nothing."""
    try:
        reply = await load.caller("probe").call("GET", path, proxy=proxy)
    except AgentError:
        return 0, {}
    return reply.status, json.loads(reply.body)


async def unready(load: Storm) -> dict[str, object]:
    """Come back when /readyz of the first proxy is 503, with what it says; /livez is 200 at that time."""
    said: dict[str, object] = {}

    async def is_unready() -> bool:
        status, body = await health(load, "/readyz")
        said.clear()
        said.update(body)
        return status == 503

    await until(is_unready)
    status, _ = await health(load, "/livez")
    assert status == 200
    return said
