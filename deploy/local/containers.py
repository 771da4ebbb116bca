"""Servers in containers, for where a Docker engine answers and has the images already.

Publishes on 127.0.0.1 only and keeps data in named volumes. Refuses to pull: a start must not depend on a registry.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from deploy.local import postgres, rabbitmq
from deploy.local.amqp import broker_version
from deploy.local.errors import StackError, UnavailableError
from deploy.local.ledger import Container, Ledger
from deploy.local.memory import Memory
from deploy.local.ports import Ports
from deploy.local.roles import server_version
from deploy.local.run import READY_LIMIT_S, RETRY_S

IMAGES = {"postgres": "postgres:18", "rabbitmq": "rabbitmq:4"}
ENGINE_LIMIT_S = 60.0
STOP_LIMIT_S = 15


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one container is made of."""

    server: str
    image: str
    env: Mapping[str, str]
    inner_port: int
    port: int
    folder: str
    command: Sequence[str] = ()


class ContainerRun:
    """A server in a container of ours; the engine restarts it when it dies by itself."""

    def __init__(self, name: str, *, probe: Callable[[], object]) -> None:
        self._name = name
        self._probe = probe

    def start(self) -> None:
        """Start the container and wait until the probe no longer raises OSError."""
        self._container().start()
        self.wait_until_ready()

    def stop(self, signum: int | None = None, /) -> None:
        """Stop the container with its image's signal, or with this one."""
        container = self._container()
        if signum is None:
            container.stop(timeout=STOP_LIMIT_S)
        else:
            container.kill(signal=signum)
            container.wait(timeout=STOP_LIMIT_S)

    def kill(self) -> None:
        """SIGKILL everything in the container."""
        container = self._container()
        container.kill()
        container.wait(timeout=STOP_LIMIT_S)

    def pause(self) -> None:
        """Freeze the container."""
        self._container().pause()

    def resume(self) -> None:
        """Let the container go on."""
        self._container().unpause()

    def is_running(self) -> bool:
        """Tell whether the container runs."""
        return self._container().status in ("running", "paused")

    def control(self, arguments: Sequence[str], document: str | None) -> None:
        """Run rabbitmqctl in the container; a document goes through its shell, for exec has no input of its own."""
        script = shlex.join(["rabbitmqctl", *arguments])
        if document is not None:
            script = f'printf %s "$GIVEN" >/tmp/given.json && {script} /tmp/given.json'
        code, said = self._container().exec_run(["sh", "-c", script], environment={"GIVEN": document or ""})
        if code != 0:
            raise StackError(f"rabbitmqctl {arguments[0]} failed ({code}): {said.decode(errors='replace')}")

    def wait_until_ready(self) -> None:
        """Return when the probe no longer raises OSError; StackError with the log's end when that does not come."""
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            try:
                self._probe()
            except OSError as error:
                if time.monotonic() > deadline or self._container().status not in ("running", "created", "restarting"):
                    log = self._container().logs(tail=15).decode(errors="replace")
                    raise StackError(f"container {self._name} did not get ready ({error}):\n{log}") from error
                time.sleep(RETRY_S)
            else:
                return

    def _container(self) -> Any:
        return engine().containers.get(self._name)


def start_postgres(
    ledger: Ledger, memory: Memory, ports: Ports, *, environ: Mapping[str, str], durable: bool
) -> postgres.Postgres:
    """Start PostgreSQL in a container."""
    image = _image("postgres", environ)
    password = memory.recall_or_make("postgres.password", lambda: secrets.token_hex(16))
    recipe = Recipe(
        server="postgres",
        image=image,
        env={
            "POSTGRES_USER": postgres.USER,
            "POSTGRES_PASSWORD": password,
            "POSTGRES_DB": postgres.DATABASE,
            "POSTGRES_INITDB_ARGS": "--encoding=UTF8 --locale=C",
            # Said, because it moved in version 18: below the volume in every version.
            "PGDATA": "/var/lib/postgresql/bide",
        },
        inner_port=5432,
        port=ports.claim("postgres"),
        folder="/var/lib/postgresql",
        command=["postgres", *postgres.settings(durable=durable)],
    )
    url = f"postgresql://{postgres.USER}:{password}@127.0.0.1:{recipe.port}/{postgres.DATABASE}"
    run = _create(ledger, memory, recipe, durable=durable, probe=lambda: server_version(url))
    return postgres.Postgres(url=url, source="docker", run=run, version=server_version(url))


