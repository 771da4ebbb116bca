"""A real dockerd for tests: from Debian's packages, without a registry, a network or a listener on this machine.

It has mounts, process ids and a network of its own; all that is seen of it outside is a socket in a temporary folder.
It ends with the run, also when that is killed. Its one image is a static busybox.
"""

from __future__ import annotations

import fcntl
import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]
import pytest

from deploy.local.errors import UnavailableError
from deploy.local.fetch import Fetcher, cache_dir
from services.liveness.decide.seen import Seen
from services.liveness.drivers import Target
from services.liveness.drivers.docker import LABEL, DockerDriver
from shared.processes import Mark, family, kill, mark_of, send

IMAGE = "bide-agent:1"
AGENT = 'trap "exit 0" TERM; trap "exit 3" USR1; while :; do sleep 1000 & wait $!; done'
DEAF = 'trap "" TERM; while :; do sleep 1000 & wait $!; done'
_PACKAGES = ("docker.io", "containerd", "runc", "tini", "busybox-static")
_READY_S = 30.0
_INSIDE = """
set -e
mkdir -p "$0/etc" && cp -L /etc/passwd /etc/group "$0/etc/"
mount --bind "$0/etc" /etc && mount -t tmpfs tmpfs /run
exec dockerd --host "unix://$0/docker.sock" --data-root "$0/data" --exec-root /run/docker --pidfile /run/docker.pid \
  --storage-driver vfs --bridge none --iptables=false --ip-forward=false --cgroup-parent "/$1" \
  --default-ulimit "nofile=$2:$2"
"""
"""/etc is a copy: dockerd writes a key there. vfs needs nothing of the file system below, and the image is 2 MB."""


@dataclass
class Engine:
    """The daemon, and what a person or a compose file does to its containers."""

    folder: Path
    root: Mark
    client: Any = field(init=False)
    is_frozen: bool = False

    def __post_init__(self) -> None:
        self.client = docker.DockerClient(base_url=self.url, timeout=20)

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def driver(self, **limits: Any) -> DockerDriver:
        return DockerDriver(self.url, **limits)

    def create(self, workspace_id: str | None, name: str | None = None, *, code: str = AGENT, **about: Any) -> Any:
        """Make a container, as the operator does, and do not start it."""
        labels = {LABEL: workspace_id} if workspace_id is not None else {}
        return self.client.containers.create(
            IMAGE, ["/bin/sh", "-c", code], name=name, labels=labels, network_mode="none", **about
        )

    def run(self, workspace_id: str | None, name: str | None = None, *, code: str = AGENT, **about: Any) -> Any:
        made = self.create(workspace_id, name, code=code, **about)
        made.start()
        return made

    def crash(self, container: Any) -> None:
        """SIGKILL from outside of the engine; of a frozen one by the pid that it told before."""
        if not self.is_frozen:
            container.reload()
        os.kill(self._pid_here(container.attrs["State"]["Pid"]), signal.SIGKILL)

    def life(self, container: Any) -> str:
        container.reload()
        return f"{container.id[:12]}@{container.attrs['State']['StartedAt']}"

    def find(self, life: str) -> Any:
        return self.client.containers.get(life.partition("@")[0])

    def runs(self, life: str) -> bool:
        with suppress(docker.errors.NotFound):
            found = self.find(life)
            return bool(self.life(found) == life and found.attrs["State"]["Status"] == "running")
        return False

    def starts(self, container: Any) -> int:
        """How often the engine has started it."""
        return [event["Action"] for event in self.told(container)].count("start")

    def told(self, container: Any) -> list[dict[str, Any]]:
        """All events of this container so far."""
        wanted = {"container": container.id, "type": "container"}
        return list(self.client.events(since=0, until=f"{time.time():.9f}", filters=wanted, decode=True))

    def freeze(self) -> None:
        assert send(self._daemon(), signal.SIGSTOP)
        self.is_frozen = True

    def thaw(self) -> None:
        assert send(self._daemon(), signal.SIGCONT)
        self.is_frozen = False

    def clear(self) -> None:
        for container in self.client.containers.list(all=True):
            container.remove(force=True, v=True)

    def _daemon(self) -> Mark:
        for mark in family([self.root]):
            if Path(f"/proc/{mark.pid}/comm").read_text().strip() == "dockerd":
                return mark
        raise AssertionError("dockerd has ended")

    def _pid_here(self, inner: int) -> int:
        """The pid that this process knows by the engine's number: it counts in a space of its own."""
        for mark in family([self.root]):
            status = Path(f"/proc/{mark.pid}/status").read_text()
            numbers = status.partition("NSpid:")[2].partition("\n")[0].split()
            if len(numbers) > 1 and int(numbers[1]) == inner:
                return mark.pid
        raise AssertionError(f"no process {inner} in the engine")


