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

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.liveness.__main__ import main
from services.liveness.answers import Answers
from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import Driver, Exit, FencedError, Killed, Target
from services.liveness.drivers.process import ProcessDriver
from services.liveness.handlers import Handlers
from services.liveness.loops.looks import Looks
from services.liveness.restart.carry import Restarts
from services.liveness.settings import Settings
from shared.database import Pool, transact
from shared.facts import (
    FLEET,
    Fact,
    FactT,
    LivenessQuery,
    ProxyBeat,
    QueryAnswered,
    SessionKill,
    WorkspaceChanged,
    WorkspaceEvidence,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
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
        driver._end(name, driver._starts.last(name), 0.0)
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


async def emptied(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    await pool.execute(f"TRUNCATE {TABLES}")


async def restart_rows(pool: asyncpg.Pool[asyncpg.Record], workspace_id: str) -> list[asyncpg.Record]:
    return await pool.fetch("SELECT * FROM restarts WHERE workspace_id = $1 ORDER BY decided_at", workspace_id)


async def agent_row(pool: asyncpg.Pool[asyncpg.Record], workspace_id: str) -> asyncpg.Record:
    row = await pool.fetchrow("SELECT * FROM agents WHERE workspace_id = $1", workspace_id)
    assert row is not None
    return row


class FakeEngine:
    """An engine in memory, shared by the replicas of a test; it keeps the fence as a real one does."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.says: dict[str, Observation] = {}
        """What it claims to see, whatever is true."""
        self.calls: list[tuple[str, str, int]] = []
        """Each call that did something: verb, workspace, fence."""
        self.lists = 0
        self.fails: list[Exception] = []
        """Raised by the next calls."""
        self.before_call: asyncio.Event | None = None
        """Calls wait for it."""
        self.called = asyncio.Event()
        self.most_at_once = 0
        self._at_once = 0
        self._count = 0

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        self.lists += 1
        return {target.workspace_id: self._look(target.workspace_id) for target in targets}

    async def inspect(self, target: Target) -> Observation:
        return self._look(target.workspace_id)

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        await self._wait()
        name = target.workspace_id
        if self.fences.get(name, 0) > fence:
            raise FencedError("a later one")
        if self.fences.get(name) == fence:
            return self._look(name)
        if name in self.running and self.running[name] != expected:
            raise FencedError("another runs")
        self.fences[name] = fence
        self.calls.append(("restart", name, fence))
        return Observation(Seen.RUNNING, self.start(name), datetime.now(UTC))

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        await self._wait()
        if target.workspace_id not in self.running:
            return Killed.GONE
        if self.running[target.workspace_id] != expected:
            return Killed.REPLACED
        self.calls.append(("kill", target.workspace_id, fence))
        del self.running[target.workspace_id]
        return Killed.APPLIED

    async def exits(self) -> AsyncIterator[Exit]:
        await asyncio.Event().wait()
        yield Exit("", "")

    async def close(self) -> None:
        pass

    def start(self, name: str) -> str:
        self._count += 1
        self.running[name] = f"c{self._count}"
        return self.running[name]

    def crash(self, *names: str) -> None:
        for name in names:
            del self.running[name]

    def _look(self, name: str) -> Observation:
        if name in self.says:
            return self.says[name]
        if name in self.running:
            return Observation(Seen.RUNNING, self.running[name])
        return Observation(Seen.NOT_FOUND, why="it is not there")

    async def _wait(self) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        self.called.set()
        try:
            if self.before_call is not None:
                await self.before_call.wait()
            if self.fails:
                raise self.fails.pop(0)
        finally:
            self._at_once -= 1


class Replica:
    """One replica's handlers and loops, called directly; the outbox is read instead of the bus."""

    def __init__(self, settings: Settings, pool: Pool, engine: Driver, *, called: str = "process") -> None:
        self.pool = pool
        self.settings = settings
        drivers = {called: engine}
        self.restarts = Restarts(settings, pool, drivers, told=_nothing)
        self.looks = Looks(settings, pool, drivers, died=_nothing, told=_nothing)
        self.handlers = Handlers(drivers if settings.mode == "act" else (), _nothing, _nothing)
        self.answers = Answers(settings, self, _nothing)  # type: ignore[arg-type]
        self._said: list[QueryAnswered] = []

    def post(self, fact: Fact, *, to: str | None = None) -> None:
        """What loops and answers call of a publisher."""
        if isinstance(fact, QueryAnswered):
            assert to
            self._said.append(fact)

    async def hear(self, *facts: Fact) -> None:
        """Give each fact to its handler, as the reader would."""
        handlers: dict[type[Fact], Any] = {
            WorkspaceRegistered: self.handlers.registered, WorkspaceChanged: self.handlers.registered,
            WorkspaceRemoved: self.handlers.removed, WorkspaceHeartbeat: self.handlers.heartbeats,
            WorkspaceEvidence: self.handlers.evidence, ProxyBeat: self.handlers.proxy_beats,
            SessionKill: self.handlers.kill,
        }  # fmt: skip
        for fact in facts:
            await transact(self.pool, lambda connection, fact=fact: handlers[type(fact)](connection, [fact]))  # type: ignore[misc]

    async def ask(self, workspace_id: str, verb: str, **about: Any) -> tuple[int, dict[str, Any]]:
        values = {
            "workspace_id": workspace_id, "rev": 1, "query_id": uuid7(), "verb": verb, "by": "anna", "reply_to": "r",
            "expires_at": datetime.now(UTC) + timedelta(minutes=1), **about,
        }  # fmt: skip
        question = LivenessQuery.model_validate(values)
        (await transact(self.pool, lambda connection: self.answers.query(connection, [question])))()
        said = self._said.pop()
        return said.status, json.loads(said.body)

    async def look(self, now: datetime | None = None) -> None:
        """Look at every agent, whenever it is due."""
        await self.pool.execute("UPDATE agents SET next_check_at = 'epoch' WHERE next_check_at IS NOT NULL")
        await self.looks.look(now)

    async def restart(self, now: datetime | None = None) -> None:
        """Begin what is due, and come back when the driver has answered."""
        await self.restarts.run_once(now)
        await self.restarts.settled()

    async def up(self, engine: FakeEngine | None, *names: str, **about: Any) -> None:
        """Agents that run (in `engine`, or already), were heard, and have been stable for long."""
        await self.hear(ProxyBeat(workspace_id=FLEET, rev=1, proxy_id="p1"))
        for name in names:
            await self.hear(registration(name, **about))
            if engine is not None:
                engine.start(name)
        await self.look()
        await self.pool.execute(
            "UPDATE proxies SET since_at = now() - interval '1 day', beat_at = now() + interval '1 day'"
        )

    async def told(self, kind: type[FactT]) -> list[FactT]:
        rows = await self.pool.fetch("SELECT fact FROM outbox WHERE fact_type = $1 ORDER BY id", kind.__name__)
        return [kind.model_validate_json(row["fact"]) for row in rows]

    async def silence(self, *names: str, seconds: float = 300) -> None:
        """Let these not have been heard for so long."""
        await self.pool.execute(
            "UPDATE agents SET heard_at = now() - make_interval(secs => $2) WHERE workspace_id = ANY($1)",
            list(names), float(seconds),
        )  # fmt: skip


def _nothing() -> None:
    pass
