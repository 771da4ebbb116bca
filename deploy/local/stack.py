"""The whole local stack: servers, roles, services, in this order; supervised; stopped in the opposite order.

Owns what `up` does and says. Refuses to run twice on one data folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from deploy.local.ledger import Ledger
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.process import Child
from deploy.local.roles import SERVICES, apply_roles
from deploy.local.run import wait_until_ready
from deploy.local.servers import Place, Servers, start_servers
from deploy.local.services import ArgvOf, Replica, claim_ports, module_argv, plan, probe_ready, secret
from deploy.local.supervise import Signals, StopAsked, supervise
from deploy.local.teardown import end_all, kill_all


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller of `up` may turn."""

    data_dir: Path
    replicas: Mapping[str, int]
    port: int | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Everything that runs, and what to tell about it."""

    servers: Servers
    replicas: tuple[Replica, ...]
    children: Mapping[str, Child]
    admin_token: str

    def of(self, service: str) -> list[Replica]:
        """Return the replicas of one service."""
        return [replica for replica in self.replicas if replica.service == service]


def up(options: Options, *, environ: Mapping[str, str], argv_of: ArgvOf = module_argv) -> int:
    """Run the stack in the foreground until SIGINT or SIGTERM; return the exit code."""
    began_s = time.monotonic()
    report = _reporter(sys.stderr if options.as_json else sys.stdout)
    with Ledger(options.data_dir) as ledger, Signals(lambda: kill_all(ledger)) as signals:
        end_all(ledger, report, verb="cleaned up")
        memory = Memory(options.data_dir)
        with Ports(memory) as ports:
            place = Place(
                ledger=ledger,
                memory=memory,
                ports=ports,
                environ=environ,
                durable=environ.get("BIDE_LOCAL_DURABLE") != "0",
                report=report,
            )
            try:
                stack = signals.run(
                    lambda: _start(place, options, argv_of), give_up=lambda: _stop(ledger, signals, report)
                )
                report(f"all ready  {time.monotonic() - began_s:.1f} s")
                print(as_json(stack) if options.as_json else summary(stack, options.data_dir), flush=True)
                supervise(ledger, signals, report)
            except StopAsked:
                pass
            finally:
                _stop(ledger, signals, report)
    return 0


def _start(place: Place, options: Options, argv_of: ArgvOf) -> Stack:
    # First, because it can be refused at once; the servers take seconds.
    claimed = claim_ports(place.ports, replicas=options.replicas, port=options.port)
    servers = start_servers(place)
    began_s = time.monotonic()
    apply_roles(servers.postgres.url)
    place.report(f"database roles and schemas applied  {time.monotonic() - began_s:.1f} s")
    replicas = plan(place.ledger, place.memory, servers, claimed=claimed, environ=place.environ, argv_of=argv_of)
    children = {replica.command.name: place.ledger.spawn(replica.command) for replica in replicas}

    def wait_for(replica: Replica) -> None:
        began_s = time.monotonic()
        wait_until_ready(children[replica.command.name], lambda: probe_ready(replica.port))
        place.report(f"{replica.command.name} ready at {replica.url}  {time.monotonic() - began_s:.1f} s")

    with ThreadPoolExecutor(max_workers=len(replicas)) as pool:
        list(pool.map(wait_for, replicas))
    token = secret("BIDE_ADMIN_TOKEN", place.environ, place.memory)
    return Stack(servers=servers, replicas=tuple(replicas), children=children, admin_token=token)


def _stop(ledger: Ledger, signals: Signals, report: Callable[[str], None]) -> None:
    if signals.asked and not ledger.is_refusing():
        report("stopping (once more kills at once)")
    ledger.refuse()
    end_all(ledger, report)


def as_json(stack: Stack) -> str:
    """Return the one line that tells a program where everything is."""
    urls = [replica.url for replica in stack.of("proxy")]
    return json.dumps(
        {
            "ready": True,
            "proxy": urls[0],
            "proxies": urls,
            "admin_token": stack.admin_token,
            "metrics": {name: [f"{replica.url}/metrics" for replica in stack.of(name)] for name in SERVICES},
            "pids": {
                name: [stack.children[replica.command.name].mark.pid for replica in stack.of(name)] for name in SERVICES
            },
            "database_url": stack.servers.postgres.url,
            "amqp_url": stack.servers.rabbitmq.url,
        }
    )


def summary(stack: Stack, data_dir: Path) -> str:
    """Return what a person needs next."""
    proxies = [replica.url for replica in stack.of("proxy")]
    lines = [
        "",
        f"  proxy        {', '.join(proxies)}",
        f"  admin token  {stack.admin_token}",
        f"  database     {stack.servers.postgres.url}",
        f"  broker       {stack.servers.rabbitmq.url}",
        f"  logs         {data_dir / 'log'}",
        "",
        "  try",
        f"    curl {proxies[0]}/readyz",
        *(f"    curl {replica.url}/metrics    # {replica.command.name}" for replica in stack.replicas),
        "",
        "  Ctrl-C stops everything; the data stays.",
    ]
    return "\n".join(lines)


def _reporter(stream: TextIO) -> Callable[[str], None]:
    def report(line: str) -> None:
        print(line, file=stream, flush=True)

    return report
