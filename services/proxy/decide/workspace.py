"""A workspace as the registry has it, and whether a life of its agent is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DOWN = frozenset({"offline", "restarting", "gave_up"})
"""Words of liveness for a life that is over."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """One row of the registry."""

    workspace_id: str
    owner_caller: str
    url: str
    token_hash: bytes
    incarnation: int
    rev: int
    agent_authorization: str | None = None
    agent_card: str | None = None
    runtime: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    max_concurrent: int = 1
    heartbeat_interval_s: float = 30.0
    desired: Literal["running", "stopped"] = "running"
    paused: bool = False
    pause_note: str | None = None
    boot_id: str | None = None
    registered_boot: str | None = None
    """The process that registered last; None: it named no boot id."""
    boots_past: tuple[str, ...] = ()
    booted_at: float | None = None
    removed: bool = False

    @property
    def is_unregistered(self) -> bool:
        """Whether another process beats than the one that registered: the url may lead nowhere (A-L-11)."""
        return self.registered_boot is not None and self.registered_boot != self.boot_id


def said_s(workspace: Workspace, name: str, default_s: float) -> float:
    """A time that a workspace may set itself."""
    said = workspace.settings.get(name)
    return float(said) if said is not None else default_s


def is_outlived(*, life: int, incarnation: int, dead_incarnation: int, dead_age_s: float, grace_s: float) -> bool:
    """Whether nothing can come any more of a forward to this life: it was declared dead, and its grace is over.

    At once where another life has been heard: nobody has to wait for the old one then.
    """
    return life <= dead_incarnation and (incarnation > life or dead_age_s >= grace_s)
