"""What a test hears on the bus in the place of a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from shared import topology
from shared.batches import decode_batch
from shared.facts import Fact
from tests.conftest import Stack

FactT = TypeVar("FactT", bound=Fact)


@asynccontextmanager
async def listening(stack: Stack, kind: type[FactT], reader: str = "queue") -> AsyncIterator[list[FactT]]:
    """What arrives in this reader's queue of this fact, as the broker hands it out, repeats and all."""
    found: list[FactT] = []
    connection = await aio_pika.connect(stack.amqp_url)
    async with connection:
        channel = await connection.channel()
        await topology.declare(channel)
        queue = await channel.get_queue(topology.route(kind, reader).queue(""))
        await queue.purge()

        async def read(message: AbstractIncomingMessage) -> None:
            facts, unreadable = decode_batch(kind, message.body)
            assert not unreadable, unreadable
            found.extend(facts)
            await message.ack()

        await queue.consume(read)
        yield found
