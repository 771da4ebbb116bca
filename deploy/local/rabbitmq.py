"""A RabbitMQ that is ours: scripts, node, epmd, vhosts.

Owns `<data>/rabbitmq/`. Everything listens on 127.0.0.1: AMQP, Erlang's distribution and its own epmd. Refuses
plugins: each costs start time (management 0.7 s, prometheus 0.4 s of 2.6 s), and nothing here needs one.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from deploy.local.amqp import broker_version
from deploy.local.errors import StackError, UnavailableError
from deploy.local.ledger import Ledger
from deploy.local.memory import Memory, write_atomically
from deploy.local.ports import Ports
from deploy.local.process import Command
from deploy.local.run import LocalRun, Run, Server

USER = "bide"
STOP_LIMIT_S = 15.0
CONTROL_LIMIT_S = 120.0
MEMORY_SHARE = 0.4
"""RabbitMQ's own default until 4.0, good for every version."""
Control = Callable[[Sequence[str], str | None], None]
"""Run rabbitmqctl with these arguments, and with the path of a file that holds the document, if one is given."""


@dataclass(frozen=True)
class Installation:
    """Where one RabbitMQ and its Erlang lie; `libraries` is for shared libraries that were fetched with them."""

    scripts: Path
    erlang: Path
    libraries: str = ""


class RabbitMQ(Server):
    """A RabbitMQ broker in use; `url` is of the vhost "/"."""

    def __init__(self, *, url: str, source: str, run: Run, version: str, control: Control | None) -> None:
        super().__init__(url=url, source=source, run=run, version=version)
        self._control = control

    def stop(self) -> None:
        """Stop it in good order."""
        self._run.stop()

    def vhost(self, name: str) -> str:
        """Create a vhost of this name, if there is none, grant it to our user and return its URL."""
        return self.vhosts([name])[0]

    def vhosts(self, names: Sequence[str]) -> list[str]:
        """Create several vhosts at the price of one (0.4 s)."""
        # One import does what add_vhost and set_permissions do in two calls of 0.4 s each, on 3.10 and 4.x alike.
        self.control(["import_definitions"], definitions(names))
        return [f"{self.url.rstrip('/')}/{quote(name, safe='')}" for name in names]

    def limit_memory(self, share: float = MEMORY_SHARE) -> None:
        """Block publishers when the node uses more than this share of the machine's memory; 0 blocks them at once."""
        self.control(["set_vm_memory_high_watermark", f"{share:g}"])

    def control(self, arguments: Sequence[str], document: str | None = None) -> None:
        """Run RabbitMQ's own command line, with a file that holds `document` as its last argument if there is one."""
        if self._control is None:
            raise StackError("only a broker of our own takes orders; leave BIDE_AMQP_URL unset")
        self._control(arguments, document)


def definitions(vhosts: Sequence[str]) -> str:
    """Return RabbitMQ's definitions document for these vhosts and our user's permissions in them."""
    grant = {"user": USER, "configure": ".*", "write": ".*", "read": ".*"}
    return json.dumps(
        {"vhosts": [{"name": name} for name in vhosts], "permissions": [{"vhost": name, **grant} for name in vhosts]}
    )


def installed(*, root: Path = Path("/usr/lib")) -> Installation:
    """Return the installation of Debian's or the project's own packages."""
    found = find(root)
    if found is None:
        raise UnavailableError(f"no {root}/rabbitmq/lib/rabbitmq_server-*/sbin with {root}/erlang")
    return found


def find(root: Path, *, libraries: str = "") -> Installation | None:
    """Return the newest RabbitMQ below `root`, if there is one with an Erlang."""
    scripts = [path.parent for path in root.glob("rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server")]
    if not scripts or not (root / "erlang/bin/erl").exists():
        return None
    newest = max(scripts, key=lambda path: [int(part) for part in _version_of(path).split(".") if part.isdigit()])
    return Installation(newest, root / "erlang", libraries)


