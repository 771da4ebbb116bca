"""Engines for the one suite that every driver is held to: each says how an agent of its own crashes or is paused."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import pytest

from services.liveness.decide.seen import Seen
from services.liveness.drivers import CannotRunError, Driver, DriverError, FencedError, Target
from services.liveness.drivers.process import ProcessDriver
from services.liveness.drivers.webhook import WebhookDriver, sign
from tests.integration.dockerd_kit import DockerBench
from tests.integration.liveness_kit import AgentsFile

SECRET = "of the control plane"


class Bench(Protocol):
    """An engine under test. What `add` makes known is not started yet."""

    tells_of_exits: bool
    unstarted: Seen
    """What one that was added and never started looks like."""
    shares_fences: bool
    """Whether one replica's driver knows the fences of another's."""

    def driver(self) -> Driver:
        """Another replica's driver for the same engine."""

    def add(self, name: str) -> Target: ...

    def runs(self, container_id: str) -> bool: ...

    def crash(self, container_id: str) -> None: ...

    def pause(self, container_id: str) -> None: ...

    def resume(self, container_id: str) -> None: ...

    def close(self) -> None: ...


class ProcessBench:
    """Processes of this machine."""

    tells_of_exits = True
    unstarted = Seen.NOT_FOUND
    shares_fences = True

    def __init__(self, agents: AgentsFile) -> None:
        self.agents = agents

    def driver(self) -> Driver:
        return self.agents.driver()

    def add(self, name: str) -> Target:
        self.agents.add(name)
        return Target(name, {"driver": "process"})

    def runs(self, container_id: str) -> bool:
        pid, _, ticks = container_id.partition(":")
        found = self.agents.find(int(pid))
        return found is not None and found.start_ticks == int(ticks)

    def crash(self, container_id: str) -> None:
        self._send(container_id, signal.SIGKILL)

    def pause(self, container_id: str) -> None:
        self._send(container_id, signal.SIGSTOP)

    def resume(self, container_id: str) -> None:
        self._send(container_id, signal.SIGCONT)

    def close(self) -> None:
        pass

    def _send(self, container_id: str, number: int) -> None:
        os.kill(int(container_id.partition(":")[0]), number)


class WebhookBench(ProcessBench):
    """A control plane that happens to run processes of this machine, and believes only what is signed."""

    tells_of_exits = False

    def __init__(self, agents: AgentsFile) -> None:
        super().__init__(agents)
        self.keys: list[str | None] = []
        self._plane = _Plane(self.agents.driver(), self.keys)

    def driver(self) -> Driver:
        return WebhookDriver(SECRET)

    def add(self, name: str) -> Target:
        super().add(name)
        return Target(name, {"driver": "webhook", "url": self._plane.url})

    def close(self) -> None:
        self._plane.close()


class _Plane:
    def __init__(self, driver: ProcessDriver, keys: list[str | None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._driver = driver
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                wanted = f"sha256={sign(SECRET.encode(), self.headers['X-Bide-Timestamp'], body)}"
                status, said = 401, dict[str, Any]()
                if hmac.compare_digest(wanted, self.headers["X-Bide-Signature"]):
                    keys.append(self.headers["Idempotency-Key"])
                    status, said = plane.do(json.loads(body))
                raw = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._server.serve_forever, self._loop.run_forever)
        ]
        for thread in self._threads:
            thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def do(self, said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            return 200, self._run(lambda: self._do(said))
        except FencedError:
            return 409, {}
        except CannotRunError:
            return 404, {}
        except DriverError:
            return 503, {}

    async def _do(self, said: dict[str, Any]) -> dict[str, Any]:
        if said["verb"] == "list":
            seen = await self._driver.list([Target(name) for name in said["targets"]])
            return {"agents": {name: _looked(each) for name, each in seen.items()}}
        target = Target(said["workspace_id"])
        if said["verb"] == "kill":
            killed = await self._driver.kill(target, expected=said["expected"], fence=said["fence"])
            return {"result": killed.value}
        return _looked(await self._driver.restart(target, expected=said["expected"], fence=said["fence"]))

    def _run(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        asyncio.run_coroutine_threadsafe(self._driver.close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(5)
        self._loop.close()


def _looked(seen: Any) -> dict[str, Any]:
    at = seen.started_at.isoformat() if seen.started_at else None
    return {"seen": seen.seen.value, "container_id": seen.container_id, "started_at": at, "why": seen.why}


BENCHES = ("process", "webhook", "docker")


def bench_of(kind: str, request: pytest.FixtureRequest) -> Bench:
    """Make the bench of this kind; only the one for containers starts an engine."""
    match kind:
        case "docker":
            return DockerBench(request.getfixturevalue("dockerd"))
        case "webhook":
            return WebhookBench(request.getfixturevalue("agents"))
        case _:
            return ProcessBench(request.getfixturevalue("agents"))
