"""What the benchmarks measure with and against: wrk and nginx, fetched into the cache where the system has none."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.fetch import Fetcher, cache_dir

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}
SCRIPTS = Path(__file__).parent / "wrk"


@dataclass(frozen=True)
class Tool:
    """A program and the environment that it needs."""

    path: str
    env: Mapping[str, str]


def find(program: str, package: str) -> Tool:
    """Return the installed program, else that of the package, fetched without root."""
    installed = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed:
        return Tool(installed, os.environ)
    fetcher = Fetcher(cache_dir(os.environ, uid=os.geteuid()), _report, lambda: False)
    home = fetcher.programs(package)
    libraries = sorted({str(path.parent) for path in home.glob("**/lib*.so.*")})
    env = dict(os.environ) | ({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})
    return Tool(str(next(home.glob(f"usr/*bin/{program}"))), env)


def _report(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Load:
    """What a load saw. Latencies in µs."""

    per_s: float
    p50_us: float
    p99_us: float
    requests: int
    refused: int
    """Answers that were neither 2xx nor 3xx, and requests without one."""


def wrk(url: str, *, connections: int, seconds: float, script: str, **values: str) -> Load:
    """Load `url` for so long from one thread; `values` reach the script as environment variables."""
    tool = find("wrk", "wrk")
    argv = [tool.path, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "20s"]
    done = subprocess.run(
        [*argv, "-s", str(SCRIPTS / script), url],
        env={**tool.env, **values},
        capture_output=True,
        text=True,
        check=True,
    )
    return read_wrk(done.stdout)


def read_wrk(said: str) -> Load:
    def latency(percent: str) -> float:
        found = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s|m)\b", said)
        assert found is not None, said
        return float(found[1]) * _UNITS[found[2]]

    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    count = re.search(r"(\d+) requests in", said)
    assert rate is not None, said
    assert count is not None, said
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    lost = sum(map(int, errors.groups())) if errors else 0
    refused = (int(wrong[1]) if wrong else 0) + lost
    return Load(float(rate[1]), latency("50"), latency("99"), int(count[1]), refused)


@contextmanager
def nginx(folder: Path, name: str, http: str) -> Iterator[subprocess.Popen[bytes]]:
    """One worker with this `http` block, as fast as it goes: no access log."""
    tool = find("nginx", "nginx")
    home = folder / name
    (home / "logs").mkdir(parents=True)
    conf = home / "nginx.conf"
    paths = "\n".join(
        f"  {kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    conf.write_text(
        f"{user} worker_processes 1; daemon off; pid {home}/pid; error_log {home}/logs/error.log crit;\n"
        f"events {{ worker_connections 4096; }}\nhttp {{\n  access_log off; keepalive_requests 10000000;\n"
        f"  client_body_buffer_size 64k;\n{paths}\n{http}\n}}\n"
    )
    with subprocess.Popen([tool.path, "-p", str(home), "-c", str(conf)], env=dict(tool.env)) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its children have used."""
    total = 0.0
    for each in (pid, *_children(pid)):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _children(pid: int) -> list[int]:
    return [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
