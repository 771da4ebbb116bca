"""The four services as processes: how many, with what environment, and when each is ready.

Owns their commands. Refuses to decide policy: what the caller set as BIDE_… is passed through, and the services
themselves refuse names that they do not know.
"""

from __future__ import annotations

import http.client
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.errors import StackError
from deploy.local.ledger import Ledger
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.process import Command
from deploy.local.roles import SERVICES, service_url
from deploy.local.servers import Servers
from deploy.local.teardown import AGENTS

REPOSITORY = Path(__file__).parents[2]
FIRST_PROXY_PORT = 20_080
REPLICAS_MAX = 20
PROBE_LIMIT_S = 5.0
STOP_LIMIT_S = 45.0
ArgvOf = Callable[[str], Sequence[str]]
"""Gives the command line of a service by its name."""

# Ours to say, whatever the caller's environment says: they tell where this very stack is.
_OURS = ("BIDE_DATABASE_URL", "BIDE_AMQP_URL", "BIDE_HTTP_", "BIDE_LOCAL_", "BIDE_TEST_")
_SECRETS: Mapping[str, frozenset[str]] = {
    "BIDE_ADMIN_TOKEN": frozenset({"proxy"}),
    "BIDE_DELIVERY_SECRET": frozenset({"proxy", "queue"}),
}
_LOOPBACK_AGENTS = frozenset({"proxy", "queue"})


@dataclass(frozen=True)
class Replica:
    """One process of a service and where it listens."""

    service: str
    command: Command
    port: int

    @property
    def url(self) -> str:
        """Return where its HTTP is."""
        return f"http://127.0.0.1:{self.port}"


def module_argv(service: str) -> Sequence[str]:
    """Return the command line of a real service."""
    return [sys.executable, "-m", f"services.{service}"]


def parse_replicas(text: str) -> dict[str, int]:
    """Read "proxy=2,queue=2"; services that are not named get one."""
    counts = dict.fromkeys(SERVICES, 1)
    for part in filter(None, text.split(",")):
        service, _, number = part.partition("=")
        if service not in counts or not number.isdigit() or not 1 <= int(number) <= REPLICAS_MAX:
            raise StackError(
                f"--replicas {text!r}: it is a comma list of NAME=NUMBER, with {', '.join(SERVICES)} "
                f"and 1 to {REPLICAS_MAX}"
            )
        counts[service] = int(number)
    return counts


def claim_ports(ports: Ports, *, replicas: Mapping[str, int], port: int | None) -> dict[str, int]:
    """Return the port of every replica by its name ("queue-2"); `port` is demanded for the first proxy."""
    claimed = {"proxy-1": ports.claim("proxy-1", exactly=port, prefer=FIRST_PROXY_PORT)}
    for name in (f"{service}-{number}" for service in SERVICES for number in range(1, replicas[service] + 1)):
        if name not in claimed:
            claimed[name] = ports.claim(name)
    return claimed


def plan(
    ledger: Ledger,
    memory: Memory,
    servers: Servers,
    *,
    claimed: Mapping[str, int],
    environ: Mapping[str, str],
    argv_of: ArgvOf = module_argv,
) -> list[Replica]:
    """Return every replica of every service, ready to be spawned."""
    tokens = {name: secret(name, environ, memory) for name in _SECRETS}
    planned = []
    for name, port in claimed.items():
        service = name.rpartition("-")[0]
        here = {
            "BIDE_DATABASE_URL": service_url(servers.postgres.url, f"bide_{service}"),
            "BIDE_AMQP_URL": servers.rabbitmq.url,
            "BIDE_HTTP_HOST": "127.0.0.1",
            "BIDE_HTTP_PORT": str(port),
        }
        command = Command(
            name=name,
            argv=argv_of(service),
            env=_agents_of(service, ledger.data_dir) | service_env(service, environ, tokens) | here,
            cwd=REPOSITORY,
            log=ledger.data_dir / "log" / f"{name}.log",
            stop_limit_s=STOP_LIMIT_S,
        )
        planned.append(Replica(service, command, port))
    return planned


def _agents_of(service: str, data_dir: Path) -> dict[str, str]:
    """Return where liveness finds the operator's agents and remembers them, unless the caller says otherwise."""
    if service != "liveness":
        return {}
    return {
        "BIDE_LIVENESS_AGENTS_FILE": str(data_dir / "agents.toml"),
        "BIDE_LIVENESS_AGENTS_FOLDER": str(data_dir / AGENTS),
    }


def service_env(service: str, environ: Mapping[str, str], tokens: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a service, but for where the servers and its own port are."""
    held_back = (*_OURS, *_SECRETS)
    env = {name: value for name, value in environ.items() if not name.startswith(held_back)}
    env.setdefault("BIDE_LOG_FORMAT", "json")
    env |= {name: tokens[name] for name, readers in _SECRETS.items() if service in readers}
    if service in _LOOPBACK_AGENTS:
        env["BIDE_ALLOW_LOOPBACK"] = "1"  # Agents of a local stack are on this machine.
    else:
        env.pop("BIDE_ALLOW_LOOPBACK", None)
    return env


def secret(name: str, environ: Mapping[str, str], memory: Memory) -> str:
    """Return the caller's secret (given, or in the file of NAME_FILE), else the one this stack made for itself."""
    if environ.get(f"{name}_FILE"):
        return Path(environ[f"{name}_FILE"]).read_text(encoding="utf-8").strip()
    return environ.get(name) or memory.recall_or_make(name.lower(), lambda: secrets.token_urlsafe(24))


def probe_ready(port: int) -> None:
    """Return when GET /readyz answers 200; OSError with what is missing until then."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PROBE_LIMIT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        said = answer.read(4096).decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"/readyz: {error!r}") from error
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise ConnectionError(f"/readyz answers {answer.status} {said}")
