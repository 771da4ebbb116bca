"""Every process and container that one stack started: spawned here, written down at once, ended from what is written.

Owns `<data>/processes.json` and `<data>/lock`. Whoever holds the lock is the supervisor of this data folder; what an
earlier one left behind is ended by the same code that ends our own. Refuses a second supervisor.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from deploy.local.errors import StackError
from deploy.local.memory import write_atomically
from deploy.local.process import Child, Command
from shared.processes import Mark, mark_of


@dataclass(frozen=True)
class Entry:
    """One line of the record: a process and how it wants to be stopped."""

    name: str
    mark: Mark
    stop_signal: int
    stop_limit_s: float
    stop_order: int


@dataclass(frozen=True)
class Container:
    """A container of ours; `volume` goes with it when it is set."""

    name: str
    id: str
    volume: str | None = None


@dataclass(frozen=True)
class Record:
    """What processes.json says."""

    supervisor: Mark | None
    entries: tuple[Entry, ...] = ()
    containers: tuple[Container, ...] = ()


class Ledger:
    """The living record of one data folder; threads may share it."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._path = data_dir / "processes.json"
        self._lock = threading.RLock()
        self._closed = False
        self.children: dict[str, Child] = {}
        # Others may pass through (PostgreSQL runs as nobody when we are root) but not look.
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        (data_dir / "log").mkdir(exist_ok=True, mode=0o700)
        self._lock_fd = take_lock(data_dir)
        self.leftovers = read_record(data_dir)
        self._containers = list(self.leftovers.containers)
        self._entries = {entry.mark: entry for entry in self.leftovers.entries}
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True) if not (self._entries or self._containers) else self._write()
        os.close(self._lock_fd)

    def spawn(self, command: Command) -> Child:
        """Start the command and write it down; StackError once `refuse` was called."""
        with self._lock:
            if self._closed:
                raise StackError(f"{command.name} is not started: the stack is stopping")
            child = Child(command)
            self._forget_ended(command.name)
            self.children[command.name] = child
            self._entries[child.mark] = Entry(
                command.name, child.mark, command.stop_signal, command.stop_limit_s, command.stop_order
            )
            self._write()
            return child

    def refuse(self) -> None:
        """Start nothing more: what a starting thread would still spawn must not outlive the stop."""
        with self._lock:
            self._closed = True

    def is_refusing(self) -> bool:
        """Tell whether the stack is stopping."""
        return self._closed

    def entries(self) -> list[Entry]:
        """Return what is written down, those that end first at the front."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: entry.stop_order)

    def containers(self) -> list[Container]:
        """Return the containers that are written down."""
        with self._lock:
            return list(self._containers)

    def strike(self, marks: Iterable[Mark]) -> None:
        """Take ended processes off the record, and reap those that were our children."""
        with self._lock:
            gone = set(marks)
            for name, child in list(self.children.items()):
                if child.mark in gone and child.exit_code() is not None:
                    child.close()
                    del self.children[name]
            self._entries = {mark: entry for mark, entry in self._entries.items() if mark not in gone}
            self._write()

    def add_container(self, container: Container) -> None:
        """Write down a container."""
        with self._lock:
            self._containers.append(container)
            self._write()

    def strike_container(self, container: Container) -> None:
        """Take a removed container off the record."""
        with self._lock:
            self._containers.remove(container)
            self._write()

    def _forget_ended(self, name: str) -> None:
        before = self.children.get(name)
        if before is not None:
            if before.exit_code() is None:
                raise StackError(f"{name} runs already (pid {before.mark.pid})")
            self.strike([before.mark])

    def _write(self) -> None:
        record = Record(mark_of(os.getpid()), tuple(self._entries.values()), tuple(self._containers))
        write_atomically(self._path, json.dumps({"boot": boot_id(), **asdict(record)}, indent=1))


def take_lock(data_dir: Path) -> int:
    """Lock the data folder for this process and return the descriptor that holds it."""
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        supervisor = read_record(data_dir).supervisor
        pid = supervisor.pid if supervisor else "unknown"
        raise StackError(
            f"a stack already runs on {data_dir} (pid {pid}); stop it with `python -m deploy.local down "
            f"--data-dir {data_dir}`, or start another with --data-dir"
        ) from None
    return fd


def read_record(data_dir: Path) -> Record:
    """Read processes.json; empty when there is none, or when it is from before the last boot."""
    try:
        value = json.loads((data_dir / "processes.json").read_text())
    except FileNotFoundError:
        return Record(None)
    except (OSError, ValueError) as error:
        raise StackError(f"cannot read {data_dir / 'processes.json'}: {error}") from error
    containers = tuple(Container(**one) for one in value["containers"])
    if value["boot"] != boot_id():  # No process outlives a boot, and start times count from it.
        return Record(None, (), containers)
    supervisor = Mark(**value["supervisor"]) if value["supervisor"] else None
    return Record(supervisor, tuple(_entry(one) for one in value["entries"]), containers)


def boot_id() -> str:
    """Return what tells one boot of this machine from the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _entry(value: dict[str, object]) -> Entry:
    mark = value.pop("mark")
    assert isinstance(mark, dict)
    return Entry(mark=Mark(**mark), **value)  # type: ignore[arg-type]


def in_stop_order(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Group entries by stop order, first to end first."""
    orders = sorted({entry.stop_order for entry in entries})
    return [[entry for entry in entries if entry.stop_order == order] for order in orders]
