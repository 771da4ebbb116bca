"""The operator's file: which command line is which workspace's agent. No message ever says that."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.liveness.drivers import DriverError


class Agent(BaseModel):
    """One `[agents.<workspace_id>]` of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    command: list[str] = Field(min_length=1)
    cwd: str = "/"
    env: dict[str, str] = {}
    stop_s: float = Field(default=10.0, ge=0, le=600)
    """Between SIGTERM and SIGKILL."""


class Agents(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    agents: dict[str, Agent] = {}


def read_agent(path: Path | None, workspace_id: str) -> Agent | None:
    """Read the file anew each time: an operator's edit counts at once. None: it does not name this workspace.

    Raises:
        DriverError: it cannot be used, and where; without its values, for an `env` holds secrets.
    """
    if path is None:
        return None
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
        return Agents.model_validate(written).agents.get(workspace_id)
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DriverError(f"{path} cannot be used: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"])
        raise DriverError(f"{path} cannot be used: {place}: {first['msg']}") from error
