"""Load for the fault tests: callers who send in bursts, one message after the other, and agents that work.

A caller repeats what was refused (as Retry-After says, but sooner), brings back the `X-Queue-Id` that it was told, and
does not repeat what broke after it was sent: whoever does not say `Idempotency-Key` cannot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any
from uuid import uuid4

from bide_agent.agent import Agent
from shared.addresses import AddressRules
from shared.agents import AgentError, Agents, NotSent
from tests.chaos.kit.account import Account, Sent, Witness
from tests.chaos.kit.processes import Ring
from tests.conftest import until
from tests.e2e.conftest import ENDED, Caller, Fleet, Reply

_AGAIN_S = 0.3
_TRIES_MAX = 400
_ASKING_MAX = 32


class Storm:
    """Callers and agents of one test; `account` closes the books."""

    def __init__(self, ring: Ring, client: Agents, fleet: Fleet) -> None:
        self.ring = ring
        self.fleet = fleet
        self.agents: list[Agent] = []
        self.witnesses: list[Witness] = []
        """Agents that run somewhere else; the books count them."""
        self.sent: list[Sent] = []
        self._client = client
        self._pacing: list[asyncio.Task[None]] = []
        self._enough = asyncio.Event()
        self._names = count(1)

    def caller(self, name: str) -> Caller:
        return Caller(self.ring.ready, self._client, name)

    async def agent(self, **options: Any) -> Agent:
        agent = await self.fleet.start(f"w{next(self._names):02}-{uuid4().hex[:6]}", **options)
        self.agents.append(agent)
        return agent

    async def warm(self) -> None:
        """Send to every agent through every proxy until it is forwarded: from here on idle means at once."""
        for number in range(len(self.ring.ready.proxies)):
            await asyncio.gather(*(self._warm(agent, number) for agent in self.agents))

    async def _warm(self, agent: Agent, proxy: int) -> None:
        """A proxy keeps until it has heard from the queue service; what it kept tells the test when to try again."""
        while True:
            warm = await self.send(agent, "warm", proxy=proxy, caller="warm")
            if warm.answered:
                return
            await self._ended(warm, asyncio.Semaphore())

    def begin(self, agents: Sequence[Witness], *, burst: int = 5, pause_s: float = 1.0) -> None:
        """Let one caller per agent send a burst, pause, and so on, until `end`; over the proxies in turn."""
        self._pacing += [asyncio.create_task(self._pace(agent, burst, pause_s)) for agent in agents]

    async def _pace(self, agent: Witness, burst: int, pause_s: float) -> None:
        number = 0
        while not self._enough.is_set():
            first = asyncio.create_task(self._numbered(agent, number))
            await asyncio.wait([first], timeout=0.02)  # the agent is at work: what follows is kept
            for _ in range(burst - 1):
                number += 1
                await self._numbered(agent, number)
            await first
            number += 1
            with_pause = asyncio.create_task(self._enough.wait())
            await asyncio.wait([with_pause], timeout=pause_s)
            with_pause.cancel()

    async def _numbered(self, agent: Witness, number: int) -> Sent:
        return await self.send(agent, f"{number:05}", proxy=number % len(self.ring.ready.proxies))

    async def send(
        self, agent: Witness, text: str, *, caller: str | None = None, proxy: int = 0, **headers: str
    ) -> Sent:
        """Send one message until it is answered, promised, or broken."""
        sent = Sent(
            workspace=agent.workspace,
            caller=caller or f"caller-of-{agent.workspace}",
            message_id=str(uuid4()),
            text=text,
            sent_at=time.monotonic(),
            proxy=proxy,
        )
        self.sent.append(sent)
        await self.repeat(sent, **headers)
        return sent

    async def repeat(self, sent: Sent, **headers: str) -> None:
        """Send it (again): the same message, with the id it was told."""
        caller = self.caller(sent.caller)
        for attempt in range(_TRIES_MAX):
            told = {"x_queue_id": sent.queue_id} if sent.queue_id is not None else {}
            proxy = (sent.proxy + attempt) % len(self.ring.ready.proxies)
            try:
                reply = await caller.send(
                    sent.workspace, sent.text, key=sent.message_id, proxy=proxy, **told, **headers
                )
            except NotSent:
                sent.told["not_sent"] += 1
            except AgentError:
                sent.status = None
                return
            else:
                if not self._again(sent, reply):
                    return
            await asyncio.sleep(_AGAIN_S)

    def _again(self, sent: Sent, reply: Reply) -> bool:
        body = reply.json
        sent.status = reply.status
        sent.code = body.get("error", {}).get("data", {}).get("code")
        if reply.status == 202 or body.get("queued"):
            sent.promised, sent.queue_id, sent.promised_at = True, body["queue_id"], time.monotonic()
        elif reply.status == 200 and "result" in body:
            sent.answered = True
        elif reply.status in {429, 503}:
            sent.told[str(sent.code)] += 1
            if sent.code == "keep_unknown":
                sent.queue_id = reply.headers["x-queue-id"]
            return True
        return False

    async def end(self) -> None:
        """Send nothing new; come back when every caller has heard of its last message. It may `begin` again."""
        self._enough.set()
        await asyncio.gather(*self._pacing)
        self._pacing.clear()
        self._enough.clear()

    async def account(self, within_s: float = 240.0) -> Account:
        """End the storm, wait for the end of every promise, and close the books."""
        await self.end()
        asking = asyncio.Semaphore(_ASKING_MAX)
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(self._ended(sent, asking) for sent in self.sent if sent.promised))
        return Account(self.sent, [*self.agents, *self.witnesses], self.ring.faults)

    async def _ended(self, sent: Sent, asking: asyncio.Semaphore) -> None:
        caller = self.caller(sent.caller)
        proxies = len(self.ring.ready.proxies)
        for attempt in count():
            async with asking:
                try:
                    reply = await caller.call("GET", f"/queue/{sent.queue_id}", proxy=attempt % proxies)
                except AgentError:
                    reply = None
            if reply is not None and reply.status == 404:
                return  # the books will call it lost
            if reply is not None and reply.status == 200:
                sent.item = reply.json
                if sent.item is not None and sent.item["status"] in ENDED:
                    return
            await asyncio.sleep(_AGAIN_S)

    async def more(self, promises: int) -> None:
        """Come back when so many more messages have been promised."""
        goal = self.promised() + promises

        async def enough() -> bool:
            return self.promised() >= goal

        await until(enough, within_s=60)

    def promised(self) -> int:
        return sum(each.promised for each in self.sent)

    def runs(self) -> int:
        """Messages that have reached an agent."""
        return sum(len(agent.received) for agent in self.agents)


@asynccontextmanager
async def storm(ring: Ring, agents: int = 8, **options: Any) -> AsyncIterator[Storm]:
    """Agents of this ring (`options` as bide_agent takes them), warmed up; the test begins the load."""
    client = Agents(AddressRules(allow_loopback=True))
    async with AsyncExitStack() as exits:
        exits.push_async_callback(client.close)
        made = Storm(ring, client, Fleet(ring.ready, exits))
        await asyncio.gather(*(made.agent(**{"work_s": 0.1, "heartbeat_s": 5.0, **options}) for _ in range(agents)))
        await made.warm()
        try:
            yield made
        finally:
            made._enough.set()
            for task in made._pacing:
                task.cancel()
            await asyncio.gather(*made._pacing, return_exceptions=True)