def start_rabbitmq(
    ledger: Ledger, memory: Memory, ports: Ports, *, environ: Mapping[str, str], durable: bool
) -> rabbitmq.RabbitMQ:
    """Start RabbitMQ in a container."""
    image = _image("rabbitmq", environ)
    password = memory.recall_or_make("rabbitmq.password", lambda: secrets.token_hex(16))
    recipe = Recipe(
        server="rabbitmq",
        image=image,
        env={"RABBITMQ_DEFAULT_USER": rabbitmq.USER, "RABBITMQ_DEFAULT_PASS": password},
        inner_port=5672,
        port=ports.claim("rabbitmq"),
        folder="/var/lib/rabbitmq",
    )
    url = f"amqp://{rabbitmq.USER}:{password}@127.0.0.1:{recipe.port}/"
    run = _create(ledger, memory, recipe, durable=durable, probe=lambda: broker_version(url))
    return rabbitmq.RabbitMQ(url=url, source="docker", run=run, version=broker_version(url), control=run.control)


def remove(container: Container) -> None:
    """Remove a container of the record, and its volume if that was to go with it."""
    import docker.errors  # type: ignore[import-untyped]  # noqa: PLC0415

    client = engine()
    with contextlib.suppress(docker.errors.NotFound):
        found = client.containers.get(container.id)
        found.stop(timeout=STOP_LIMIT_S)
        found.remove(force=True, v=True)  # v: only what the image itself declared, our volume has a name.
    if container.volume:
        with contextlib.suppress(docker.errors.NotFound):
            client.volumes.get(container.volume).remove()


def engine() -> Any:
    """Return the client of the engine that answers here; UnavailableError when none does."""
    _knock()
    try:
        import docker  # noqa: PLC0415 (a stack without containers needs no client)
    except ImportError:
        raise UnavailableError("the Python package testcontainers is not installed") from None
    try:
        client = docker.from_env(timeout=ENGINE_LIMIT_S)
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise UnavailableError(f"no Docker engine answers ({type(error).__name__})") from error
    return client


def _knock() -> None:
    # Before the client is loaded: that takes 0.3 s, and it leaves its socket open when nobody answers.
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(host.removeprefix("unix://"))
            except OSError as error:
                raise UnavailableError(f"no Docker engine answers at {host} ({error.strerror})") from error


def _image(server: str, environ: Mapping[str, str]) -> str:
    client = engine()
    name = environ.get(f"BIDE_LOCAL_{server.upper()}_IMAGE") or IMAGES[server]
    import docker.errors  # noqa: PLC0415

    try:
        client.images.get(name)
    except docker.errors.DockerException:
        raise UnavailableError(f"the Docker engine has no image {name}, and none is pulled on its own") from None
    return name


def _create(
    ledger: Ledger, memory: Memory, recipe: Recipe, *, durable: bool, probe: Callable[[], object]
) -> ContainerRun:
    import docker.errors  # noqa: PLC0415
    from testcontainers.core.config import testcontainers_config  # noqa: PLC0415
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415

    testcontainers_config.ryuk_disabled = True  # It would be pulled; our own record removes what we leave.
    stack = memory.recall_or_make("docker.stack", lambda: secrets.token_hex(4))
    name = f"bide-{stack}-{recipe.server}"
    # Written down before it exists: a crash in between leaves a name too many, never a container too many.
    ledger.add_container(Container(recipe.server, name, None if durable else name))
    container = DockerContainer(recipe.image)
    container.with_name(name).with_envs(**recipe.env).with_volume_mapping(name, recipe.folder, "rw")
    # The type allows a port only; the engine's client takes an address too.
    container.ports.update(cast("Any", {f"{recipe.inner_port}/tcp": ("127.0.0.1", recipe.port)}))
    if recipe.command:
        container.with_command(list(recipe.command))
    # The node's data is filed under its host's name, which would otherwise be another for every container.
    container.with_kwargs(hostname=f"bide-{recipe.server}", restart_policy={"Name": "on-failure"})
    try:
        container.start()
    except docker.errors.DockerException as error:
        raise StackError(f"the Docker engine could not start {recipe.image}: {error}") from error
    run = ContainerRun(name, probe=probe)
    run.wait_until_ready()
    return run
