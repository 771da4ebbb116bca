"""A whole stack for the stories, and a caller: services as processes, real agents in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bide_agent import Options, running
from bide_agent.agent import Agent
from shared.addresses import AddressRules
from shared.agents import Agents

ROOT = Path(__file__).parents[2]
BUSY_S = 600.0
"""Until the test says otherwise."""
ENDED = {"completed", "failed", "expired", "canceled", "superseded"}


@dataclass(frozen=True, slots=True)
class Ready:
    """What `up --json` says."""

    proxies: list[str]
    admin_token: str
    pids: Mapping[str, list[int]]
    database_url: str
    """The administrator's: to see that a service has heard of something, never what came of it."""

    @property
    def proxy(self) -> str:
        return self.proxies[0]


@contextmanager
def up(*options: str, **settings: str) -> Iterator[Ready]:
    """`python -m deploy.local up --json` for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="bide-e2e-", ignore_cleanup_errors=True) as folder:
        rest = {name: value for name, value in os.environ.items() if not name.startswith("BIDE_")}
        own = {name: value for name, value in os.environ.items() if name.startswith("BIDE_LOCAL_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "up", "--json", "--no-demo", "--data-dir", f"{folder}/s", *options],
            cwd=ROOT,
            env={**rest, **own, "BIDE_LOCAL_DURABLE": "0", **settings},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the stack did not start ({process.wait()})"
            said = json.loads(line)
            yield Ready(said["proxies"], said["admin_token"], said["pids"], said["database_url"])
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="session")
def ring() -> Iterator[Ready]:
    """One stack for all stories that need no other; a story has workspaces of its own."""
    with up() as ready:
        yield ready


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """Somebody who talks to the proxy over HTTP, with the operator's token and a name of their own."""

    def __init__(self, ready: Ready, client: Agents, name: str) -> None:
        self._ready = ready
        self._client = client
        self._name = name

    async def call(
        self, method: str, path: str, body: bytes | dict[str, Any] = b"", *, proxy: int = 0, **headers: str
    ) -> Reply:
        """One request; header names with `_` for `-`."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        said = {"authorization": f"Bearer {self._ready.admin_token}", "x-workspace-id": self._name, **headers}
        encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in said.items()]
        url = f"{self._ready.proxies[proxy]}{path}"
        async with await self._client.send(url, raw, encoded, method=method) as exchange:
            return Reply(exchange.status, exchange.headers, await exchange.read(16 << 20))

    async def send(self, workspace: str, text: str, *, key: str | None = None, proxy: int = 0, **headers: str) -> Reply:
        """A message as the original callers send it: no `jsonrpc`, no version header, no `blocking`."""
        message = {"role": "user", "messageId": key or str(uuid4()), "parts": [{"type": "text", "text": text}]}
        request = {"method": "message/send", "params": {"message": message}}
        return await self.call("POST", f"/workspaces/{workspace}/a2a", request, proxy=proxy, **headers)

    async def ended(self, queue_id: str, within_s: float = 40.0) -> dict[str, Any]:
        """Poll until the item has ended, as a caller would."""
        async with asyncio.timeout(within_s):
            while True:
                reply = await self.call("GET", f"/queue/{queue_id}")
                if reply.status == 200 and reply.json["status"] in ENDED:
                    found: dict[str, Any] = reply.json
                    return found
                await asyncio.sleep(0.1)  # a caller's pace


@pytest.fixture
async def lead(ring: Ready) -> AsyncIterator[Caller]:
    client = Agents(AddressRules(allow_loopback=True))
    yield Caller(ring, client, "lead")
    await client.close()


class Fleet:
    """Agents of one test, registered at the ring."""

    def __init__(self, ready: Ready, exits: AsyncExitStack) -> None:
        self._ready = ready
        self._exits = exits

    async def start(self, workspace: str | None = None, **options: Any) -> Agent:
        name = workspace or f"w-{uuid4().hex[:8]}"
        agent = await self._exits.enter_async_context(
            running(Options(workspace=name, bide=self._ready.proxy, token=self._ready.admin_token, **options))
        )
        await agent.until(lambda: agent.registered and agent.beats >= 1)
        return agent


@pytest.fixture
async def fleet(ring: Ready) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as exits:
        yield Fleet(ring, exits)


@pytest.fixture
async def open_ring(ring: Ready, lead: Caller, fleet: Fleet) -> Ready:
    """The stack once it lets messages straight through: at first its proxy keeps all, until the queue has spoken."""
    agent = await fleet.start(work_s=0.0)
    async with asyncio.timeout(60):
        while True:
            reply = await lead.send(agent.workspace, "warm")
            if reply.status == 200:
                return ring
            await asyncio.sleep(0.1)  # a caller's pace


async def busy(agent: Agent) -> None:
    """Let it do work of its own until `free`; come back when Bide has been told."""
    beats = agent.beats
    agent.busy_for(BUSY_S)
    agent.beat_now()
    await agent.until(lambda: agent.beats > beats)


def free(agent: Agent) -> None:
    """Let that work end."""
    agent.busy_for(0)
    agent.beat_now()
