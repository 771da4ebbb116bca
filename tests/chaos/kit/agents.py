"""An agent as a process of its own: one that really dies, and is started again as whoever runs agents would do it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from bide_agent.record import Received
from tests.chaos.kit.looking import known
from tests.chaos.kit.processes import Fault, Ring
from tests.conftest import ROOT, until
from tests.e2e.operated import lines


@dataclass(eq=False)
class AgentProcess:
    """One workspace and the agent in it; each start is a new life, told by what it wrote down (`record`)."""

    workspace: str
    ring: Ring
    folder: Path
    deaths: int = 0
    _process: asyncio.subprocess.Process | None = None

    @property
    def received(self) -> Sequence[Received]:
        """Every message that began a turn, in all lives; one that it did not survive has no end."""
        found: dict[tuple[str | None, float], Received] = {}
        for said in lines(self._record):
            if said["event"] in {"begin", "end"}:
                found[said["message_id"], said["started_at"]] = _received(said)
        return list(found.values())

    async def start(self, *behaviour: str, work_s: float = 0.1) -> None:
        """Start it; come back when the queue service has heard that it registered."""
        assert self._process is None, f"{self.workspace} runs"
        ready = self.ring.ready
        arguments = [
            "--workspace", self.workspace, "--bide", ready.proxy, "--token", ready.admin_token, "--heartbeat-s", "1",
            "--work-s", str(work_s), "--record", str(self._record),
        ]  # fmt: skip
        for word in behaviour:
            arguments += ["--behaviour", word]
        said = self.folder / "said"
        with (self.folder / "log").open("ab") as log, said.open("wb") as out:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bide_agent", *arguments,
                cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=log,
            )  # fmt: skip

        async def serves() -> bool:
            return said.read_text().endswith("\n")

        await until(serves)
        await known(self.ring, self, "url", json.loads(said.read_text())["url"])

    async def died(self) -> int:
        """Wait for its death; return the exit code."""
        assert self._process is not None
        code = await self._process.wait()
        self._process = None
        self.deaths += 1
        now = time.monotonic()
        self.ring.faults.append(Fault("died", "agent", now, now))
        return code

    async def kill(self) -> None:
        """SIGKILL: the kernel ends its connections in mid-turn."""
        assert self._process is not None
        self._process.kill()
        await self.died()

    async def supervise(self, *behaviour: str) -> None:
        """Start it again whenever it dies, for ever."""
        while True:
            await self.died()
            await self.start(*behaviour)

    async def has(self, message_id: str, times: int = 1, within_s: float = 60.0) -> None:
        """Come back when a message has begun so many turns."""

        async def enough() -> bool:
            return sum(each.message_id == message_id for each in self.received) >= times

        await until(enough, within_s)

    async def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    @property
    def _record(self) -> Path:
        return self.folder / "record.jsonl"


def _received(said: dict[str, Any]) -> Received:
    return Received(
        workspace=said["workspace"],
        body=b64decode(said["body_b64"] or ""),
        message_id=said["message_id"],
        queue_id=said["queue_id"],
        delivery=said["delivery"],
        text=said["text"],
        started_at=said["started_at"],
        ended_at=said["ended_at"],
        outcome=said["outcome"],
    )


@asynccontextmanager
async def agent_process(ring: Ring, *behaviour: str, work_s: float = 0.1) -> AsyncIterator[AgentProcess]:
    """An agent that serves, for the length of the block."""
    with TemporaryDirectory(prefix="bide-agent-", ignore_cleanup_errors=True) as folder:
        made = AgentProcess(f"p-{uuid4().hex[:8]}", ring, Path(folder))
        await made.start(*behaviour, work_s=work_s)
        try:
            yield made
        finally:
            await made.close()
