"""The peers of the figures in an environment of their own: what each takes and drains, on the servers of this run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.local.fetch import cache_dir

PROGRAMS = Path(__file__).parent / "peers"
PACKAGES = ("procrastinate", "pgqueuer", "celery", "dramatiq[rabbitmq]", "starlette", "httpx", "uvicorn", "uvloop",
            "httptools", "asyncpg", "psycopg[binary]")  # fmt: skip
JOBS = ("procrastinate", "pgqueuer", "celery", "dramatiq")
_LIMIT_S = 120.0


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
