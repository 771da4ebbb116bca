"""F1, F2, F3, F5 and F9 on the whole path: real services as processes, wrk as the callers, nginx as the agent.

The proxy that is compared with (nginx `proxy_pass`, one worker) stands before the same agent and is loaded by the same
script in the same run; the pairs are interleaved.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg

from deploy.local.memory import Memory
from deploy.local.ports import Ports
from tests.bench.table import Row
from tests.bench.tools import Load, cpu_s, nginx, rss_mb, wrk
from tests.chaos.kit.processes import ADMIN_TOKEN, Process, Ring, ring_without_links
from tests.conftest import Stack

_ANSWER = json.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {
            "kind": "message",
            "role": "agent",
            "messageId": "a",
            "parts": [{"kind": "text", "text": "x" * 900}],
        },
    }
)
_EVENTS = "".join(
    f"data: {json.dumps({'jsonrpc': '2.0', 'id': 1, 'result': each})}\\n\\n"
    for each in (
        {"kind": "task", "id": "t", "contextId": "c", "status": {"state": "working"}},
        {"kind": "status-update", "taskId": "t", "contextId": "c", "status": {"state": "completed"}, "final": True},
    )
)
_runs = count()


@dataclass(frozen=True)
class Bench:
    """Everything that runs while the figures are taken."""

    ring: Ring
    stack: Stack
    agent: str
    nginx: str
    nginx_pid: int
    seconds: float
    rounds: int

    @property
    def proxy(self) -> Process:
        return self.ring["proxy-1"]

    @property
    def queue(self) -> Process:
        return self.ring["queue-1"]

    def call(self, method: str, path: str, body: object, token: str = ADMIN_TOKEN) -> Any:
        request = urllib.request.Request(
            f"{self.proxy.url}{path}",
            json.dumps(body).encode(),
            {"authorization": f"Bearer {token}", "content-type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read() or b"null")

    def register(self, name: str, url: str, maximum: int = 1000) -> str:
        body = {"id": name, "url": url, "agent_card": {"name": name}, "max_concurrent_tasks": maximum}
        return str(self.call("POST", "/registry/register", body)["auth_token"])

    async def send(self, url: str, connections: int, *, path: str, workspaces: int = 1, stream: bool = False) -> Load:
        return await asyncio.to_thread(
            wrk, url, connections=connections, seconds=self.seconds, script="message.lua", TOKEN=ADMIN_TOKEN,
            METHOD="message/stream" if stream else "message/send", RUN=f"r{next(_runs)}", PATHS=path,
            WORKSPACES=str(workspaces),
        )  # fmt: skip


@asynccontextmanager
async def bench(stack: Stack, folder: Path, *, seconds: float, rounds: int) -> AsyncIterator[Bench]:
    """The services, an agent that answers at once, and the proxy to compare with."""
    async with AsyncExitStack() as exits:
        ports = exits.enter_context(Ports(Memory(folder)))
        agent, before = ports.claim("agent"), ports.claim("nginx")
        exits.enter_context(nginx(folder, "agent", _agent(agent)))
        other = exits.enter_context(nginx(folder, "proxy", _proxy(before, agent)))
        services = await exits.enter_async_context(
            ring_without_links(stack, "proxy-1", "queue-1", BIDE_PROXY_QUEUE_DEPTH_MAX="10000000")
        )
        yield Bench(
            services, stack, f"http://127.0.0.1:{agent}", f"http://127.0.0.1:{before}", other.pid, seconds, rounds
        )


def _agent(port: int) -> str:
    return (
        f"server {{ listen 127.0.0.1:{port}; default_type application/json;\n"
        f" location /json {{ return 200 '{_ANSWER}'; }}\n"
        f' location /sse {{ default_type text/event-stream; return 200 "{_quoted(_EVENTS)}"; }} }}'
    )


def _quoted(text: str) -> str:
    return text.replace('"', '\\"')


def _proxy(port: int, agent: int) -> str:
    return (
        f"upstream agent {{ server 127.0.0.1:{agent}; keepalive 256; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://agent; proxy_http_version 1.1;"
        ' proxy_set_header Connection ""; proxy_buffering off; } }'
    )


# ── F1 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def forward(bench: Bench) -> list[Row]:
    """Idle forward against nginx: rate at 32 connections, latency at one, whole answers and streams."""
    await asyncio.to_thread(bench.register, "json", f"{bench.agent}/json")
    await asyncio.to_thread(bench.register, "sse", f"{bench.agent}/sse")
    await _until_forwarded(bench, "json")
    await _until_forwarded(bench, "sse")
    rows = []
    for what, name, stream in (("JSON", "json", False), ("SSE", "sse", True)):
        pairs = [await _pair(bench, name, 32, stream=stream) for _ in range(bench.rounds)]
        ratio = statistics.median(ours.per_s / theirs.per_s for ours, theirs, _ in pairs)
        rate = statistics.median(ours.per_s for ours, _, _ in pairs)
        cpu = statistics.median(each for _, _, each in pairs)
        wrong = sum(ours.refused + theirs.refused for ours, theirs, _ in pairs)
        note = f"{rate:,.0f}/s" + (f", {wrong} refused" if wrong else "")
        goal, stretch = (None, None) if stream else (0.15, 0.22)
        rows.append(Row(figure="F1", what=f"idle forward, 32 connections, {what}: of nginx's rate", value=ratio,
                        unit="x", cpu_us=cpu, note=note, goal=goal, stretch=stretch))  # fmt: skip
    pairs = [await _pair(bench, "json", 1) for _ in range(bench.rounds)]
    added = statistics.median(ours.p50_us for ours, _, _ in pairs) - await _direct(bench)
    nginx_added = statistics.median(theirs.p50_us for _, theirs, _ in pairs) - await _direct(bench)
    rows.append(Row(figure="F1", what="idle forward, 1 connection: added p50", value=added / 1000, unit="ms", goal=0.5,
                    at_most=True, note=f"nginx adds {nginx_added / 1000:.2f} ms"))  # fmt: skip
    return rows


async def _pair(bench: Bench, name: str, connections: int, *, stream: bool = False) -> tuple[Load, Load, float]:
    """Bide, nginx, and Bide's CPU per request in µs."""
    before = cpu_s(bench.proxy.pid)
    ours = await bench.send(bench.proxy.url, connections, path=f"/workspaces/{name}/a2a", stream=stream)
    cpu = (cpu_s(bench.proxy.pid) - before) / ours.requests * 1e6
    theirs = await bench.send(bench.nginx, connections, path=f"/{name}", stream=stream)
    return ours, theirs, cpu


