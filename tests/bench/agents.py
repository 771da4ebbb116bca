"""Our client against aiohttp's and pyreqwest: 1 KB of JSON in and out, one tiny server in another process.

`python -m tests.bench.agents` prints one table; `--json` one line. What is not installed is left out: Bide needs
neither. Ratios within one run are what counts; the pairs are interleaved, the figures medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvloop

from shared.addresses import AddressRules
from shared.agents import Agents

ROUNDS = 7
REQUESTS = {1: 2000, 32: 8000}
"""By connections: about a second for the slowest client."""
OURS = "ours"
MESSAGE = {"kind": "message", "messageId": "m", "parts": [{"kind": "text", "text": "x" * 900}]}
BODY = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": MESSAGE}}).encode()
ANSWER = json.dumps({"jsonrpc": "2.0", "id": 1, "result": MESSAGE}).encode()
HEADERS = {"content-type": "application/json", "x-queue-id": "019b0000-0000-7000-8000-000000000000", "x-bide-hops": "1"}

Call = Callable[[], Awaitable[int]]
"""One request; the number of bytes that came back."""


class Answering(asyncio.Protocol):
    """Answers as soon as a request is whole, and looks at nothing else in it."""

    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER

    def __init__(self) -> None:
        self.came = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came += data
        assert self.transport is not None
        if self.came.endswith(BODY[-8:]):
            self.came = b""
            self.transport.write(self.reply)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", port, backlog=512)
    print("ready", flush=True)
    await server.serve_forever()


@contextmanager
def serving() -> Iterator[str]:
    """Run the server in a process of its own; yield its URL."""
    port = next(port for port in random.sample(range(26_000, 32_000), 50) if _is_free(port))
    command = [sys.executable, "-m", "tests.bench.agents", "--serve", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield f"http://127.0.0.1:{port}/a2a"
        finally:
            process.terminate()


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


@asynccontextmanager
async def ours(url: str, _connections: int) -> AsyncIterator[Call]:
    agents = Agents(AddressRules(allow_loopback=True))
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def call() -> int:
        async with await agents.send(url, BODY, headers) as exchange:
            return len(await exchange.read(1 << 20))

    try:
        yield call
    finally:
        await agents.close()


@asynccontextmanager
async def with_aiohttp(url: str, connections: int) -> AsyncIterator[Call]:
    aiohttp: Any = importlib.import_module("aiohttp")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:

        async def call() -> int:
            async with session.post(url, data=BODY, headers=HEADERS) as response:
                return len(await response.read())

        yield call


@asynccontextmanager
async def with_pyreqwest(url: str, connections: int) -> AsyncIterator[Call]:
    pyreqwest: Any = importlib.import_module("pyreqwest.client")
    async with pyreqwest.ClientBuilder().max_connections(connections).build() as client:

        async def call() -> int:
            response = await client.post(url).headers(HEADERS).body_bytes(BODY).build().send()
            return len(await response.bytes())

        yield call


CLIENTS = {OURS: ours, "aiohttp": with_aiohttp, "pyreqwest": with_pyreqwest}


def installed() -> list[str]:
    return [name for name in CLIENTS if name == OURS or importlib.util.find_spec(name) is not None]


async def measure(name: str, url: str, connections: int) -> dict[str, float]:
    async with CLIENTS[name](url, connections) as call:
        await asyncio.gather(*(call() for _ in range(connections)))
        each = REQUESTS[connections] // connections
        latencies: list[float] = []

        async def worker() -> None:
            for _ in range(each):
                begun = time.perf_counter()
                assert await call() == len(ANSWER)
                latencies.append(time.perf_counter() - begun)

        cpu, begun = time.process_time(), time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(connections)))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {
        "per_s": len(latencies) / wall,
        "p50_us": statistics.median(latencies) * 1e6,
        "cpu_us": cpu / len(latencies) * 1e6,
    }


async def compare(url: str) -> list[dict[str, Any]]:
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for connections in REQUESTS:
            for name in installed():
                runs.setdefault((connections, name), []).append(await measure(name, url, connections))
    rows = []
    for (connections, name), results in runs.items():
        pairs = zip(results, runs[connections, OURS], strict=True)
        rows.append(
            {
                "connections": connections,
                "client": name,
                **{key: statistics.median(result[key] for result in results) for key in results[0]},
                "ours_is": statistics.median(mine["per_s"] / theirs["per_s"] for theirs, mine in pairs),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve(arguments.serve))
        return 0
    with serving() as url:
        rows = uvloop.run(compare(url))
    if arguments.json:
        print(json.dumps({"agents": rows, "load": os.getloadavg()}))
        return 0
    print(f"{'connections':>11} {'client':>10} {'req/s':>8} {'p50 µs':>8} {'CPU µs/req':>10} {'ours is':>8}")
    for row in rows:
        print(
            f"{row['connections']:11} {row['client']:>10} {row['per_s']:8.0f} {row['p50_us']:8.0f}"
            f" {row['cpu_us']:10.0f} {row['ours_is']:7.2f} x"
        )
    left_out = CLIENTS.keys() - installed()
    print(f"medians of {ROUNDS} interleaved rounds; load {os.getloadavg()[0]:.1f}", end="")
    print(f"; not installed: {', '.join(sorted(left_out))}" if left_out else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
