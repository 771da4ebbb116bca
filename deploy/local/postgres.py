"""A PostgreSQL that is ours: binaries, cluster, process, databases.

Owns `<data>/postgres/`. Listens on 127.0.0.1 only and asks everybody for a password. Refuses to run as root, as
PostgreSQL itself does: as root it runs as nobody.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import asyncpg

from deploy.local.errors import StackError, UnavailableError
from deploy.local.ledger import Ledger
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.process import Command
from deploy.local.roles import execute, server_version, with_database
from deploy.local.run import LocalRun, Server

NOBODY = 65534
STOP_LIMIT_S = 15.0
USER, DATABASE = "bide", "bide"
OLDEST_MAJOR = 15
FAST, IMMEDIATE = signal.SIGINT, signal.SIGQUIT
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Postgres(Server):
    """A PostgreSQL server in use; `url` is the administrator's."""

    def stop(self, mode: str = "fast") -> None:
        """Stop it: "fast" ends the sessions and writes a checkpoint, "immediate" recovers at the next start."""
        self._run.stop({"fast": FAST, "immediate": IMMEDIATE}[mode])

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of `template` when given (nobody may be connected to that); return its URL."""
        copy = f' TEMPLATE "{checked(template)}"' if template else ""
        execute(self._maintenance_url(), f'CREATE DATABASE "{checked(name)}"{copy}')
        return with_database(self.url, name)

    def drop_database(self, name: str) -> None:
        """Drop a database, if it exists, and end the sessions in it."""
        execute(self._maintenance_url(), f'DROP DATABASE IF EXISTS "{checked(name)}" WITH (FORCE)')

    def _maintenance_url(self) -> str:
        # Not our own database: it may be the template, and a template must have no visitors.
        return with_database(self.url, "postgres")


def checked(name: str) -> str:
    """Return the name if it needs no quoting beyond double quotes."""
    if not _IDENTIFIER.fullmatch(name):
        raise StackError(f"{name!r} is no database name: letters, digits and _, at most 63")
    return name


def installed_binaries(environ: Mapping[str, str], *, root: Path = Path("/usr/lib/postgresql")) -> Path:
    """Return the folder of an installed postgres and initdb: from PATH, else Debian's newest."""
    in_path = shutil.which("initdb", path=environ.get("PATH"))
    if in_path:
        folder = Path(in_path).resolve().parent
        if (folder / "postgres").exists() and _major(folder) >= OLDEST_MAJOR:
            return folder
    found = newest_binaries(root)
    if found is None:
        raise UnavailableError(f"no initdb in PATH or {root}/*/bin")
    return found


def newest_binaries(root: Path) -> Path | None:
    """Return <root>/<highest version>/bin that has initdb and postgres and is new enough."""
    majors = [path.parent.parent for path in root.glob("*/bin/initdb") if (path.parent / "postgres").exists()]
    usable = [path for path in majors if path.name.isdigit() and int(path.name) >= OLDEST_MAJOR]
    return max(usable, key=lambda path: int(path.name)) / "bin" if usable else None


def start_local(
    ledger: Ledger,
    memory: Memory,
    ports: Ports,
    *,
    binaries: Path,
    source: str,
    durable: bool,
    report: Callable[[str], None],
) -> Postgres:
    """Create the cluster if there is none yet, start it, and return it ready."""
    home = ledger.data_dir / "postgres"
    password = memory.recall_or_make("postgres.password", lambda: secrets.token_hex(16))
    port = ports.claim("postgres")
    prefix = unprivileged_prefix() if os.geteuid() == 0 else ()
    log = ledger.data_dir / "log" / "postgres.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BIDE_", "LC_"))}
    cluster = _cluster(home, binaries, report)
    if not (cluster / "PG_VERSION").exists():
        _initdb(cluster, binaries, prefix=prefix, env=env, password=password, durable=durable)
    listen = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={port}", "-c", "unix_socket_directories="]
    command = Command(
        name="postgres",
        argv=[*prefix, str(binaries / "postgres"), "-D", str(cluster), *listen, *settings(durable=durable)],
        env=env,
        cwd=home,
        log=log,
        stop_signal=FAST,
        stop_limit_s=STOP_LIMIT_S,
        stop_order=3,
    )
    base = f"postgresql://{USER}:{password}@127.0.0.1:{port}"
    run = LocalRun(ledger, [command], probe=lambda: server_version(f"{base}/postgres"))
    run.start()
    return with_own_database(Postgres(url=f"{base}/{DATABASE}", source=source, run=run, version=""))