async def _direct(bench: Bench) -> float:
    loads = [await bench.send(bench.agent, 1, path="/json") for _ in range(bench.rounds)]
    return statistics.median(load.p50_us for load in loads)


async def _until_forwarded(bench: Bench, name: str) -> None:
    """A proxy keeps until it has heard from the queue service."""
    message = {"kind": "message", "role": "user", "parts": [{"kind": "text", "text": "warm"}]}
    async with asyncio.timeout(30):
        while True:
            body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
            reply = await asyncio.to_thread(_raw, bench, f"/workspaces/{name}/a2a", body)
            if b'"queued"' not in reply:
                return
            await asyncio.sleep(0.2)


def _raw(bench: Bench, path: str, body: object) -> bytes:
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}", "content-type": "application/json"}
    request = urllib.request.Request(f"{bench.proxy.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        read: bytes = reply.read()
        return read


# ── F2, F3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_BUSY = 50
"""Workspaces over which the kept messages are spread."""


async def keep(bench: Bench, forwarded_per_s: float) -> list[Row]:
    """Busy → 202: each confirmed by the broker and kept; their workspaces are paused, so nothing is delivered."""
    for number in range(_BUSY):
        await asyncio.to_thread(bench.register, f"busy{number}", f"{bench.agent}/json", 4)
        await asyncio.to_thread(bench.call, "PATCH", f"/workspaces/busy{number}", {"paused": True})
    one = [await _keep(bench, 1) for _ in range(bench.rounds)]
    many, cpus, messages = [], [], []
    for _ in range(bench.rounds):
        before, sent = cpu_s(bench.proxy.pid), _published(bench)
        many.append(await _keep(bench, 64))
        cpus.append((cpu_s(bench.proxy.pid) - before) / many[-1].requests * 1e6)
        messages.append((_published(bench) - sent) / many[-1].requests)
    rate = statistics.median(load.per_s for load in many)
    wrong = sum(load.refused for load in (*one, *many))
    return [
        Row(figure="F2", what="busy → 202, 1 connection: p50", value=statistics.median(x.p50_us for x in one) / 1000,
            unit="ms", goal=3, at_most=True),
        Row(figure="F2", what="busy → 202, 64 connections", value=rate, unit="/s", goal=1500, stretch=3000,
            cpu_us=statistics.median(cpus), note=f"{wrong} refused" if wrong else ""),
        Row(figure="F2", what="busy → 202: of our own forward rate", value=rate / forwarded_per_s, unit="x", goal=0.35,
            stretch=0.5),
        Row(figure="F2", what="AMQP messages per kept request (proxy and queue)", value=statistics.median(messages),
            unit="", goal=0.2, at_most=True),
    ]  # fmt: skip


async def _keep(bench: Bench, connections: int) -> Load:
    return await bench.send(bench.proxy.url, connections, path="/workspaces/busy%/a2a", workspaces=_BUSY)


def _published(bench: Bench) -> float:
    """AMQP messages that proxy and queue have published."""
    total = 0.0
    for process in (bench.proxy, bench.queue):
        with urllib.request.urlopen(f"{process.url}/metrics") as reply:
            text = reply.read().decode()
        found = re.findall(r"^bide_batch_facts_count\{[^}]*\} (\S+)$", text, re.MULTILINE)
        total += sum(map(float, found))
    return total


async def drain(bench: Bench) -> list[Row]:
    """Everything that `keep` kept is delivered over HTTP and recorded."""
    before = cpu_s(bench.queue.pid)
    per_s, done, note = await _drained(bench)
    cpu = (cpu_s(bench.queue.pid) - before) / done * 1e6
    return [Row(figure="F3", what="drain end to end over HTTP", value=per_s, unit="/s", goal=1000, stretch=3000,
                cpu_us=cpu, note=note)]  # fmt: skip


async def drain_stubbed(bench: Bench) -> list[Row]:
    """The same with deliveries that are answered inside the queue service."""
    for number in range(_BUSY):
        await asyncio.to_thread(bench.call, "PATCH", f"/workspaces/busy{number}", {"paused": True})
    await _keep(bench, 64)
    await bench.queue.stop()
    bench.queue.module = "tests.bench.stubbed_queue"
    await bench.queue.start()
    await bench.queue.ready()
    before = cpu_s(bench.queue.pid)
    per_s, done, note = await _drained(bench)
    cpu = (cpu_s(bench.queue.pid) - before) / done * 1e6
    return [Row(figure="F3", what="drain with delivery stubbed out", value=per_s, unit="/s", cpu_us=cpu, note=note)]


async def _drained(bench: Bench) -> tuple[float, int, str]:
    connection = await asyncpg.connect(bench.stack.database_url)
    waiting = await _settled(connection)
    finished = int(await connection.fetchval("SELECT count(*) FROM queue.a2a_finished"))
    begun = time.perf_counter()
    for number in range(_BUSY):
        await asyncio.to_thread(bench.call, "PATCH", f"/workspaces/busy{number}", {"paused": False})
    async with asyncio.timeout(300):
        while await connection.fetchval("SELECT EXISTS (SELECT FROM queue.a2a_queue)"):  # noqa: ASYNC110 - measured
            await asyncio.sleep(0.05)
    took = time.perf_counter() - begun
    done = int(await connection.fetchval("SELECT count(*) FROM queue.a2a_finished")) - finished
    failed = await connection.fetchval("SELECT count(*) FROM queue.a2a_finished WHERE status <> 'completed'")
    await connection.close()
    return done / took, done, f"{done:,} of {waiting:,} items" + (f", {failed} failed" if failed else "")


async def _settled(connection: asyncpg.Connection[Any]) -> int:
    """Wait until what the broker still has is inserted; the number of rows."""
    last = -1
    while True:
        now = int(await connection.fetchval("SELECT count(*) FROM queue.a2a_queue"))
        if now == last:
            return now
        last = now
        await asyncio.sleep(1.0)


# ── F5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

_BEATING = 500


async def beats(bench: Bench, folder: Path) -> list[Row]:
    """Heartbeats of 500 agents through one proxy."""
    tokens = folder / "tokens"
    names = [f"beat{number}" for number in range(_BEATING)]
    given = [await asyncio.to_thread(bench.register, name, f"{bench.agent}/json") for name in names]
    tokens.write_text("".join(f"{name} {token}\n" for name, token in zip(names, given, strict=True)))
    loads, cpus = [], []
    for _ in range(bench.rounds):
        before = cpu_s(bench.proxy.pid)
        loads.append(
            await asyncio.to_thread(
                wrk, bench.proxy.url, connections=32, seconds=bench.seconds, script="heartbeat.lua", TOKENS=str(tokens)
            )
        )
        cpus.append((cpu_s(bench.proxy.pid) - before) / loads[-1].requests * 1e6)
    wrong = sum(load.refused for load in loads)
    return [
        Row(figure="F5", what="heartbeats, 32 connections", value=statistics.median(x.per_s for x in loads), unit="/s",
            goal=10_000, cpu_us=statistics.median(cpus), note=f"{wrong} refused" if wrong else ""),
        Row(figure="F5", what="heartbeats: p99", value=statistics.median(x.p99_us for x in loads) / 1000, unit="ms",
            goal=20, at_most=True),
    ]  # fmt: skip


# ── F9 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def idle(stack: Stack, *, for_s: float) -> list[Row]:
    """Memory, CPU and start of each service while nothing happens."""
    rows = []
    async with ring_without_links(stack, "proxy-1", "queue-1", "scheduler-1", "liveness-1") as services:
        for process in services.processes.values():
            await process.stop()
        for name, process in services.processes.items():
            begun = time.perf_counter()
            await process.start()
            await process.ready()
            ready = time.perf_counter() - begun
            before = cpu_s(process.pid)
            await asyncio.sleep(for_s)
            share = (cpu_s(process.pid) - before) / for_s * 100
            service = name.removesuffix("-1")
            rows += [
                Row(figure="F9", what=f"idle {service}: memory", value=rss_mb(process.pid), unit="MB", goal=90,
                    stretch=65, at_most=True),
                Row(figure="F9", what=f"idle {service}: CPU", value=share, unit="%", goal=1, at_most=True),
                Row(figure="F9", what=f"{service}: start to ready", value=ready, unit="s", goal=2, at_most=True),
            ]  # fmt: skip
    return rows
