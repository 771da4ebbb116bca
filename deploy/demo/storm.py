"""The first story: a lead delegates to workers that are in mid-synthesis, with Bide and without.

Without Bide the worker's door answers 503 and the work is lost. With Bide it is kept, in order, and delivered when the
worker has capacity; nobody retries, nobody polls the worker.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from bide_agent import Options, running
from bide_agent.agent import Agent
from shared.addresses import AddressRules
from shared.agents import AgentError, Agents

WORKERS = 6
MESSAGES = 60
SYNTHESIS_S = 4.0
"""How long each worker is still busy with something else when the messages come."""
TURN_S = 0.4
LIMIT_S = 45.0
_GLANCE_S = 0.5
_ANSWER_MAX = 1 << 20


@dataclass(slots=True)
class Accounts:
    """What became of the messages of one round."""

    statuses: Counter[int] = field(default_factory=Counter)
    queue_ids: list[str] = field(default_factory=list)
    answered_at_once: int = 0
    slowest_s: float = 0.0


async def tell(proxy: str, admin_token: str) -> bool:
    """Tell the story; True when nothing was lost with Bide."""
    print(f"\nA lead delegates {MESSAGES} messages to {WORKERS} workers. Each worker is in mid-synthesis for another "
          f"{SYNTHESIS_S:g} s, takes one turn at a time, and needs {TURN_S:g} s for a turn.\n")  # fmt: skip
    client = Agents(AddressRules(allow_loopback=True))
    try:
        async with AsyncExitStack() as exits:
            workers = await _start(exits, proxy=None, token="")
            without = await _storm(client, [worker.url for worker in workers], {})
        async with AsyncExitStack() as exits:
            workers = await _start(exits, proxy=proxy, token=admin_token)
            urls = [f"{proxy}/workspaces/worker-{number}/a2a" for number in range(WORKERS)]
            headers = {"authorization": f"Bearer {admin_token}", "x-workspace-id": "lead"}
            begun = time.monotonic()
            kept = await _storm(client, urls, headers)
            delivered = await _watch(workers, kept, begun)
            ended = await _ends(client, proxy, headers, kept.queue_ids)
    finally:
        await client.close()
    return _print_accounts(without, kept, delivered, ended)


async def _start(exits: AsyncExitStack, *, proxy: str | None, token: str) -> list[Agent]:
    """Six real agents, each taken up by work of its own."""
    agents = [
        await exits.enter_async_context(
            running(Options(workspace=f"worker-{number}", bide=proxy, token=token, work_s=TURN_S))
        )
        for number in range(WORKERS)
    ]
    for agent in agents:
        agent.busy_for(SYNTHESIS_S)
        if proxy is not None:
            await agent.until(lambda agent=agent: agent.registered)  # type: ignore[misc]
            agent.beat_now()
    return agents


async def _storm(client: Agents, urls: Sequence[str], headers: dict[str, str]) -> Accounts:
    """All messages at once, one worker after the other, as a lead's fan-out sends them."""
    accounts = Accounts()
    await asyncio.gather(*(_send(client, urls[n % len(urls)], headers, n, accounts) for n in range(MESSAGES)))
    return accounts


async def _send(client: Agents, url: str, headers: dict[str, str], number: int, accounts: Accounts) -> None:
    message = {
        "role": "user",
        "kind": "message",
        "messageId": str(uuid4()),
        "parts": [{"kind": "text", "text": f"task {number:02}"}],
    }
    request = {"jsonrpc": "2.0", "id": number, "method": "message/send", "params": {"message": message}}
    encoded = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in headers.items())]
    begun = time.monotonic()
    try:
        async with await client.send(url, json.dumps(request).encode(), encoded) as exchange:
            status, body = exchange.status, await exchange.read(_ANSWER_MAX)
    except AgentError:
        status, body = 0, b""
    accounts.slowest_s = max(accounts.slowest_s, time.monotonic() - begun)
    accounts.statuses[status] += 1
    answer: dict[str, Any] = json.loads(body) if body.startswith(b"{") else {}
    if "queue_id" in answer:
        accounts.queue_ids.append(answer["queue_id"])
    elif status == 200 and "result" in answer:  # noqa: PLR2004
        accounts.answered_at_once += 1


async def _watch(workers: Sequence[Agent], kept: Accounts, begun: float) -> int:
    """Print what each worker has got, until all of it is there; return how many that were."""
    print("\n  seconds  " + "  ".join(f"worker-{number}" for number in range(WORKERS)) + "   delivered")
    while True:
        done = [sum(1 for each in worker.received if each.ended_at is not None) for worker in workers]
        cells = "  ".join(f"{count or 'busy':>8}" for count in done)
        print(f"  {time.monotonic() - begun:7.1f}  {cells}  {sum(done):>10}", flush=True)
        if sum(done) >= len(kept.queue_ids) + kept.answered_at_once or time.monotonic() - begun > LIMIT_S:
            return sum(done)
        await asyncio.sleep(_GLANCE_S)  # the table's pace


async def _ends(client: Agents, proxy: str, headers: dict[str, str], queue_ids: Sequence[str]) -> Counter[str]:
    """Ask for every item that was promised."""
    encoded = [(k.encode(), v.encode()) for k, v in headers.items()]
    found: Counter[str] = Counter()
    for queue_id in queue_ids:
        async with await client.send(f"{proxy}/queue/{queue_id}", b"", encoded, method="GET") as exchange:
            found[json.loads(await exchange.read(_ANSWER_MAX)).get("status", "lost")] += 1
    return found


def _print_accounts(without: Accounts, kept: Accounts, delivered: int, ended: Counter[str]) -> bool:
    refused = sum(count for status, count in without.statuses.items() if status not in {200, 202})
    lost = MESSAGES - kept.answered_at_once - ended["completed"]
    rows = [
        ("sent", MESSAGES, MESSAGES),
        ("answered at once", without.answered_at_once, kept.answered_at_once),
        ("kept (202)", 0, len(kept.queue_ids)),
        ("refused (503)", refused, MESSAGES - kept.answered_at_once - len(kept.queue_ids)),
        ("delivered", without.answered_at_once, delivered),
        ("lost", refused, lost),
    ]
    print(f"\n  {'':18}{'without Bide':>14}{'with Bide':>14}")
    for name, left, right in rows:
        print(f"  {name:18}{left:>14}{right:>14}")
    promises = ", ".join(f"{count} {status}" for status, count in ended.items())
    print(f"\n  The slowest answer took {kept.slowest_s * 1000:.0f} ms. Asked for each promise: {promises}.\n")
    sys.stdout.flush()
    return lost == 0
