"""The end of a stack, whoever asks for it: its own supervisor, `down` after a crash, the next `up`, the test sweep.

Ends what the record names, in the order it names, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from deploy.local.errors import StackError
from deploy.local.ledger import Ledger, in_stop_order, read_record
from shared.processes import Mark, end, is_alive, kill, send, wait_gone

AGENTS = "agents"
"""Folder of the process driver in the data folder."""
AGENTS_LIMIT_S = 10.0
SUPERVISOR_LIMIT_S = 90.0
"""How long `down` waits for a living supervisor: services 30 s, RabbitMQ 15 s, PostgreSQL 15 s, and room."""


def end_all(ledger: Ledger, report: Callable[[str], None], *, verb: str = "stopped") -> bool:
    """End every recorded process in order, then remove the containers; tell whether there was anything."""
    found = False
    for entries in in_stop_order(ledger.entries()):
        alive = [entry for entry in entries if is_alive(entry.mark)]
        if alive:
            found = True
            began_s = time.monotonic()
            end({one.mark: one.stop_signal for one in alive}, limit_s=max(one.stop_limit_s for one in alive))
            names = ", ".join(f"{one.name} (pid {one.mark.pid})" for one in alive)
            report(f"{verb} {names}  {time.monotonic() - began_s:.1f} s")
        ledger.strike([entry.mark for entry in entries])
    for container in ledger.containers():
        from deploy.local.containers import remove  # noqa: PLC0415 (only a stack with containers needs the client)

        found = True
        remove(container)
        ledger.strike_container(container)
        report(f"removed container {container.name}")
    if agents := _agents(ledger.data_dir):
        found = True
        end(dict.fromkeys(agents, signal.SIGTERM), limit_s=AGENTS_LIMIT_S)
        report(f"{verb} {len(agents)} agents that liveness had started")
    return found


def _agents(data_dir: Path) -> list[Mark]:
    """What liveness started on this folder and that still runs: agents outlive it, but not their stack."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    marks = []
    for path in sorted((data_dir / AGENTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(path.read_text(encoding="utf-8"))
            mark = Mark(int(said["pid"]), int(said["start_ticks"]))
            if said["machine"] == machine and is_alive(mark):
                marks.append(mark)
    return marks


def kill_all(ledger: Ledger) -> None:
    """SIGKILL everything at once."""
    kill([*(entry.mark for entry in ledger.entries()), *_agents(ledger.data_dir)])


def down(data_dir: Path, report: Callable[[str], None]) -> None:
    """End the stack of this folder: through its supervisor while that lives, else by the record."""
    if not data_dir.is_dir():
        report(f"nothing runs on {data_dir}")
        return
    try:
        supervisor = read_record(data_dir).supervisor
        if supervisor and is_alive(supervisor) and supervisor.pid != os.getpid():
            began_s = time.monotonic()
            send(supervisor, signal.SIGTERM)
            if wait_gone([supervisor], limit_s=SUPERVISOR_LIMIT_S):
                kill([supervisor])
            report(f"stopped the stack (pid {supervisor.pid})  {time.monotonic() - began_s:.1f} s")
            found = True
        else:
            found = False
        with Ledger(data_dir) as ledger:
            found = end_all(ledger, report, verb="ended") or found
    except PermissionError as error:
        raise StackError(
            f"the stack on {data_dir} belongs to another user ({error}); run `down` as that user"
        ) from error
    if not found:
        report(f"nothing runs on {data_dir}")


def sweep(root: Path, report: Callable[[str], None]) -> None:
    """End and delete the data folders directly below `root` whose supervisor is dead (crashed test runs)."""
    for lock in sorted(root.glob("*/lock")):
        folder = lock.parent
        try:
            with Ledger(folder) as ledger:
                end_all(ledger, report, verb="swept")
        except (StackError, PermissionError):
            continue  # Its lock is held: a living run.
        shutil.rmtree(folder, ignore_errors=True)
