"""Inside a new Debian: what the README promises, done as root and as a plain user, with the seconds of each step.

Runs with the system's Python and the standard library alone, for nothing else is there yet.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SOURCE = Path("/srv/bide")
PLAIN = "plain"


def main() -> int:
    subprocess.run(["update-ca-certificates"], check=True, capture_output=True)
    subprocess.run(["useradd", "--create-home", PLAIN], check=True)
    subprocess.run(["git", "config", "--system", "--add", "safe.directory", "*"], check=True)
    for user in ("root", PLAIN):
        clone = Path(pwd.getpwnam(user).pw_dir) / "bide"
        _run(user, Path("/"), "git", "clone", "-q", str(SOURCE), str(clone))
        for round_ in ("cold", "warm"):
            _make_run(user, clone, round_)
        _step(f"{user}: make test", lambda user=user, clone=clone: _run(user, clone, "make", "test"))
    return 0


def _make_run(user: str, clone: Path, round_: str) -> None:
    begun = time.monotonic()
    process = _start(user, clone, "make", "run", "ARGS=--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"== {user}: make run, {round_}: it ended with {process.wait()}")
    ready = json.loads(line)
    print(f"== {user}: make run, {round_}: ready  {time.monotonic() - begun:.1f} s", flush=True)
    for url in [f"{ready['proxy']}/readyz", *(url for urls in ready["metrics"].values() for url in urls)]:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - a loopback URL of our own
            assert answer.status == 200, url  # noqa: PLR2004
    _step(f"{user}: Ctrl-C", lambda: _interrupt(process))


def _interrupt(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)


def _step(name: str, work: object) -> None:
    begun = time.monotonic()
    work()  # type: ignore[operator]
    print(f"== {name}  {time.monotonic() - begun:.1f} s", flush=True)


def _run(user: str, folder: Path, *command: str) -> None:
    code = _start(user, folder, *command).wait()
    if code:
        raise SystemExit(f"== {user}: {' '.join(command)} ended with {code}")


def _start(user: str, folder: Path, *command: str, stdout: int | None = None) -> subprocess.Popen[str]:
    home = pwd.getpwnam(user).pw_dir
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("BIDE_", "XDG_"))}
    environ["BIDE_NO_DOCKERD"] = "1"  # This folder has no cgroups, and one of the users is not root.
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environ, "HOME": home, "USER": user},
        user=user,
        group=user,
        extra_groups=[],
        start_new_session=True,
        stdout=stdout,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
