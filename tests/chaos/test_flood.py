"""One workspace floods the queue: the others are served as before."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from statistics import median, quantiles

import pytest
from uuid_utils.compat import uuid7

from bide_agent.agent import Agent
from shared.broker import Publisher, open_publisher
from shared.facts import MessageBusy
from tests.chaos.conftest import LONG
from tests.chaos.kit import database
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack

FLOOD = 100_000 if LONG else 10_000
FEW = 400
"""What waits for the same agent on the calm side: it works all the time there too."""
PAIRS = 3
ROUNDS = 50


def message(workspace: str, number: int) -> MessageBusy:
    key = f"{workspace}-{number}"
    said = {"role": "user", "messageId": key, "parts": [{"type": "text", "text": f"{number:06}"}]}
    body = json.dumps({"method": "message/send", "params": {"message": said}}).encode()
    return MessageBusy(
        workspace_id=workspace, rev=1, queue_id=uuid7(), caller_id="bob", caller_hash=_hash(b"bob"),
        key_hash=_hash(key.encode()), body_hash=_hash(body), reason="backlog", method="message/send", body=body,
    )  # fmt: skip


def _hash(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()


def batched(numbers: range, size: int) -> Iterator[range]:
    return (numbers[at : at + size] for at in range(0, len(numbers), size))


async def flood(stack: Stack, publisher: Publisher, workspace: str, numbers: range) -> None:
    """Keep these messages, as fast as the broker takes them; come back when all of them are rows."""
    for page in batched(numbers, 2000):
        await asyncio.gather(*(publisher.publish(message(workspace, number)) for number in page))
    async with database.admin(stack) as connection, asyncio.timeout(300):
        # The last one may be under way already where there are few.
        seen = """SELECT count(*) FROM (SELECT key_hash FROM queue.a2a_queue WHERE workspace_id = $1 UNION ALL
                  SELECT key_hash FROM queue.a2a_finished WHERE workspace_id = $1) AS f WHERE key_hash = ANY($2)"""
        keys = [_hash(f"{workspace}-{number}".encode()) for number in numbers]
        while await connection.fetchval(seen, workspace, keys) < len(numbers):  # noqa: ASYNC110 - no signal tells
            await asyncio.sleep(0.2)


Side = tuple[Storm, Sequence[Agent]]


async def pair(flooded: Side, calm: Side) -> tuple[list[float], list[float]]:
    """Round trips through the queue (kept, claimed, delivered, answered, told) to idle agents, in turn on both sides.

    Each caller asks the one and then the other, so that whatever else this machine does hits both.
    """
    took: tuple[list[float], list[float]] = ([], [])
    both = list(zip((flooded, calm), took, strict=True))

    async def call(number: int) -> None:
        for turn in range(ROUNDS):
            for (load, agents), found in both if turn % 2 else reversed(both):
                began = time.perf_counter()
                sent = await load.send(agents[number], f"{turn}", prefer="wait=30")
                found.append(time.perf_counter() - began)
                assert sent.answered, sent

    await asyncio.gather(*(call(number) for number in range(len(flooded[1]))))
    return took


def p99(found: Sequence[float]) -> float:
    return quantiles(found, n=100)[98]


def line(name: str, flooded: Sequence[float], calm: Sequence[float]) -> str:
    middles = f"median {median(flooded) * 1000:.0f} : {median(calm) * 1000:.0f} ms"
    return f"{name}: flooded : calm {middles}, p99 {p99(flooded) * 1000:.0f} : {p99(calm) * 1000:.0f} ms"


@pytest.mark.timeout(1800 if LONG else 600)
async def test_a_flood_for_one_workspace_leaves_the_others_their_pace(faulty: Stack, beside: Stack) -> None:
    """B-34, B-08: the same stack twice, one with the flood; compared at the same moments, medians of three pairs."""
    async with (
        ring(faulty, "proxy-1", "queue-1") as services,
        ring(beside, "proxy-1", "queue-1") as others,
        storm(services, agents=4, work_s=0.01) as load,
        storm(others, agents=4, work_s=0.01) as calm,
        open_publisher(faulty.settings("proxy")) as publisher,
        open_publisher(beside.settings("proxy")) as calm_publisher,
    ):
        sides = (load, list(load.agents)), (calm, list(calm.agents))
        bob, twin = await load.agent(work_s=0.3), await calm.agent(work_s=0.3)
        await flood(faulty, publisher, bob.workspace, range(FEW))
        await flood(beside, calm_publisher, twin.workspace, range(FEW))
        before = await pair(*sides)
        print(line("before", *before))
        began = time.perf_counter()
        await flood(faulty, publisher, bob.workspace, range(FEW, FEW + FLOOD))
        print(f"{FLOOD} messages in the line of one after {time.perf_counter() - began:.1f} s")
        middles, tails = [], []
        for _ in range(PAIRS):
            under = await pair(*sides)
            print(line("under", *under))
            middles.append(median(under[0]) / median(under[1]))
            tails.append(p99(under[0]) / p99(under[1]))
        print(f"medians of three pairs: median {median(middles):.2f}, p99 {median(tails):.2f} of the calm side's")
        for agent in sides[0][1]:
            await load.send(agent, "kept", prefer="wait=0")
        account = await load.account()
        account.check()
        assert account.duplicates == []
        assert [each.text for each in bob.received] == sorted(each.text for each in bob.received)
        assert await database.dead_letters(faulty) == []
        assert median(middles) <= 1.5
        assert median(tails) <= 1.5