class DockerBench:
    """Containers of the real engine, for the suite that every driver is held to."""

    tells_of_exits = True
    unstarted = Seen.TRANSITION
    shares_fences = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def driver(self) -> DockerDriver:
        return self.engine.driver()

    def add(self, name: str) -> Target:
        self.engine.create(name, f"agent-{name}", stop_signal="SIGTERM")
        return Target(name, {"driver": "docker", "container": f"agent-{name}"})

    def runs(self, container_id: str) -> bool:
        return self.engine.runs(container_id)

    def crash(self, container_id: str) -> None:
        self.engine.crash(self.engine.find(container_id))

    def pause(self, container_id: str) -> None:
        self.engine.find(container_id).pause()

    def resume(self, container_id: str) -> None:
        self.engine.find(container_id).unpause()

    def close(self) -> None:
        self.engine.clear()


def engine_or_reason() -> Iterator[Engine]:
    """The body of the session's fixture: without root or namespaces tests fail and say why, or are skipped if told."""
    if os.environ.get("BIDE_NO_DOCKERD") == "1":
        pytest.skip(f"BIDE_NO_DOCKERD=1 ({_lack() or 'it could be started here'})")
    try:
        with running() as engine:
            yield engine
    except UnavailableError as error:
        pytest.fail(f"no dockerd here: {error}. BIDE_NO_DOCKERD=1 skips what needs one.")


@contextmanager
def running() -> Iterator[Engine]:
    """Start a dockerd, and end it with everything in it.

    Raises:
        UnavailableError: why that is not possible here.
    """
    if (lack := _lack()) is not None:
        raise UnavailableError(lack)
    fetcher = Fetcher(cache_dir(os.environ, uid=os.geteuid()), lambda line: print(line, file=sys.stderr), lambda: False)
    programs = fetcher.programs(*_PACKAGES)
    above = Path(tempfile.gettempdir()) / f"bide-tests-{os.getuid()}"
    above.mkdir(mode=0o755, parents=True, exist_ok=True)
    _sweep(above)
    folder = Path(tempfile.mkdtemp(dir=above, prefix="dockerd-"))
    with (folder / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield from _running(folder, programs)


def _running(folder: Path, programs: Path) -> Iterator[Engine]:
    process = _start(folder, programs)
    root = mark_of(process.pid)
    try:
        if root is None:
            raise UnavailableError(_last_words(folder))
        _wait_ready(folder, process)
        engine = Engine(folder, root)
        try:
            _import_image(engine, programs)
            yield engine
        finally:
            engine.client.close()
    finally:
        if root is not None:
            kill([root])
        process.wait()
        _remove(folder)


def _lack() -> str | None:
    if os.geteuid() != 0:
        return "it needs root"
    missing = [tool for tool in ("unshare", "setpriv", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces of its own: {tried.stderr.strip()}" if tried.returncode != 0 else None


def _start(folder: Path, programs: Path) -> subprocess.Popen[bytes]:
    libraries = sorted({str(path.parent) for path in programs.glob("**/lib*.so.*")})
    env = dict(os.environ)
    env["PATH"] = f"{programs}/usr/bin:{programs}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    if libraries:
        env["LD_LIBRARY_PATH"] = ":".join(libraries)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child",
            "--mount-proc", "sh", "-c", _INSIDE, str(folder), _group(folder), str(min(files, 1024))]  # fmt: skip
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _wait_ready(folder: Path, process: subprocess.Popen[bytes]) -> None:
    # Before there is a client: that leaves its socket open when nobody answers. dockerd listens when it is ready.
    deadline = time.monotonic() + _READY_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(f"{folder}/docker.sock") == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UnavailableError(_last_words(folder))
        time.sleep(0.05)


def _last_words(folder: Path) -> str:
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    return "it does not start: " + " / ".join(lines[-3:])


def _import_image(engine: Engine, programs: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(next(programs.glob("**/bin/busybox")), "bin/busybox")
        for name in ("sh", "sleep", "kill"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    repository, _, tag = IMAGE.partition(":")
    engine.client.api.import_image_from_data(archive.getvalue(), repository=repository, tag=tag)


def _group(folder: Path) -> str:
    return f"bide-{folder.name}"


def _sweep(above: Path) -> None:
    """Remove what a run left that was killed; its processes ended with it."""
    for path in above.glob("dockerd-*/held"):
        with path.open() as held, suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path.parent)


def _remove(folder: Path) -> None:
    top = Path("/sys/fs/cgroup")
    for group in [*top.glob(f"*/{_group(folder)}"), top / _group(folder)]:
        for each, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                Path(each).rmdir()
    shutil.rmtree(folder, ignore_errors=True)
