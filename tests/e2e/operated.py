"""A stack whose agents liveness runs, by the operator's file, and what those agents note of themselves."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import ROOT, Ready, up


@dataclass(frozen=True, slots=True)
class Operated(Ready):
    """A stack whose agents liveness runs, by the operator's file."""

    folder: Path
    entries: dict[str, str] = field(default_factory=dict)

    def let_run(self, name: str, *behaviour: str, work_s: float = 600.0) -> Path:
        """Write how this workspace's agent is run; return the file in which it notes what it gets."""
        record = self.folder / f"{name}.jsonl"
        words = [
            sys.executable, "-m", "bide_agent", "--workspace", name, "--bide", self.proxy, "--token", self.admin_token,
            "--heartbeat-s", "1", "--work-s", f"{work_s:g}", "--record", str(record), "--state-dir", str(self.folder),
            *(word for each in behaviour for word in ("--behaviour", each)),
        ]  # fmt: skip
        self.let_run_line(name, words)
        return record

    def let_run_line(self, name: str, words: list[str]) -> None:
        """Write or mend any line, in a file that is never half there."""
        command = ", ".join(json.dumps(word) for word in words)
        self.entries[name] = f'[agents."{name}"]\ncommand = [{command}]\ncwd = {json.dumps(str(ROOT))}\nstop_s = 1.0\n'
        new = self.folder / "agents.toml.new"
        new.write_text("".join(self.entries.values()))
        new.replace(self.folder / "agents.toml")

    def pid(self, name: str) -> int | None:
        """The process that liveness started there last."""
        try:
            return int(json.loads((self.folder / "run" / f"{name}.json").read_text())["pid"])
        except FileNotFoundError:
            return None

    def end(self, name: str) -> None:
        """End what liveness started there, as the kernel's out-of-memory killer would."""
        pid = self.pid(name)
        assert pid is not None, f"{name} was never started"
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


@contextmanager
def operated(**settings: str) -> Iterator[Operated]:
    """One, for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="bide-agents-", ignore_cleanup_errors=True) as folder:
        files = {
            "BIDE_LIVENESS_AGENTS_FILE": f"{folder}/agents.toml",
            "BIDE_LIVENESS_AGENTS_FOLDER": f"{folder}/run",
            "BIDE_LIVENESS_SETTLE_S": "0",
        }
        Path(folder, "agents.toml").write_text("")
        with up(**files, **settings) as ready:
            yield Operated(ready.proxies, ready.admin_token, ready.pids, ready.database_url, Path(folder))


def lines(record: Path) -> list[dict[str, Any]]:
    """What the agent has noted. A line that is being written has no end yet."""
    said = record.read_text() if record.exists() else ""
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith("\n")]
