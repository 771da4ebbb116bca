"""What liveness started on a local stack ends with the stack, and nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deploy.local.ledger import Ledger
from deploy.local.teardown import AGENTS, end_all
from shared.processes import Mark, is_alive, mark_of

MACHINE = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize(
    ("start_off", "machine", "ends"),
    [(0, MACHINE, True), (1, MACHINE, False), (0, "another boot", False)],
    ids=["an agent", "a stranger with its pid", "of another boot of the machine"],
)
def test_an_agent_ends_with_its_stack_and_a_stranger_does_not(
    tmp_path: Path, start_off: int, machine: str, ends: bool
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    mark = mark_of(child.pid)
    assert mark is not None
    remembered: Mark = replace(mark, start_ticks=mark.start_ticks + start_off)
    (tmp_path / AGENTS).mkdir()
    (tmp_path / AGENTS / "w1.json").write_text(json.dumps(asdict(remembered) | {"machine": machine, "fence": 1}))
    (tmp_path / AGENTS / "w2.json").write_text("torn")
    with Ledger(tmp_path) as ledger:
        assert end_all(ledger, lambda _: None) is ends
    assert is_alive(mark) is not ends
    if not ends:
        os.kill(child.pid, signal.SIGKILL)
    child.wait()
