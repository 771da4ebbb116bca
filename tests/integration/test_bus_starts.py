"""A broker that dies while a service connects to it: nobody may fall over it, at whichever answer it happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from shared.broker import open_publisher
from shared.consumer import Reader
from shared.database import open_pool
from shared.facts import SessionStop
from shared.inbox import Inbox
from tests.conftest import Stack
from tests.integration.conftest import stop, write_effects

_HEAD_BYTES = 7
OPENING_A_CHANNEL = 3
"""The greeting is three answers long."""


class _Dying:
    """Stands before the broker: lets `answers` through and closes; whoever comes after that meets no fault."""

    def __init__(self, host: str, port: int, answers: int) -> None:
        self._target = (host, port)
        self._answers = answers
        self._serving: set[asyncio.Task[None]] = set()
        self.died = False

    def accept(self, process: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(process, back)))

    async def end(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, process: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        broker, to_broker = await asyncio.open_connection(*self._target)
        up = asyncio.create_task(_copy(process, to_broker))
        try:
            while self.died or self._answers:
                back.write(await _frame(broker))
                self._answers -= 1
        except (OSError, asyncio.IncompleteReadError):
            pass  # one of the two has gone
        finally:
            self.died = True
            up.cancel()
            for writer in (back, to_broker):
                writer.close()
            for writer in (back, to_broker):
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(65_536):
            target.write(chunk)


async def _frame(source: asyncio.StreamReader) -> bytes:
    head = await source.readexactly(_HEAD_BYTES)
    return head + await source.readexactly(int.from_bytes(head[3:]) + 1)


@asynccontextmanager
async def dying(stack: Stack, answers: int) -> AsyncIterator[tuple[Stack, _Dying]]:
    """The same stack behind a broker that dies once, after so many answers."""
    url = urlsplit(stack.amqp_url)
    before = _Dying(str(url.hostname), int(url.port or 0), answers)
    server = await asyncio.start_server(before.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Stack(stack.database_url, stack.amqp_url.replace(f":{url.port}/", f":{port}/")), before
    finally:
        server.close()
        await before.end()


@pytest.mark.parametrize("answers", [0, 1, 2, OPENING_A_CHANNEL, 10, 40])
async def test_a_publisher_whose_broker_dies_while_it_opens_begins_anew(clean: Stack, answers: int) -> None:
    async with dying(clean, answers) as (behind, before), open_publisher(behind.settings()) as publisher:
        assert before.died
        await publisher.publish(stop("after"))


@pytest.mark.parametrize("answers", [OPENING_A_CHANNEL, 6, 10])
async def test_a_reader_whose_broker_dies_while_it_begins_says_so(clean: Stack, answers: int) -> None:
    """Its process ends with a sentence and is started again: half a start cannot be taken back."""
    async with dying(clean, answers) as (behind, _), open_pool(behind.settings()) as pool:
        reader = Reader(behind.settings(), "queue", pool, Inbox(pool, keep_s=60))
        reader.store(SessionStop, write_effects)
        with pytest.raises(ConnectionError, match="RabbitMQ went away at the start"):
            await reader.start()
        await reader.stop()