def with_own_database(postgres: Postgres) -> Postgres:
    """Create the database of the URL if this is a new cluster, and read the version."""
    try:
        postgres.version = server_version(postgres.url)
    except asyncpg.InvalidCatalogNameError:
        postgres.create_database(DATABASE)
        postgres.version = server_version(postgres.url)
    return postgres


def settings(*, durable: bool) -> list[str]:
    """Return the command-line settings that every PostgreSQL of ours has."""
    values = {"max_connections": "200", "log_line_prefix": "%m [%p] %u@%d "}
    if not durable:
        # synchronous_commit stays on: what was committed must outlive a killed server even in a test. Only the
        # machine's own crash is left out.
        values |= {"fsync": "off", "full_page_writes": "off"}
    return [word for name, value in values.items() for word in ("-c", f"{name}={value}")]


def unprivileged_prefix() -> tuple[str, ...]:
    """Return what runs a program as nobody when we are root.

    With the capability to read and write everywhere where that is allowed: data and binaries may then lie below
    folders that only root may enter, and no user namespace is needed (containers and chroots forbid those).
    """
    plain = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    capable = (*plain, "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    for prefix in (capable, plain):
        try:
            if subprocess.run([*prefix, "--", "true"], capture_output=True, check=False).returncode == 0:
                return (*prefix, "--")
        except FileNotFoundError:
            break
    raise StackError(
        "PostgreSQL refuses to run as root, and setpriv (of util-linux) cannot change to the user nobody here; "
        "start the stack as a plain user"
    )


def _major(binaries: Path) -> int:
    said = subprocess.run([binaries / "postgres", "-V"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"\) (\d+)", said)
    if version is None:
        raise UnavailableError(f"{binaries / 'postgres'} does not run here")
    return int(version[1])


def _cluster(home: Path, binaries: Path, report: Callable[[str], None]) -> Path:
    # One folder for each major version: a cluster of another one cannot be opened, and must not be lost.
    cluster = home / str(_major(binaries))
    others = sorted(path.parent.name for path in home.glob("*/PG_VERSION") if path.parent != cluster)
    if others and not cluster.exists():
        report(
            f"note: {home} holds data of PostgreSQL {', '.join(others)}; {cluster.name} begins with a folder of its own"
        )
    return cluster


def _initdb(
    cluster: Path, binaries: Path, *, prefix: Sequence[str], env: Mapping[str, str], password: str, durable: bool
) -> None:
    home = cluster.parent
    home.mkdir(exist_ok=True, mode=0o700)
    password_file = home / "initdb-password"
    password_file.write_text(password)
    password_file.chmod(0o600)
    if prefix:
        os.chown(home, NOBODY, NOBODY)
        os.chown(password_file, NOBODY, NOBODY)
    # Into a folder beside it and then renamed: an initdb that was cut short leaves no half cluster.
    fresh = home / f"{cluster.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    options = ["-D", str(fresh), "-U", USER, "--auth=scram-sha-256", f"--pwfile={password_file}"]
    options += ["--encoding=UTF8", "--locale=C", "--no-instructions", *([] if durable else ["--no-sync"])]
    made = subprocess.run(
        [*prefix, str(binaries / "initdb"), *options], env=env, cwd=home, capture_output=True, text=True, check=False
    )
    password_file.unlink()
    if made.returncode != 0:
        raise StackError(
            f"initdb failed ({made.returncode}): {made.stderr.strip()}\n"
            f"  as root it runs as the user nobody, who must be able to read {binaries} and to enter {home}"
        )
    fresh.rename(cluster)
