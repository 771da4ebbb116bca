"""Read a service's settings from the environment, once, into a frozen value.

A field `lease_s` that every service has is `BIDE_LEASE_S`; a field of one service, `lease_s` of queue, is
`BIDE_QUEUE_LEASE_S`. `NAME_FILE` names a file that holds the value, for secrets. A name that starts with `BIDE_` and
that nobody reads is refused: a typo must not silently leave a default in force. Nothing else reads the environment.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from uuid_utils.compat import uuid7

SERVICES = ("proxy", "queue", "scheduler", "liveness")

# Read by the tests and by the local stack, never by a service.
_FOREIGN = ("BIDE_TEST_", "BIDE_LOCAL_", "BIDE_NO_DOCKERD")

TURN_SLACK_S = 60.0
"""What a turn may outlast its ceiling and both graces by: whoever ends it looks only now and then."""
STOP_HEARD_S = 60.0
"""Who has a session ended says so every 10 s. Once he has been quiet for this long, the longest turn counts again."""

SettingsT = TypeVar("SettingsT", bound="SharedSettings")


class SettingsError(Exception):
    """The environment cannot be used as it is; each line of the message names one variable and what to do."""


class SharedSettings(BaseModel):
    """What every service needs. A service adds its own fields in its `settings.py`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    database_url: SecretStr
    """postgresql:// URL of the service's own role; its schema is the role's search_path."""
    amqp_url: SecretStr
    """amqp:// URL of the vhost that all services share."""
    database_pool_max: int = Field(default=10, ge=2, le=200)
    """Connections to Postgres per process; health takes one more while it asks."""
    database_pooler: str = Field(default="session", pattern="^(session|transaction)$")
    """`transaction` behind a PgBouncer in transaction mode: no statement cache."""
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535)
    """0 lets the system choose; the log event `listening` tells which."""
    log_format: str = Field(default="json", pattern="^(json|console)$")
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    confirm_timeout_s: float = Field(default=2.0, gt=0, le=60)
    """How long a publish waits for the broker's confirm before its fate is called unknown (policies §1)."""
    outbox_claim_s: float = Field(default=30.0, gt=0)
    """How long a replica holds outbox rows that it is publishing; its death delays them by this much."""
    outbox_sweep_s: float = Field(default=1.0, gt=0)
    inbox_keep_s: float = Field(default=48 * 3600.0, ge=3600)
    """How long a fact is remembered, so that its redelivery has no effect."""
    drain_s: float = Field(default=25.0, ge=0)
    """How long a stopping service waits for what it has begun. Keep the orchestrator's kill above it."""
    admin_token: SecretStr | None = None
    """The operator's bearer token: it has every right. Read by the proxy."""
    delivery_secret: SecretStr | None = None
    """What the token that we show to an agent is derived from. Read by whoever talks to agents: proxy and queue."""
    session_ceiling_s: float = Field(default=1800.0, ge=0, le=30 * 86_400.0)
    """How long a session may last where neither its workspace nor its schedule says otherwise; 0: for ever. This and
    the two graces are read by the scheduler, which ends it, and by queue and proxy, which do not wait for its answer
    for ever."""
    checkpoint_grace_s: float = Field(default=120.0, ge=0)
    """What a session has for saving and ending its turn once it was asked to, at its ceiling; its workspace's first."""
    stop_grace_s: float = Field(default=30.0, ge=0)
    """What it has for ending after its cancel, before its container may be ended, and what a turn has to come to an end
    after its agent was declared dead; its workspace's first."""
    allow_loopback: bool = False
    """Whether an agent's URL may point to this very machine. The local stack sets it; a real one must not."""
    replica_id: str = Field(default_factory=lambda: f"{socket.gethostname()[:40]}-{uuid7().hex[-12:]}")
    """New for every process: a restarted one must never be taken for the one that died (B-07)."""

    @field_validator("database_url", "amqp_url")
    @classmethod
    def _is_url(cls, url: SecretStr, info: ValidationInfo) -> SecretStr:
        """Check what drivers would answer with a trace, or with the password in it."""
        schemes = {"database_url": ("postgresql", "postgres"), "amqp_url": ("amqp", "amqps")}[info.field_name or ""]
        try:
            parts = urlsplit(url.get_secret_value())
            usable = parts.scheme in schemes and parts.netloc != "" and (parts.port is None or parts.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"write {schemes[0]}://user:password@host:port/name, with special characters as %XX")
        return url


def load(service: str, kind: type[SettingsT], environ: Mapping[str, str]) -> SettingsT:
    """Build `kind` from `environ`.

    Raises:
        SettingsError: an unknown name, an unreadable file, a missing or bad value. All of them at once.
    """
    names = {_variable(service, kind, field): field for field in kind.model_fields}
    values: dict[str, str] = {}
    problems = list(_unknown(service, names, environ))
    for name, field in names.items():
        try:
            value = _read(name, environ)
        except SettingsError as error:
            problems.append(str(error))
        else:
            if value is not None:
                values[field] = value
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        variables = {field: name for name, field in names.items()}
        problems += [f"{variables[str(e['loc'][0])]}: {e['msg']}" for e in error.errors() if e["loc"]]
        raise SettingsError("\n".join(problems)) from None
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def _variable(service: str, kind: type[SharedSettings], field: str) -> str:
    own = field not in SharedSettings.model_fields and field in kind.model_fields
    return f"BIDE_{service.upper()}_{field.upper()}" if own else f"BIDE_{field.upper()}"


def _read(name: str, environ: Mapping[str, str]) -> str | None:
    path = environ.get(f"{name}_FILE")
    if path is None:
        return environ.get(name)
    if name in environ:
        raise SettingsError(f"{name} and {name}_FILE are both set: keep one of them")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{name}_FILE: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}_FILE: {path} is not UTF-8 text") from None


def _unknown(service: str, names: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[str]:
    others = tuple(f"BIDE_{other.upper()}_" for other in SERVICES if other != service)
    for name in environ:
        if not name.startswith("BIDE_") or name.startswith(_FOREIGN):
            continue
        known = name in names or (name.endswith("_FILE") and name.removesuffix("_FILE") in names)
        if known or name.startswith(others):  # another service's own name: that service answers for it
            continue
        near = difflib.get_close_matches(name, names, n=1)
        yield f"{name}: unknown setting" + (f", did you mean {near[0]}?" if near else "; remove it")
