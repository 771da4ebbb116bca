"""Real servers for the tests: started once per run by the local stack's own code.

The controller of pytest-xdist (or the only process, without it) starts PostgreSQL and RabbitMQ, applies roles and
migrations to a template database, and gives every worker a clone of it and a vhost. `tests/unit` alone starts nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import hypothesis  # before any test: Python 3.11 may not parse its sources any more afterwards
import pytest
from pydantic import SecretStr

from deploy.local.roles import apply_roles, service_url
from deploy.local.servers import Servers, servers
from deploy.local.teardown import sweep
from shared.database import Pool, open_pool
from shared.migrate import SHARED_MIGRATIONS, migrate, read_migrations
from shared.settings import SERVICES, SharedSettings

ROOT = Path(__file__).parent.parent
TEMPLATE = "bide_template"

# No example has to be quick, and CI tries the same ones each time: it speaks of the change. Long runs look for others.
hypothesis.settings.register_profile(
    "bide",
    deadline=None,
    derandomize="BIDE_TEST_LONG" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("bide")


@dataclass(frozen=True, slots=True)
class Stack:
    """What one worker tests against. `database_url` is the administrator's."""

    database_url: str
    amqp_url: str

    def settings(self, service: str = "queue", **changes: object) -> SharedSettings:
        """Settings of one replica of `service` on this stack."""
        values: dict[str, object] = {
            "database_url": SecretStr(service_url(self.database_url, f"bide_{service}")),
            "amqp_url": SecretStr(self.amqp_url),
            "confirm_timeout_s": 5.0,
            **changes,
        }
        return SharedSettings.model_validate(values)


_running: Servers | None = None
_stacks: dict[str, Stack] = {}
_on_exit = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not _needs_servers(config):
        return
    global _running  # noqa: PLW0603 - one per run, made before any fixture could hold it
    root = Path(tempfile.gettempdir()) / f"bide-tests-{os.getuid()}"
    sweep(root, _report)
    folder = _on_exit.enter_context(
        tempfile.TemporaryDirectory(dir=_made(root), prefix="run-", ignore_cleanup_errors=True)
    )
    _running = _on_exit.enter_context(servers(Path(folder), durable=False, report=_report, environ=_environ()))
    make_template(_running)
    _give_stacks(_running, _workers(config))


def _give_stacks(running: Servers, names: Sequence[str]) -> None:
    # One call for all workers: each costs a start of RabbitMQ's own command line.
    for name, url in zip(names, running.rabbitmq.vhosts(names), strict=True):
        _stacks[name] = Stack(running.postgres.create_database(f"bide_{name}", template=TEMPLATE), url)


def _workers(config: pytest.Config) -> list[str]:
    count = getattr(config.option, "numprocesses", None)
    return [f"gw{number}" for number in range(count)] if count else ["main"]


def pytest_unconfigure() -> None:
    _on_exit.close()


def pytest_configure_node(node: object) -> None:
    """Called by xdist in the controller for each worker, before it starts: also for one that replaces a crashed one."""
    if _running is not None:
        worker: dict[str, object] = node.workerinput  # type: ignore[attr-defined]
        name = str(worker["workerid"])
        if name not in _stacks:
            _give_stacks(_running, [name])
        stack = _stacks[name]
        worker["bide_stack"] = (stack.database_url, stack.amqp_url)


def _needs_servers(config: pytest.Config) -> bool:
    unit = (ROOT / "tests" / "unit").resolve()
    paths = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return not config.option.collectonly and not all(path.is_relative_to(unit) for path in paths)


def _environ() -> dict[str, str]:
    """Our own servers always: tests stop them. In containers if BIDE_TEST_STACK=docker."""
    sources = "docker" if os.environ.get("BIDE_TEST_STACK") == "docker" else "installed,fetched"
    return {"BIDE_LOCAL_SERVERS": sources, **os.environ}


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    return folder


def make_template(running: Servers) -> None:
    """Create the database that every worker's is cloned from: roles and all migrations."""
    url = running.postgres.create_database(TEMPLATE)
    apply_roles(url)
    with ThreadPoolExecutor(1) as thread:  # asyncio.run would take the loop of pytest-asyncio out of this one
        thread.submit(asyncio.run, _migrate(url)).result()


async def _migrate(url: str) -> None:
    stack = Stack(url, "amqp://unused")
    for service in SERVICES:
        async with open_pool(stack.settings(service)) as pool:
            own = read_migrations(service, ROOT / "services" / service / "migrations")
            await migrate(pool, [*read_migrations("shared", SHARED_MIGRATIONS), *own])


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Stack:
    """This worker's database and vhost on the servers that all workers share: do not stop those."""
    given = getattr(request.config, "workerinput", {}).get("bide_stack")
    if given is not None:
        return Stack(*given)
    assert "main" in _stacks, "these tests need the servers: run pytest on their folder"
    return _stacks["main"]


@pytest.fixture(scope="session")
def own_servers() -> Iterator[Servers]:
    """Servers of this worker alone, which a test may stop, kill and freeze, if it mends them afterwards."""
    folder = Path(tempfile.mkdtemp(dir=_made(Path(tempfile.gettempdir()) / f"bide-tests-{os.getuid()}"), prefix="own-"))
    with servers(folder, durable=False, report=_report, environ=_environ()) as running:
        make_template(running)
        yield running


@pytest.fixture
async def pool(stack: Stack) -> AsyncIterator[Pool]:
    """The queue service's pool on this worker's database."""
    async with open_pool(stack.settings()) as opened:
        yield opened


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(stack.database_url)
    yield connection
    await connection.close()


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 30.0) -> None:
    """Come back when `condition` holds; for what another process does and no signal tells."""
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)
