"""Start a stack of its own, tell the stories one after the other, stop it. Exit 1: a story did not end as it should."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.demo import ceiling, life, storm
from deploy.demo.plane import SECRET

QUICK = {
    "BIDE_QUEUE_SNAPSHOT_S": "1",
    "BIDE_SCHEDULER_SESSION_NOTE_S": "0.2",
    "BIDE_LIVENESS_WEBHOOK_SECRET": SECRET,
    "BIDE_LIVENESS_SWEEP_S": "1",
    "BIDE_LIVENESS_BACKOFF_S": "1",
}
"""Seconds stand for minutes here."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the demo's proxy is, the token that may do everything, and the folder with the file of agents."""

    proxy: str
    admin_token: str
    data_dir: Path


def main() -> int:
    with stack() as running:
        held = [asyncio.run(story.tell(running.proxy, running.admin_token)) for story in (storm, ceiling)]
        held.append(asyncio.run(life.tell(running.proxy, running.admin_token, running.data_dir)))
    return 0 if all(held) else 1


@contextmanager
def stack() -> Iterator[Stack]:
    """A real stack in a throw-away folder, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="bide-demo-", ignore_cleanup_errors=True) as folder:
        data_dir = str(Path(folder) / "stack")
        command = [sys.executable, "-m", "deploy.local", "up", "--json", "--no-demo", "--data-dir", data_dir]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUICK})
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                sys.exit(process.wait() or 1)  # it has said why
            ready = json.loads(line)
            yield Stack(ready["proxy"], ready["admin_token"], Path(data_dir))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
