"""What an error of Postgres means, how queries and migrations are read."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from shared.database import Trouble, backoff_s, classify, in_words, load_queries
from shared.migrate import MigrationError, read_migrations


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (asyncpg.SerializationError("40001"), Trouble.CONFLICT),
        (asyncpg.DeadlockDetectedError("40P01"), Trouble.CONFLICT),
        (asyncpg.CannotConnectNowError("57P03"), Trouble.INFRASTRUCTURE),
        (asyncpg.AdminShutdownError("57P01"), Trouble.INFRASTRUCTURE),
        (asyncpg.CrashShutdownError("57P02"), Trouble.INFRASTRUCTURE),
        (asyncpg.TooManyConnectionsError("53300"), Trouble.INFRASTRUCTURE),
        (asyncpg.DiskFullError("53100"), Trouble.INFRASTRUCTURE),
        (asyncpg.QueryCanceledError("57014"), Trouble.INFRASTRUCTURE),
        (asyncpg.LockNotAvailableError("55P03"), Trouble.INFRASTRUCTURE),
        (asyncpg.ReadOnlySQLTransactionError("25006"), Trouble.INFRASTRUCTURE),
        (asyncpg.ConnectionDoesNotExistError("08003"), Trouble.INFRASTRUCTURE),
        (asyncpg.InterfaceError("cannot perform operation: connection is closed"), Trouble.INFRASTRUCTURE),
        (asyncpg.InterfaceError("pool is closing"), Trouble.INFRASTRUCTURE),
        (ConnectionRefusedError(), Trouble.INFRASTRUCTURE),
        (TimeoutError(), Trouble.INFRASTRUCTURE),
        (asyncpg.UntranslatableCharacterError("22P05"), Trouble.DATA),
        (asyncpg.CharacterNotInRepertoireError("22021"), Trouble.DATA),
        (asyncpg.NotNullViolationError("23502"), Trouble.DATA),
        (asyncpg.UniqueViolationError("23505"), Trouble.DATA),
        (asyncpg.ProgramLimitExceededError("54000"), Trouble.DATA),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), Trouble.DATA),
        (asyncpg.UndefinedColumnError("42703"), None),
        (asyncpg.InsufficientPrivilegeError("42501"), None),
        (asyncpg.InterfaceError("the server expects 2 arguments for this query, 1 was passed"), None),
        (KeyError("x"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_means(error: Exception, trouble: Trouble | None) -> None:
    assert classify(error) is trouble


def test_what_is_said_of_an_error_holds_none_of_the_data() -> None:
    """Postgres shows the row behind the first line, asyncpg the argument: either may be a prompt, and is not logged."""
    row = asyncpg.CheckViolationError("violates check constraint")
    row.detail = "Failing row contains (1, a secret)."
    assert "a secret" in str(row)
    assert in_words(row) == "CheckViolationError: violates check constraint"
    argument = asyncpg.DataError("invalid input for query argument $2: 'a secret' (expected int)")
    assert in_words(argument) == "DataError: invalid input for query argument $2"
    assert in_words(ConnectionRefusedError("[Errno 111] refused: 127.0.0.1")).endswith("refused: 127.0.0.1")
    assert len(in_words(KeyError("x" * 1000))) == 300


def test_backoff_grows_and_ends() -> None:
    assert 0.05 <= backoff_s(0) <= 0.1
    assert 2.5 <= backoff_s(20) <= 5.0
    assert backoff_s(10_000) <= 5.0


def test_queries_are_split_by_name(tmp_path: Path) -> None:
    path = tmp_path / "queries.sql"
    path.write_text("-- a file\n\n-- name: one\n-- why\nSELECT 1\n\n-- name: two\nSELECT 2\n")
    assert load_queries(path) == {"one": "-- why\nSELECT 1", "two": "SELECT 2"}


def test_a_query_name_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "queries.sql"
    path.write_text("-- name: one\nSELECT 1\n-- name: one\nSELECT 2\n")
    with pytest.raises(ValueError, match="twice"):
        load_queries(path)


@pytest.mark.parametrize(
    ("files", "word"),
    [(["0001_a.sql", "0003_b.sql"], "gap"), (["a.sql"], "NNNN"), (["0001.sql"], "NNNN"), (["0002_a.sql"], "gap")],
)
def test_misnumbered_migrations_are_refused(tmp_path: Path, files: list[str], word: str) -> None:
    for name in files:
        (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(MigrationError, match=word):
        read_migrations("queue", tmp_path)
