"""What an agent of the runtime is started with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def state_home() -> Path:
    """`BIDE_AGENT_STATE`, or bide-agent in the place that the system keeps for the state of programs."""
    told = os.environ.get("BIDE_AGENT_STATE")
    if told:
        return Path(told)
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "bide-agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One agent behind Bide."""

    workspace: str
    bide: str | None = None
    """Base URL of the proxy; None: it belongs to nobody, sends no heartbeat and lets everybody in."""
    token: str = field(default="", repr=False)
    """Enrolment or admin token: for the first registration, and where the agent's own one is refused."""
    host: str = "127.0.0.1"
    """The address it listens on."""
    port: int = 0
    """0: any free one between 26000 and 32000."""
    url: str | None = None
    """Where Bide reaches it, if not at host and port."""
    max_concurrent: int = 1
    heartbeat_s: float = 10.0
    state_dir: Path | None = None
    """Its token, its answers and its working directories, in a folder per workspace; None: `state_home()`."""
    checkpoint: str = "obey"
    """`obey`, or `ceiling_only`: end a turn only for requests from which something follows."""
    retry_after_s: int = 1
    """What the busy answer says."""
    grace_s: float = 5.0
    """How long running turns may still end by themselves when the agent is told to stop."""
    stop_grace_s: float = 10.0
    """How long a canceled handler may tidy up."""
    description: str = "An agent behind Bide."
    skills: Sequence[Mapping[str, Any]] = ()
    """As the agent card writes them; () is one that takes any text."""

    @property
    def folder(self) -> Path:
        return (self.state_dir or state_home()) / self.workspace