def start_local(ledger: Ledger, memory: Memory, ports: Ports, *, installation: Installation, source: str) -> RabbitMQ:
    """Write the node's configuration, start epmd and the node, and return the broker ready."""
    home = ledger.data_dir / "rabbitmq"
    home.mkdir(exist_ok=True, mode=0o700)
    password = memory.recall_or_make("rabbitmq.password", lambda: secrets.token_hex(16))
    node = memory.recall_or_make("rabbitmq.node", lambda: f"bide-{secrets.token_hex(4)}@localhost")
    port = ports.claim("rabbitmq")
    _configure(home, port=port, password=password)
    env = node_env(
        os.environ,
        home=home,
        installation=installation,
        node=node,
        distribution_port=ports.claim("rabbitmq.distribution"),
        epmd_port=ports.claim("rabbitmq.epmd"),
    )
    log = ledger.data_dir / "log" / "rabbitmq.log"
    epmd = next(iter(installation.erlang.glob("erts-*/bin/epmd")), installation.erlang / "bin" / "epmd")
    commands = [
        Command(name="epmd", argv=[str(epmd)], env=env, cwd=home, log=log, stop_limit_s=5.0, stop_order=2),
        Command(
            name="rabbitmq",
            argv=[str(installation.scripts / "rabbitmq-server")],
            env=env,
            cwd=home,
            log=log,
            stop_signal=signal.SIGTERM,
            stop_limit_s=STOP_LIMIT_S,
            stop_order=1,
        ),
    ]
    url = f"amqp://{USER}:{password}@127.0.0.1:{port}/"
    run = LocalRun(ledger, commands, probe=lambda: broker_version(url))
    run.start()

    def control(arguments: Sequence[str], document: str | None) -> None:
        run_control([installation.scripts / "rabbitmqctl", *arguments], document, env=env)

    return RabbitMQ(url=url, source=source, run=run, version=broker_version(url), control=control)


def run_control(command: Sequence[str | Path], document: str | None, *, env: Mapping[str, str]) -> None:
    """Run rabbitmqctl; StackError with what it said when it fails.

    A document goes by file: 4.0 waits for ever for the end of its standard input.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        if document is not None:
            file.write(document)
            file.flush()
            command = [*command, file.name]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=CONTROL_LIMIT_S,
        )
    if done.returncode != 0:
        raise StackError(f"rabbitmqctl {command[1]} failed ({done.returncode}): {done.stderr or done.stdout}")


def node_env(
    environ: Mapping[str, str],
    *,
    home: Path,
    installation: Installation,
    node: str,
    distribution_port: int,
    epmd_port: int,
) -> dict[str, str]:
    """Return the environment of the node, its epmd and rabbitmqctl: ours alone, whatever the machine has set."""
    foreign = ("RABBITMQ_", "ERL_", "BIDE_", "NOTIFY_SOCKET")
    env = {name: value for name, value in environ.items() if not name.startswith(foreign)}
    env |= {
        "PATH": f"{installation.erlang}/bin:{environ.get('PATH', '/usr/bin:/bin')}",
        "HOME": str(home),  # Where Erlang keeps its cookie.
        "LANG": "C.UTF-8",
        "ERL_ROOTDIR": str(installation.erlang),
        "ERL_INETRC": str(home / "inetrc"),
        "ERL_CRASH_DUMP": "/dev/null",
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": node,
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_PID_FILE": str(home / "pid"),
        # The script then execs the node: without it a shell stands between us and the node, and waits for signals.
        "RUNNING_UNDER_SYSTEMD": "true",
    }
    if installation.libraries:
        env["LD_LIBRARY_PATH"] = installation.libraries
    return env


def _configure(home: Path, *, port: int, password: str) -> None:
    lines = [
        f"listeners.tcp.default = 127.0.0.1:{port}",
        f"default_user = {USER}",
        f"default_pass = {password}",
        "log.console = true",
        "log.console.level = info",
        "log.file = false",
    ]
    write_atomically(home / "rabbitmq.conf", "\n".join([*lines, ""]))
    write_atomically(home / "enabled_plugins", "[].\n")
    # The node is called …@localhost, and no resolver is asked what that means.
    write_atomically(home / "inetrc", '{host,{127,0,0,1},["localhost"]}.\n{lookup,[file,native]}.\n')


def _version_of(scripts: Path) -> str:
    return scripts.parent.name.removeprefix("rabbitmq_server-")
