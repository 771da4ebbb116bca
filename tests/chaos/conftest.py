"""Servers that a test may stop, and on them a database and a vhost for each test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count

import pytest

from deploy.local.servers import Servers
from tests.conftest import TEMPLATE, Stack

LONG = os.environ.get("BIDE_TEST_LONG") == "1"
"""`make test-chaos-long`: outages of 60 to 90 s and the large counts."""
_VHOSTS = 60


def away_s(short: float, long: float = 75.0) -> float:
    """How long something is away: as the issue of the failure matrix says, or longer in the long run."""
    return long if LONG else short


@pytest.fixture(scope="session")
def vhosts(own_servers: Servers) -> Iterator[str]:
    """AMQP URLs, one for each test; made in one call, because each costs a start of RabbitMQ's tools."""
    return iter(own_servers.rabbitmq.vhosts([f"chaos{number}" for number in range(_VHOSTS)]))


_numbers = count()


@pytest.fixture
async def faulty(own_servers: Servers, vhosts: Iterator[str]) -> AsyncIterator[Stack]:
    """A database and a vhost of this test alone, on servers that it may stop, kill and freeze."""
    async with _made(own_servers, vhosts) as stack:
        yield stack


@pytest.fixture
async def beside(own_servers: Servers, vhosts: Iterator[str]) -> AsyncIterator[Stack]:
    """Another database and vhost on the same servers: what the fault must not have changed, to compare with."""
    async with _made(own_servers, vhosts) as stack:
        yield stack


@asynccontextmanager
async def _made(own_servers: Servers, vhosts: Iterator[str]) -> AsyncIterator[Stack]:
    name = f"chaos_{next(_numbers)}"
    url = await asyncio.to_thread(own_servers.postgres.create_database, name, TEMPLATE)
    try:
        yield Stack(url, next(vhosts))
    finally:
        await asyncio.to_thread(_mend, own_servers)
        await asyncio.to_thread(own_servers.postgres.drop_database, name)


def _mend(servers: Servers) -> None:
    """What a failed test left stopped or frozen must not fail the next."""
    for server in (servers.postgres, servers.rabbitmq):
        if not server.is_running():
            server.start()
        server.resume()
