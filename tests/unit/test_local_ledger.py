"""The record of a data folder: written at each spawn, exact, and one supervisor's only."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from deploy.local import ledger as ledger_module
from deploy.local.errors import StackError
from deploy.local.ledger import Container, Entry, Ledger, in_stop_order, read_record
from deploy.local.memory import Memory
from deploy.local.process import Command
from deploy.local.teardown import down, end_all, sweep
from shared.processes import Mark, is_alive, mark_of


def pausing(data_dir: Path, name: str = "one", stop_order: int = 0) -> Command:
    return Command(
        name=name,
        argv=[sys.executable, "-c", "import signal; signal.pause()"],
        env=os.environ,
        cwd=data_dir,
        log=data_dir / "log" / "one.log",
        stop_order=stop_order,
    )


def quiet(_line: str) -> None:
    pass


def test_a_spawned_process_is_on_record_until_it_is_ended(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        child = ledger.spawn(pausing(tmp_path))
        record = read_record(tmp_path)
        assert record.supervisor == mark_of(os.getpid())
        assert record.entries == (Entry("one", child.mark, signal.SIGTERM, 30.0, 0),)
        assert end_all(ledger, quiet)
        assert not is_alive(child.mark)
        assert read_record(tmp_path).entries == ()
        assert ledger.children == {}
    assert not (tmp_path / "processes.json").exists()


def test_what_a_dead_supervisor_left_is_ended_by_the_next(tmp_path: Path) -> None:
    with Ledger(tmp_path) as crashed:
        child = crashed.spawn(pausing(tmp_path))
    # The lock is free and the record names a living process: so it is after a crash.
    said: list[str] = []
    down(tmp_path, said.append)
    assert child.exit_code() == -signal.SIGTERM
    assert len(said) == 1
    assert said[0].startswith(f"ended one (pid {child.mark.pid})")
    child.close()


def test_a_record_from_before_the_last_boot_names_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.spawn(pausing(tmp_path))
        ledger.add_container(Container("postgres", "bide-1-postgres"))
        monkeypatch.setattr(ledger_module, "boot_id", lambda: "another")
        later = read_record(tmp_path)
        monkeypatch.undo()
        assert (later.supervisor, later.entries) == (None, ())
        assert later.containers == (Container("postgres", "bide-1-postgres"),)
        ledger.strike_container(later.containers[0])
        end_all(ledger, quiet)


def test_a_second_supervisor_is_refused_with_the_pid_and_the_way_out(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(StackError) as refused:
        Ledger(tmp_path)
    assert f"pid {os.getpid()}" in str(refused.value)
    assert "--data-dir" in str(refused.value)


def test_nothing_is_spawned_once_the_stack_stops(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.refuse()
        with pytest.raises(StackError, match="stopping"):
            ledger.spawn(pausing(tmp_path))


def test_the_sweep_takes_abandoned_folders_and_leaves_living_ones(tmp_path: Path) -> None:
    with Ledger(tmp_path / "abandoned") as abandoned:
        child = abandoned.spawn(pausing(tmp_path / "abandoned"))
    with Ledger(tmp_path / "living"):
        sweep(tmp_path, quiet)
        assert [path.name for path in tmp_path.iterdir()] == ["living"]
    assert child.exit_code() == -signal.SIGTERM
    child.close()


def test_services_end_before_the_broker_and_the_database_last() -> None:
    mark = Mark(1, 1)
    entries = [Entry(name, mark, 15, 1.0, order) for name, order in [("sql", 3), ("a", 0), ("amqp", 1), ("b", 0)]]
    assert [[one.name for one in group] for group in in_stop_order(entries)] == [["a", "b"], ["amqp"], ["sql"]]


def test_a_record_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_text("{")
    with pytest.raises(StackError, match=r"processes\.json"):
        read_record(tmp_path)


def test_memory_outlives_its_object_and_is_nobody_elses(tmp_path: Path) -> None:
    assert Memory(tmp_path).recall_or_make("token", lambda: "first") == "first"
    assert Memory(tmp_path).recall_or_make("token", lambda: "second") == "first"
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "state.json").read_text()) == {"token": "first"}


def test_memory_does_not_overwrite_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("not json")
    with pytest.raises(StackError, match=r"state\.json"):
        Memory(tmp_path)
