"""A small control plane, as the webhook driver asks it, that says what is not so when it is told to.

It starts a workspace once for each Idempotency-Key and answers the same key again with the same words. Nothing here
checks signatures: it listens on this machine alone, for the length of a demo or a test.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "of the control plane"  # noqa: S105 - it guards nothing
HOLD_MAX_S = 30.0
"""The longest that a request is held."""


@dataclass(frozen=True, slots=True)
class Order:
    """One request to start or end, whether it is carried out or only answered again."""

    verb: str
    workspace_id: str
    key: str
    fence: int
    at: float
    """`time.monotonic()`."""


@dataclass
class Plane:
    """What runs in it, what it claims, and what it was asked."""

    start: Callable[[str], str]
    """Starts a workspace; returns the id of its container."""
    running: dict[str, str] = field(default_factory=dict)
    claims: dict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    """What the next looks at a workspace are told, one each ("stopped", "running", or "error": no answer at all)."""
    asked: Counter[str] = field(default_factory=Counter)
    looks: Counter[str] = field(default_factory=Counter)
    """How often a look was asked for, and how often one was answered."""
    orders: list[Order] = field(default_factory=list)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By key: what was carried out, and the answer."""
    may_look: threading.Event = field(default_factory=threading.Event)
    may_act: threading.Event = field(default_factory=threading.Event)
    may_answer: threading.Event = field(default_factory=threading.Event)
    """Cleared, requests wait: before a look is answered, before an order is carried out, before it is answered."""
    url: str = ""
    _ended: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for event in (self.may_look, self.may_act, self.may_answer):
            event.set()

    def runtime(self, workspace_id: str) -> dict[str, str]:
        """What an operator writes in `runtime`: each workspace has an address of its own, and is looked at alone."""
        return {"driver": "webhook", "url": f"{self.url}/{workspace_id}"}

    def crash(self, workspace_id: str) -> None:
        """Let it be seen as stopped from now on."""
        with self._lock:
            del self.running[workspace_id]
            self._ended.add(workspace_id)

    def starts(self, workspace_id: str) -> list[Order]:
        """The requests to start it, repeated ones too."""
        return [order for order in self.orders if (order.verb, order.workspace_id) == ("restart", workspace_id)]

    def started(self, workspace_id: str) -> list[str]:
        """The keys under which it was really started."""
        return [key for key in self.done if key.startswith(f"{workspace_id}:restart:")]

    def answer(self, said: dict[str, Any], key: str | None) -> tuple[int, dict[str, Any]]:
        if said["verb"] == "list":
            with self._lock:
                self.asked.update(said["targets"])
            self.may_look.wait(HOLD_MAX_S)
            seen = {name: self._look(name) for name in said["targets"]}
            if any(each["seen"] == "error" for each in seen.values()):
                return 500, {}
            return 200, {"agents": seen}
        name, verb = said["workspace_id"], said["verb"]
        self.orders.append(Order(verb, name, key or "", said["fence"], time.monotonic()))
        self.may_act.wait(HOLD_MAX_S)
        with self._lock:
            found = self.done.get(key or "")
            if found is None:
                found = self.done[key or ""] = self._kill(name) if verb == "kill" else self._start(name)
        self.may_answer.wait(HOLD_MAX_S)
        return 200, found

    def _look(self, name: str) -> dict[str, Any]:
        with self._lock:
            self.looks[name] += 1
            claims, container_id = self.claims[name], self.running.get(name)
            truth = "running" if container_id else "stopped" if name in self._ended else "not_found"
            seen = claims.popleft() if claims else truth
            return {"seen": seen, "container_id": container_id, "why": "as its control plane says"}

    def _start(self, name: str) -> dict[str, Any]:
        self.running[name] = self.start(name)
        return {"seen": "running", "container_id": self.running[name]}

    def _kill(self, name: str) -> dict[str, Any]:
        return {"result": "applied" if self.running.pop(name, None) else "gone"}


@contextmanager
def plane(start: Callable[[str], str]) -> Iterator[Plane]:
    """One that listens, for the length of the block."""
    made = Plane(start)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = made.answer(said, self.headers["Idempotency-Key"])
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Whoever asked has died or hung up: it asks again."""

    with Server(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield made
        finally:
            for event in (made.may_look, made.may_act, made.may_answer):
                event.set()
            server.shutdown()
            thread.join()
