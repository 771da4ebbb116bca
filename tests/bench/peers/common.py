"""What the peers' programs share: the same job of about 500 bytes, how many, and one line of JSON as the result."""

from __future__ import annotations

import json
import os
import sys
import time

DATABASE = os.environ.get("PEER_DATABASE", "")
BROKER = os.environ.get("PEER_BROKER", "")
JOBS = int(os.environ.get("PEER_JOBS", "2000"))
AT_ONCE = 64
DRAIN_LIMIT_S = 30.0
PAYLOAD = {
    "jsonrpc": "2.0",
    "id": "1",
    "method": "message/send",
    "params": {"message": {"role": "user", "messageId": "x" * 36, "parts": [{"kind": "text", "text": "x" * 300}]}},
}


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def tell(**figures: float) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


class Clock:
    """Seconds since it was made, and the CPU that they cost."""

    def __init__(self) -> None:
        self._at, self._cpu = time.perf_counter(), cpu_s()

    def per_s(self, count: int) -> float:
        return count / (time.perf_counter() - self._at)

    def cpu_us(self, count: int) -> float:
        return (cpu_s() - self._cpu) / max(count, 1) * 1e6
