"""PostgreSQL and RabbitMQ, really running, from wherever they can be had.

Owns the pair; the tests' fixtures and the local stack both use it. Refuses to fake either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from deploy.local import containers, postgres, rabbitmq
from deploy.local.amqp import broker_version
from deploy.local.errors import StackError, UnavailableError
from deploy.local.fetch import Fetcher, cache_dir
from deploy.local.ledger import Ledger
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.postgres import Postgres
from deploy.local.rabbitmq import RabbitMQ
from deploy.local.roles import server_version
from deploy.local.run import GivenRun
from deploy.local.sources import first_available
from deploy.local.teardown import end_all, kill_all

Report = Callable[[str], None]


@dataclass(frozen=True)
class Servers:
    """Both servers, ready."""

    postgres: Postgres
    rabbitmq: RabbitMQ


@dataclass(frozen=True, kw_only=True)
class Place:
    """Everything a server is started with."""

    ledger: Ledger
    memory: Memory
    ports: Ports
    environ: Mapping[str, str]
    durable: bool
    report: Report


@contextmanager
def servers(
    data_dir: Path,
    *,
    durable: bool = False,
    report: Report = lambda _: None,
    databases: Sequence[str] = (),
    vhosts: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Servers]:
    """Start only the servers, on this data folder, and stop them at the end.

    What an earlier run left running on the folder is ended first. `durable=False` skips the disk's own confirmation
    (and lets a container's data go with it); killed servers lose nothing either way.
    """
    with Ledger(data_dir.absolute()) as ledger:
        end_all(ledger, report, verb="cleaned up")
        memory = Memory(ledger.data_dir)
        with Ports(memory) as ports:
            place = Place(ledger=ledger, memory=memory, ports=ports, environ=environ, durable=durable, report=report)
            try:
                pair = start_servers(place)
                for name in databases:
                    pair.postgres.create_database(name)
                if vhosts:
                    pair.rabbitmq.vhosts(vhosts)
                yield pair
            finally:
                ledger.refuse()
                end_all(ledger, report)


def start_servers(place: Place) -> Servers:
    """Start both at once; when one cannot be had, end the other and say why."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        sql = pool.submit(_start_postgres, place)
        broker = pool.submit(_start_rabbitmq, place)
        both: list[Future[Any]] = [sql, broker]
        done, _ = wait(both, return_when=FIRST_EXCEPTION)
        failures = [error for future in done if (error := future.exception()) is not None]
        if failures:
            place.ledger.refuse()
            kill_all(place.ledger)
            raise failures[0]
        return Servers(sql.result(), broker.result())


def _start_postgres(place: Place) -> Postgres:
    began_s = time.monotonic()

    def given() -> Postgres:
        url = place.environ.get("BIDE_DATABASE_URL")
        if not url:
            raise UnavailableError("BIDE_DATABASE_URL is not set")
        try:
            version = server_version(url)
        except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise StackError(f"the server of BIDE_DATABASE_URL cannot be used: {error}") from error
        return Postgres(url=url, source="url", run=GivenRun("BIDE_DATABASE_URL"), version=version)

    def in_docker() -> Postgres:
        return containers.start_postgres(
            place.ledger, place.memory, place.ports, environ=place.environ, durable=place.durable
        )

    def local(binaries: Path, source: str) -> Postgres:
        return postgres.start_local(
            place.ledger,
            place.memory,
            place.ports,
            binaries=binaries,
            source=source,
            durable=place.durable,
            report=place.report,
        )

    started = first_available(
        "PostgreSQL",
        {
            "url": given,
            "docker": in_docker,
            "installed": lambda: local(postgres.installed_binaries(place.environ), "installed"),
            "fetched": lambda: local(_fetcher(place).postgres(), "fetched"),
        },
        place.environ,
    )
    place.report(f"postgres {started.version} ({started.source}) ready  {time.monotonic() - began_s:.1f} s")
    return started


def _start_rabbitmq(place: Place) -> RabbitMQ:
    began_s = time.monotonic()

    def given() -> RabbitMQ:
        url = place.environ.get("BIDE_AMQP_URL")
        if not url:
            raise UnavailableError("BIDE_AMQP_URL is not set")
        try:
            version = broker_version(url)
        except (OSError, ValueError) as error:
            raise StackError(f"the broker of BIDE_AMQP_URL cannot be used: {error}") from error
        return RabbitMQ(url=url, source="url", run=GivenRun("BIDE_AMQP_URL"), version=version, control=None)

    def in_docker() -> RabbitMQ:
        return containers.start_rabbitmq(
            place.ledger, place.memory, place.ports, environ=place.environ, durable=place.durable
        )

    def local(installation: rabbitmq.Installation, source: str) -> RabbitMQ:
        return rabbitmq.start_local(place.ledger, place.memory, place.ports, installation=installation, source=source)

    started = first_available(
        "RabbitMQ",
        {
            "url": given,
            "docker": in_docker,
            "installed": lambda: local(rabbitmq.installed(), "installed"),
            "fetched": lambda: local(_fetcher(place).rabbitmq(), "fetched"),
        },
        place.environ,
    )
    place.report(f"rabbitmq {started.version} ({started.source}) ready  {time.monotonic() - began_s:.1f} s")
    return started


def _fetcher(place: Place) -> Fetcher:
    return Fetcher(cache_dir(place.environ, uid=os.geteuid()), place.report, place.ledger.is_refusing)
