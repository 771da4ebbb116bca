"""Migrations: bring one service's schema up to its `migrations/NNNN_words.sql`, forward only, plain SQL.

A file that was applied may not change. A schema that is ahead of the files is left alone: during a rolling upgrade an
old replica may start beside a new one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shared.database import ACQUIRE_TIMEOUT_S, Connection, Pool
from shared.telemetry import log

SHARED_MIGRATIONS = Path(__file__).parent / "migrations"
"""Tables that code in `shared` reads and writes (inbox, outbox, dead_letters): every schema has them."""

MIGRATION_TIMEOUT_S = 3600.0
"""A large table may take long to index; a migration that hangs still ends."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One forward-only file `0001_words.sql`; `origin` is the folder's owner."""

    origin: str
    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


class MigrationError(Exception):
    """The schema and the migration files do not agree; nothing was changed."""


def read_migrations(origin: str, folder: Path) -> list[Migration]:
    """Read a folder's migrations in order.

    Raises:
        MigrationError: a file is misnamed, or a number is missing or doubled.
    """
    migrations = []
    for path in sorted(folder.glob("*.sql")):
        number, _, name = path.stem.partition("_")
        if not (number.isdigit() and name):
            raise MigrationError(f"{origin}/{path.name}: name it NNNN_words.sql")
        migrations.append(Migration(origin, int(number), name, path.read_text(encoding="utf-8")))
    if [migration.version for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise MigrationError(f"{origin}: the numbers of the migrations must run 0001, 0002, … without gap")
    return migrations


async def migrate(pool: Pool, migrations: list[Migration]) -> int:
    """Bring the schema up to `migrations`, one transaction each; replicas that start together take turns.

    Returns: how many were applied now.

    Raises:
        MigrationError: a file that was applied has changed since.
    """
    applied = 0
    for migration in migrations:
        async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
            # Transaction scope, so that it also holds behind a PgBouncer in transaction mode.
            await connection.execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtext('bide.migrations'), hashtext(current_schema()))",
                timeout=MIGRATION_TIMEOUT_S,
            )
            applied += await _apply(connection, migration)
    return applied


async def _apply(connection: Connection, migration: Migration) -> int:
    await connection.execute(
        """CREATE TABLE IF NOT EXISTS migrations (
             origin text NOT NULL, version int NOT NULL, name text NOT NULL, checksum text NOT NULL,
             applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (origin, version))"""
    )
    known = await connection.fetchval(
        "SELECT checksum FROM migrations WHERE origin = $1 AND version = $2", migration.origin, migration.version
    )
    if known == migration.checksum:
        return 0
    if known is not None:
        raise MigrationError(
            f"{migration.origin}/{migration.version:04}_{migration.name}.sql has changed since it was applied. "
            "Restore the file and write a new migration."
        )
    await connection.execute(migration.sql, timeout=MIGRATION_TIMEOUT_S)
    await connection.execute(
        "INSERT INTO migrations (origin, version, name, checksum) VALUES ($1, $2, $3, $4)",
        migration.origin,
        migration.version,
        migration.name,
        migration.checksum,
    )
    log.info("migrated", origin=migration.origin, version=migration.version, name=migration.name)
    return 1
