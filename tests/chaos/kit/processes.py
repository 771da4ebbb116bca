"""Services as processes that a test may kill, freeze and start again; nobody restarts them but the test.

Each process has its own links to Postgres and RabbitMQ, so a fault can hit one replica and not its sibling.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit, urlunsplit

from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.roles import service_url
from deploy.local.services import probe_ready
from shared.processes import is_stopped, mark_of
from tests.chaos.kit.link import Link, link
from tests.conftest import ROOT, Stack, until
from tests.e2e.conftest import Ready

ADMIN_TOKEN = "admin-of-the-chaos-tests"
READY_S = 180.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to whom, and for how long; `time.monotonic()` moments."""

    what: str
    whom: str
    begun_at: float
    ended_at: float | None = None


@dataclass(eq=False)
class Process:
    """One replica of a service: `name` is "queue-1". A start after a kill is a new replica at the same address."""

    name: str
    env: Mapping[str, str]
    port: int
    log: Path
    postgres: Link
    rabbitmq: Link
    faults: list[Fault]
    module: str | None = None
    """Another program that is to run in its place from the next start on."""
    _running: asyncio.subprocess.Process | None = None
    _frozen_at: float | None = field(default=None)

    @property
    def service(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._running is not None, f"{self.name} does not run"
        return self._running.pid

    async def start(self) -> None:
        """Start it, without waiting until it is ready."""
        assert self._running is None, f"{self.name} runs"
        with self.log.open("ab") as log:
            self._running = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module or f"services.{self.service}",
                cwd=ROOT, env=self.env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def ready(self) -> None:
        """Come back when /readyz says so."""

        async def is_ready() -> bool:
            assert self._running is not None
            assert self._running.returncode is None, f"{self.name} ended: {self.tail()}"
            with suppress(OSError):
                await asyncio.to_thread(probe_ready, self.port)
                return True
            return False

        try:
            await until(is_ready, READY_S)
        except TimeoutError:
            raise AssertionError(f"{self.name} is not ready: {self.tail()}") from None

    async def kill(self) -> None:
        """SIGKILL: it loses what it had in memory."""
        running = self._running
        assert running is not None, f"{self.name} does not run"
        now = time.monotonic()
        with suppress(ProcessLookupError):
            running.kill()
        await running.wait()
        self._running, self._frozen_at = None, None
        self.faults.append(Fault("killed", self.name, now, now))

    async def stop(self) -> None:
        """SIGTERM, and wait: it hands back what it cannot finish."""
        running = self._running
        assert running is not None, f"{self.name} does not run"
        begun_at = time.monotonic()
        running.terminate()
        code = await running.wait()
        self._running = None
        self.faults.append(Fault("stopped", self.name, begun_at, time.monotonic()))
        assert code == 0, f"{self.name} ended with {code}: {self.tail()}"

    async def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers; come back when every thread stands."""
        mark = mark_of(self.pid)
        assert mark is not None
        os.kill(self.pid, signal.SIGSTOP)
        self._frozen_at = time.monotonic()

        async def stands() -> bool:
            return is_stopped(mark)

        await until(stands)

    def thaw(self) -> None:
        """SIGCONT: it goes on as if no time had passed."""
        assert self._frozen_at is not None, f"{self.name} is not frozen"
        os.kill(self.pid, signal.SIGCONT)
        self.faults.append(Fault("frozen", self.name, self._frozen_at, time.monotonic()))
        self._frozen_at = None

    async def close(self) -> None:
        if self._running is not None:
            with suppress(ProcessLookupError):
                self._running.kill()
            await self._running.wait()
            self._running = None

    def tail(self, lines: int = 15) -> str:
        return "\n".join(["", *self.log.read_text(errors="replace").splitlines()[-lines:]])

    def logged(self, event: str) -> int:
        """How often this replica, in all its lives, has logged `event`."""
        return self.log.read_text(errors="replace").count(f'"event": "{event}"')


@dataclass(frozen=True)
class Ring:
    """The services of one test."""

    stack: Stack
    processes: Mapping[str, Process]
    faults: list[Fault]

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    def of(self, service: str) -> list[Process]:
        return [process for process in self.processes.values() if process.service == service]

    def links(self, server: str) -> list[Link]:
        """Every process's link to "postgres" or "rabbitmq"."""
        return [process.postgres if server == "postgres" else process.rabbitmq for process in self.processes.values()]

    @property
    def ready(self) -> Ready:
        """What agents and callers must know."""
        return Ready([process.url for process in self.of("proxy")], ADMIN_TOKEN, {}, self.stack.database_url)

    def note(self, what: str, whom: str, begun_at: float) -> None:
        """Remember a fault of a server, which ends now."""
        self.faults.append(Fault(what, whom, begun_at, time.monotonic()))


def ring(stack: Stack, *names: str, **env: str) -> AbstractAsyncContextManager[Ring]:
    """Start these replicas ("proxy-1", "queue-1", …) on this database and vhost; all are ready when the block begins.

    `env`: settings of all of them (BIDE_… names).
    """
    return _ring(stack, names or ("proxy-1", "queue-1"), env, linked=True)


def ring_without_links(stack: Stack, *names: str, **env: str) -> AbstractAsyncContextManager[Ring]:
    """The same for who measures: straight to the servers, `link`s are idle."""
    return _ring(stack, names, env, linked=False)


@asynccontextmanager
async def _ring(stack: Stack, names: Sequence[str], env: Mapping[str, str], *, linked: bool) -> AsyncIterator[Ring]:
    faults: list[Fault] = []
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(TemporaryDirectory(prefix="bide-chaos-", ignore_cleanup_errors=True)))
        ports = exits.enter_context(Ports(Memory(folder)))
        processes: dict[str, Process] = {}
        for name in names:
            service = name.rpartition("-")[0]
            postgres, database_url = await _linked(exits, ports, stack.database_url, f"{name}.postgres")
            rabbitmq, amqp_url = await _linked(exits, ports, stack.amqp_url, f"{name}.rabbitmq")
            port = ports.claim(name)
            if not linked:
                database_url, amqp_url = stack.database_url, stack.amqp_url
            ours = _environment(service, database_url, amqp_url, port) | dict(env)
            process = Process(name, ours, port, folder / f"{name}.log", postgres, rabbitmq, faults)
            exits.push_async_callback(process.close)
            processes[name] = process
        await asyncio.gather(*(process.start() for process in processes.values()))
        await asyncio.gather(*(process.ready() for process in processes.values()))
        yield Ring(stack, processes, faults)


async def _linked(exits: AsyncExitStack, ports: Ports, url: str, name: str) -> tuple[Link, str]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    made = await exits.enter_async_context(link(parts.hostname, parts.port, listen_on=ports.claim(name)))
    user = parts.netloc.rpartition("@")[0]
    return made, urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{made.listening_on}"))


def _environment(service: str, database_url: str, amqp_url: str, port: int) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith("BIDE_")}
    shared = {
        "BIDE_DATABASE_URL": service_url(database_url, f"bide_{service}"),
        "BIDE_AMQP_URL": amqp_url,
        "BIDE_HTTP_PORT": str(port),
        "BIDE_ADMIN_TOKEN": ADMIN_TOKEN,
        "BIDE_DELIVERY_SECRET": "delivery-secret-of-the-chaos-tests",
    }
    if service in {"proxy", "queue"}:
        shared["BIDE_ALLOW_LOOPBACK"] = "1"
    return rest | shared
