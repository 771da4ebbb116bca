"""Liveness under test: its steps on its rows, agents under the process driver, and the service on the real bus."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractIncomingMessage
from uuid_utils.compat import uuid7

from services.liveness.__main__ import main
from services.liveness.drivers.process import ProcessDriver
from services.liveness.settings import Settings
from shared import topology
from shared.batches import decode_batch
from shared.facts import (
    FactT,
    SessionKill,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
)
from shared.processes import Mark, is_alive, mark_of
from tests.conftest import Stack

TABLES = "agents, evidence, restarts, orders, proxies, audit, outbox, inbox, dead_letters"
WAITING = "import signal; signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
PARENT = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
print(child.pid, flush=True)
signal.pause()
"""


def liveness_settings(stack: Stack, **changes: object) -> Settings:
    values = {**stack.settings("liveness").model_dump(), "log_level": "warning", "settle_s": 0.0, **changes}
    if "replica_id" not in changes:
        values.pop("replica_id")
    return Settings.model_validate(values)


@asynccontextmanager
async def liveness_service(stack: Stack, **changes: object) -> AsyncIterator[asyncio.Task[None]]:
    """The service itself, in this process; at the end it is told to stop as by SIGTERM."""
    task = asyncio.create_task(main(liveness_settings(stack, **{"drain_s": 5.0, **changes})))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@dataclass
class AgentsFile:
    """The operator's file, and the folder of a process driver."""

    root: Path
    agents: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.root / "agents.toml"

    @property
    def folder(self) -> Path:
        return self.root / "agents"

    def add(self, workspace_id: str, code: str = WAITING, **about: Any) -> None:
        """Let the operator write down how this agent is run: as a line of Python."""
        self.agents[workspace_id] = {"command": [sys.executable, "-u", "-c", code], "cwd": str(self.root), **about}
        self.write()

    def write(self) -> None:
        lines = []
        for name, about in self.agents.items():
            lines.append(f'[agents."{name}"]')
            lines += [f"{key} = {_toml(value)}" for key, value in about.items()]
        self.path.write_text("\n".join(lines) + "\n")

    def settings(self) -> dict[str, object]:
        return {"agents_file": self.path, "agents_folder": self.folder}

    def driver(self) -> ProcessDriver:
        return ProcessDriver(self.path, self.folder)

    def mark(self, workspace_id: str) -> Mark | None:
        """The process that was started last."""
        try:
            said = json.loads((self.folder / f"{workspace_id}.json").read_text())
        except FileNotFoundError:
            return None
        return Mark(said["pid"], said["start_ticks"])

    def find(self, pid: int) -> Mark | None:
        return mark_of(pid)

    def runs(self, workspace_id: str) -> bool:
        mark = self.mark(workspace_id)
        return mark is not None and is_alive(mark)

    def said(self, workspace_id: str) -> str:
        return (self.folder / f"{workspace_id}.log").read_text()


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return str(value)


@pytest.fixture
def agents(tmp_path: Path) -> Any:
    """An operator's file of agents; whatever they started is ended afterwards."""
    file = AgentsFile(tmp_path)
    file.write()
    yield file
    driver = file.driver()
    for name in file.agents:
        driver._end(name, driver._last_start(name), 0.0)
    for child in tuple(driver._children):
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def registration(workspace_id: str, *, rev: int = 1, incarnation: int = 1, **about: Any) -> WorkspaceRegistered:
    return WorkspaceRegistered.model_validate(_registration(workspace_id, rev, incarnation, about))


def change(workspace_id: str, *, rev: int, incarnation: int = 1, **about: Any) -> WorkspaceChanged:
    return WorkspaceChanged.model_validate(_registration(workspace_id, rev, incarnation, about))


def _registration(workspace_id: str, rev: int, incarnation: int, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "workspace_id": workspace_id, "rev": rev, "incarnation": incarnation, "url": "http://127.0.0.1:9/",
        "runtime": {"driver": "process"}, **about,
    }  # fmt: skip


def beat(workspace_id: str, *, incarnation: int = 1, **about: Any) -> WorkspaceHeartbeat:
    values = {
        "workspace_id": workspace_id, "rev": int(datetime.now(UTC).timestamp() * 1e6), "incarnation": incarnation,
        "active_tasks": 0, **about,
    }  # fmt: skip
    return WorkspaceHeartbeat.model_validate(values)


def kill_order(workspace_id: str, *, incarnation: int = 1, session_id: str = "s1", **about: Any) -> SessionKill:
    values = {
        "workspace_id": workspace_id, "rev": 7, "session_id": session_id, "incarnation": incarnation,
        "order_id": uuid7(), "expires_at": datetime.now(UTC) + timedelta(minutes=2), **about,
    }  # fmt: skip
    return SessionKill.model_validate(values)


@asynccontextmanager
async def listening(stack: Stack, kind: type[FactT], reader: str = "queue") -> AsyncIterator[list[FactT]]:
    """What arrives in a reader's queue of this fact."""
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


async def emptied(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    await pool.execute(f"TRUNCATE {TABLES}")


async def restart_rows(pool: asyncpg.Pool[asyncpg.Record], workspace_id: str) -> list[asyncpg.Record]:
    return await pool.fetch("SELECT * FROM restarts WHERE workspace_id = $1 ORDER BY decided_at", workspace_id)


async def agent_row(pool: asyncpg.Pool[asyncpg.Record], workspace_id: str) -> asyncpg.Record:
    row = await pool.fetchrow("SELECT * FROM agents WHERE workspace_id = $1", workspace_id)
    assert row is not None
    return row


def fresh_id() -> UUID:
    return uuid7()
