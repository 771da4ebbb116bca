"""What an agent remembers of items beyond its own life: their answers, and what was saved of unfinished ones.

One SQLite file per workspace, or memory. Bounded: the newest of each are kept, by number and by size. A file that
cannot be written costs the memory of that answer and never the answer; one that is broken is set aside, and costs what
it remembered.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

REMEMBERED = 1000
BYTES_MAX = 64 * 1024 * 1024
STATE_BYTES_MAX = 1024 * 1024
"""What `session.save` takes at once."""
BUSY_S = 10.0
"""How long another process may hold the file."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (queue_id TEXT PRIMARY KEY, task_id TEXT, at REAL NOT NULL, said BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS answers_by_task ON answers (task_id);
CREATE TABLE IF NOT EXISTS saved (queue_id TEXT PRIMARY KEY, at REAL NOT NULL, said BLOB NOT NULL);
"""
_TRIM = """
DELETE FROM {table} WHERE queue_id IN (
    SELECT queue_id FROM (
        SELECT queue_id, row_number() OVER newest AS place, sum(length(said)) OVER newest AS size
        FROM {table} WINDOW newest AS (ORDER BY at DESC, rowid DESC)
    ) WHERE place > 1 AND (place > ? OR size > ?)
)
"""

log = logging.getLogger("bide_agent")


class Store:
    """Two small tables by `X-Queue-Id`. May be used from any thread."""

    def __init__(self, path: Path | None, *, remembered: int = REMEMBERED, bytes_max: int = BYTES_MAX) -> None:
        """Open it. Raises `OSError`: it cannot be."""
        self._limits = (remembered, bytes_max)
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # answers are for their owner's eyes
        try:
            self._db = _opened(path)
        except sqlite3.OperationalError as error:
            raise OSError(f"{path}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._db.close()

    def keep_answer(self, queue_id: str, task_id: str, said: dict[str, Any]) -> bool:
        """Remember the last word on an item, and forget what was saved of it; false: it could not be."""
        try:
            self._put(
                "INSERT OR REPLACE INTO answers (queue_id, task_id, said, at) VALUES (?, ?, ?, ?)",
                queue_id, task_id, _written(said),
            )  # fmt: skip
            self._trim("answers")
            self.forget(queue_id)
        except sqlite3.Error as error:
            log.warning("answer_not_kept queue_id=%s error=%r", queue_id, str(error))
            return False
        return True

    def answer(self, queue_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._one("SELECT said FROM answers WHERE queue_id = ?", queue_id)
        return found

    def answer_of_task(self, task_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._one("SELECT said FROM answers WHERE task_id = ?", task_id)
        return found

    def save(self, queue_id: str, state: Any) -> None:
        """Keep what a handler saves.

        Raises:
            ValueError: it is over `STATE_BYTES_MAX` as JSON.
            TypeError: it is not JSON.
            sqlite3.Error: it could not be written.
        """
        said = _written(state)
        if len(said) > STATE_BYTES_MAX:
            raise ValueError(f"{len(said)} bytes of state: save up to {STATE_BYTES_MAX}, and the rest in a file")
        self._put("INSERT OR REPLACE INTO saved (queue_id, said, at) VALUES (?, ?, ?)", queue_id, said)
        self._trim("saved")

    def saved(self, queue_id: str) -> Any:
        return self._one("SELECT said FROM saved WHERE queue_id = ?", queue_id)

    def forget(self, queue_id: str) -> None:
        with self._lock:
            self._db.execute("DELETE FROM saved WHERE queue_id = ?", (queue_id,))

    def _put(self, statement: str, *values: str | bytes) -> None:
        with self._lock:
            self._db.execute(statement, (*values, time.time()))

    def _one(self, statement: str, key: str) -> Any:
        try:
            with self._lock:
                row = self._db.execute(statement, (key,)).fetchone()
        except sqlite3.Error as error:
            log.warning("store_unreadable error=%r", str(error))
            return None
        return None if row is None else json.loads(row[0])

    def _trim(self, table: str) -> None:
        with self._lock:
            self._db.execute(_TRIM.format(table=table), self._limits)


def _opened(path: Path | None) -> sqlite3.Connection:
    """Open the file, anew where what is there is broken: an agent that does not start is deaf to everything."""
    try:
        return _checked(path)
    except sqlite3.OperationalError:  # it cannot be opened, or the disk is full
        raise
    except sqlite3.DatabaseError as error:
        assert path is not None, "memory does not break"
        log.warning("state_set_aside path=%s error=%r", path, str(error))
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{path}{end}").replace(f"{path}.broken{end}")
        return _checked(path)


def _checked(path: Path | None) -> sqlite3.Connection:
    db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    try:
        _write_ahead(db)
        db.executescript(f"PRAGMA synchronous = NORMAL; {_SCHEMA}")
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _write_ahead(db: sqlite3.Connection) -> None:
    """Have a log written ahead; of two who open a new file at once one waits, which SQLite does not do here itself."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(0.01)  # nothing tells when the other one is done
        else:
            return


def _written(said: Any) -> bytes:
    """As a blob, in the last column: SQLite then knows lengths and ages without reading it, and trims ask for all."""
    return json.dumps(said).encode()
