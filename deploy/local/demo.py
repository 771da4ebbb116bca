"""`make demo`: the stack loses a service, RabbitMQ and PostgreSQL by kill -9, and comes back each time.

Shows what the house can do so far; the stories of messages and agents come with the ring.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local.ledger import read_record

READY_LIMIT_S = 60.0
GLANCE_S = 0.1
ANSWER_AGE_S = 0.6
"""/readyz may repeat an answer for half a second: what it says is believed this long after the death."""


def main() -> int:
    """Run the story once; 1 when something did not come back."""
    with tempfile.TemporaryDirectory(prefix="bide-demo-") as folder:
        data_dir = Path(folder) / "stack"
        command = [sys.executable, "-m", "deploy.local", "up", "--json", "--no-demo", "--data-dir", str(data_dir)]
        stack = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert stack.stdout is not None
            line = stack.stdout.readline()
            if not line:
                return stack.wait() or 1
            return _tell(json.loads(line), data_dir)
        finally:
            stack.send_signal(signal.SIGINT)
            stack.wait()


def _tell(ready: dict[str, object], data_dir: Path) -> int:
    url = str(ready["proxy"])
    print(f"\nAll four services are ready; {url}/readyz says {_readyz(url)}\n", flush=True)
    for name, words in (("proxy-1", "The proxy"), ("rabbitmq", "RabbitMQ"), ("postgres", "PostgreSQL")):
        pid = _pid(data_dir, name)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        if not _is_back(url, data_dir, name, pid):
            print(f"{words} was killed (pid {pid}) and did not come back within {READY_LIMIT_S:g} s")
            return 1
        print(
            f"\n{words} was killed (kill -9 {pid}): all ready again after {time.monotonic() - killed_at:.1f} s\n",
            flush=True,
        )
    print("Nothing was told to restart anything. Stopping.\n", flush=True)
    return 0


def _pid(data_dir: Path, name: str) -> int:
    pids = [entry.mark.pid for entry in read_record(data_dir).entries if entry.name == name]
    return pids[-1] if pids else 0


def _is_back(url: str, data_dir: Path, name: str, killed: int) -> bool:
    killed_at = time.monotonic()
    while time.monotonic() < killed_at + READY_LIMIT_S:
        time.sleep(GLANCE_S)
        young = time.monotonic() < killed_at + ANSWER_AGE_S
        if not young and _pid(data_dir, name) not in {0, killed} and _readyz(url) == "ready":
            return True
    return False


def _readyz(url: str) -> str:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return str(json.loads(connection.getresponse().read())["status"])
    except (OSError, http.client.HTTPException):
        return "away"
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
