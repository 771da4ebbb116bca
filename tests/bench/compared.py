"""The peers of the figures in an environment of their own: what each takes and drains, on the servers of this run."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.local.fetch import cache_dir
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.servers import Servers
from tests.bench.figures import Bench
from tests.bench.table import Row

PROGRAMS = Path(__file__).parent / "peers"
PACKAGES = ("procrastinate", "pgqueuer", "celery", "dramatiq[rabbitmq]", "starlette", "httpx", "uvicorn", "uvloop",
            "httptools", "asyncpg", "psycopg[binary]")  # fmt: skip
JOBS = ("procrastinate", "pgqueuer", "celery", "dramatiq")
_LIMIT_S = 120.0
_ROUNDS = 3
_JOBS_EACH = 2000


async def rows(bench: Bench, running: Servers, folder: Path, ours: Sequence[Row]) -> list[Row]:
    """What the peers reach in this very run, and what of it `ours` is."""
    made: list[Row] = []
    medians: dict[str, dict[str, float]] = {}
    for name in JOBS:
        runs = []
        for number in range(_ROUNDS):
            database = running.postgres.create_database(f"peer_{name}_{number}")
            runs.append(
                await asyncio.to_thread(run, name, database=database, broker=running.rabbitmq.url, jobs=_JOBS_EACH)
            )
        found = medians[name] = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        note = f"drains {found['drain_per_s']:,.0f}/s no-ops"
        made.append(Row(figure="peer", what=f"{name}: enqueue, 64 at once", value=found["enqueue_per_s"], unit="/s",
                        cpu_us=found.get("drain_cpu_us"), note=note))  # fmt: skip
    value = {row.what: row.value for row in ours}
    kept, drained = value["busy → 202, 64 connections"], value["drain end to end over HTTP"]
    stubbed = value["drain with delivery stubbed out"]
    best = max(medians[name]["enqueue_per_s"] for name in JOBS)
    forwarded = await _against_starlette(bench, folder)
    return [
        *made,
        Row(figure="F1", what="idle forward, 32 connections: of Starlette and httpx", value=forwarded, unit="x",
            goal=15),
        Row(figure="F2", what="busy → 202: of the best durable peer", value=kept / best, unit="x", goal=1.5),
        Row(figure="F3", what="drain over HTTP: of procrastinate's no-ops", unit="x", goal=5,
            value=drained / medians["procrastinate"]["drain_per_s"]),
        Row(figure="F3", what="drain over HTTP: of celery's no-ops", unit="x", goal=1,
            value=drained / medians["celery"]["drain_per_s"]),
        Row(figure="F3", what="drain, delivery stubbed: of pgqueuer's batches of 10", unit="x", goal=1,
            value=stubbed / medians["pgqueuer"]["drain_per_s"]),
    ]  # fmt: skip


async def _against_starlette(bench: Bench, folder: Path) -> float:
    with Ports(Memory(folder)) as ports:
        port = ports.claim("starlette")
    ratios = []
    with starlette(bench.agent, port) as url:
        for _ in range(_ROUNDS):
            ours = await bench.send(bench.proxy.url, 32, path="/workspaces/json/a2a")
            theirs = await bench.send(url, 32, path="/json")
            ratios.append(ours.per_s / theirs.per_s)
    return statistics.median(ratios)


def python() -> Path:
    """The peers' interpreter; they are installed the first time, in their newest versions."""
    home = cache_dir(os.environ, uid=os.geteuid()) / "bench-peers"
    interpreter = home / "bin" / "python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([interpreter, "-m", "pip", "-qq", "install", *PACKAGES], check=True, stdout=sys.stderr)
        (home / "installed").touch()
    return interpreter


def run(name: str, *, database: str, broker: str, jobs: int) -> Mapping[str, float]:
    """Let one peer take and drain `jobs` no-ops."""
    env = {**os.environ, "PEER_DATABASE": database, "PEER_BROKER": broker, "PEER_JOBS": str(jobs)}
    done = subprocess.run(
        [python(), f"{name}_jobs.py"],
        cwd=PROGRAMS,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=_LIMIT_S,
    )
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


@contextmanager
def starlette(agent: str, port: int) -> Iterator[str]:
    """Starlette and httpx as a proxy before `agent`."""
    argv = [str(python()), "-m", "uvicorn", "starlette_proxy:app", "--port", str(port), "--no-access-log"]
    argv += ["--log-level", "error"]
    env = {**os.environ, "PEER_AGENT": agent}
    with subprocess.Popen(argv, cwd=PROGRAMS, env=env) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _until_up(url)
            yield url
        finally:
            process.terminate()


def _until_up(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{url} does not answer")
