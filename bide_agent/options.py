"""What one agent is started with; what may change while it runs stands in `behaviour.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One agent: which workspace it sits in, whom it tells, and how it behaves at first."""

    workspace: str
    bide: str | None = None
    """Base URL of the proxy; None: it belongs to nobody, sends no heartbeat and asks for no token."""
    token: str = field(default="", repr=False)
    """Enrolment or admin token: for the first registration, and where the agent's own one is refused."""
    port: int = 0
    """0: any free one between 26000 and 32000."""
    max_concurrent: int = 1
    work_s: float = 0.3
    heartbeat_s: float = 30.0
    record: Path | None = None
    """File to which every message is written, one JSON line per event; the format stands in `record.py`."""
    state_dir: Path | None = None
    """Where the agent's own token outlives the process (mode 0600)."""
    grace_s: float = 1.0
    """How long running turns may still end by themselves when the agent is told to stop."""
    may_die: bool = False
    """Whether `dies` may be asked for: it ends the whole process, so only one that is nothing but this agent."""
    behaviour: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the default `Behaviour`, as `behave` takes them."""
