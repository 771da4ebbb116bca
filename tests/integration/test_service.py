"""A service from outside: it waits for its servers, says when it cannot start, and stops when told, come what may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.local.servers import Servers
from tests.conftest import TEMPLATE, Stack, until

ROOT = Path(__file__).parents[2]
STOP_LIMIT_S = 20.0


class Process:
    """`python -m services.scheduler` with these variables; `said` grows with its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[dict[str, object]] = []
        self.raw: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.raw.append(line.decode())
            with contextlib.suppress(ValueError):
                self.said.append(json.loads(line))

    async def event(self, name: str) -> dict[str, object]:
        async def said() -> bool:
            return any(line["event"] == name for line in self.said)

        await until(said)
        return next(line for line in self.said if line["event"] == name)

    async def ended(self, within_s: float = STOP_LIMIT_S) -> int:
        async with asyncio.timeout(within_s):
            code = await self.process.wait()
        await self._reader
        return code

    async def ready(self) -> dict[str, str]:
        url = str((await self.event("listening"))["url"])
        return await asyncio.to_thread(readyz, url)


def readyz(url: str) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            found: dict[str, str] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())
        error.close()
    return found


@asynccontextmanager
async def service(stack: Stack, **variables: str) -> AsyncIterator[Process]:
    settings = stack.settings("scheduler")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BIDE_")}
    own = {
        "BIDE_DATABASE_URL": settings.database_url.get_secret_value(),
        "BIDE_AMQP_URL": settings.amqp_url.get_secret_value(),
        **variables,
    }
    process = Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.scheduler", cwd=ROOT, env={**environ, **own},
            stderr=asyncio.subprocess.PIPE,
        )
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.process.returncode is None:
            process.process.kill()
        await process.ended()


async def test_it_gets_ready_and_stops_when_told(stack: Stack) -> None:
    async with service(stack) as process:
        await process.event("ready")
        assert (await process.ready())["status"] == "ready"
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.said[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    ("variables", "code", "word"),
    [
        ({"BIDE_HTPP_PORT": "1"}, 2, "did you mean BIDE_HTTP_PORT?"),
        ({"BIDE_DATABASE_URL": "postgresql://bide_scheduler:wrong@{host}/bide"}, 1, "password"),
        ({"BIDE_AMQP_URL": "amqp://bide:wrong@{broker}/main"}, 1, "cannot_start"),
        ({"BIDE_HTTP_HOST": "192.0.2.1"}, 1, "cannot_start"),
    ],
    ids=["unknown setting", "wrong database password", "wrong broker password", "address of another machine"],
)
async def test_what_cannot_work_is_said_in_a_sentence(
    stack: Stack, variables: dict[str, str], code: int, word: str
) -> None:
    host = stack.database_url.rpartition("@")[2].partition("/")[0]
    broker = stack.amqp_url.rpartition("@")[2].partition("/")[0]
    filled = {name: value.format(host=host, broker=broker) for name, value in variables.items()}
    async with service(stack, **filled) as process:
        assert await process.ended() == code
    said = "".join(process.raw)
    assert word in said
    assert "Traceback" not in said


async def _silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that takes the connection and says nothing."""
    try:
        await asyncio.Event().wait()
    finally:
        writer.close()


@pytest.mark.parametrize("silent", ["BIDE_DATABASE_URL", "BIDE_AMQP_URL"])
async def test_it_stops_also_while_it_waits_for_a_server_that_does_not_answer(stack: Stack, silent: str) -> None:
    """B-30: the driver takes a cancel during its first attempt for a lost connection, and would go on for ever."""
    server = await asyncio.start_server(_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = {
        "BIDE_DATABASE_URL": f"postgresql://u:p@127.0.0.1:{port}/d",
        "BIDE_AMQP_URL": f"amqp://u:p@127.0.0.1:{port}/",
    }
    async with service(stack, **{silent: url[silent]}) as process:
        await process.event("listening")
        await asyncio.sleep(1)  # let it be in the middle of its attempt
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0
    server.close()


@pytest.fixture
async def own(own_servers: Servers) -> AsyncIterator[Stack]:
    url = await asyncio.to_thread(own_servers.postgres.create_database, "service", TEMPLATE)
    yield Stack(url, own_servers.rabbitmq.url)
    await asyncio.to_thread(own_servers.postgres.drop_database, "service")


@pytest.mark.parametrize("server", ["postgres", "rabbitmq"])
async def test_a_frozen_server_shows_in_readyz_each_time_and_does_not_hold_the_stop(
    own: Stack, own_servers: Servers, server: str
) -> None:
    """B-25: asked again and again, it is never answered from memory."""
    frozen = getattr(own_servers, server)
    async with service(own, BIDE_DRAIN_S="1") as process:
        await process.event("ready")
        assert (await process.ready())["status"] == "ready"
        await asyncio.to_thread(frozen.pause)
        try:

            async def shows() -> bool:  # the last answer may be half a second old
                return "no answer" in (await process.ready())[server]

            await until(shows)
            assert await shows()
            assert await shows()
            process.process.send_signal(signal.SIGTERM)
            assert await process.ended(40) == 0
        finally:
            await asyncio.to_thread(frozen.resume)


async def test_a_broker_that_lost_its_data_is_set_up_again(own: Stack, own_servers: Servers) -> None:
    """B-26: queues and exchange are gone; a publisher without any reader makes them again."""
    from shared.broker import NotPublished, PublishUnknown, open_publisher  # noqa: PLC0415
    from tests.integration.conftest import stop  # noqa: PLC0415

    name = "wiped"
    url = await asyncio.to_thread(own_servers.rabbitmq.vhost, name)
    stack = Stack(own.database_url, url)
    async with open_publisher(stack.settings()) as publisher:
        await publisher.publish(stop("before"))
        await wipe(url)
        await asyncio.to_thread(own_servers.rabbitmq.kill)
        await asyncio.to_thread(own_servers.rabbitmq.start)

        async def published() -> bool:
            try:
                await publisher.publish(stop("after"))
            except (NotPublished, PublishUnknown):
                return False
            return True

        await until(published)


async def wipe(url: str) -> None:
    """Delete what the topology declares, as a broker with an empty disk has it."""
    import aio_pika  # noqa: PLC0415

    from shared import topology  # noqa: PLC0415

    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        for route in topology.ROUTES:
            if route.kind is not topology.Kind.REPLICA:
                await channel.queue_delete(route.queue(""))
        await channel.queue_delete(topology.DEAD_QUEUE)
        await channel.exchange_delete(topology.EXCHANGE)
