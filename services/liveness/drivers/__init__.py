"""What runs agents: one file for each kind, behind one protocol, held to one suite of tests.

A driver looks, starts and ends. It decides nothing, writes no row, and takes no word of an agent: what is run stands in
the operator's files or in the registry's `runtime`, which only an operator may write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from services.liveness.decide.seen import Observation


@dataclass(frozen=True, slots=True)
class Target:
    """The agent that is meant: its workspace, and what the operator wrote about it in `runtime`."""

    workspace_id: str
    runtime: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exit:
    """The engine says that this very container has ended."""

    workspace_id: str
    container_id: str


class Killed(StrEnum):
    """What a kill met."""

    APPLIED = "applied"
    """It ran, and it is gone with all that it started."""
    GONE = "gone"
    """It did not run any more."""
    REPLACED = "replaced"
    """Something else runs in its place, and was left alone."""


class DriverError(Exception):
    """The engine did not do it, or did not say so: the same call may be made again under the same fence."""


class CannotRunError(Exception):
    """Nobody has told this driver how to run this workspace; asking again does not help until an operator does."""


class FencedError(Exception):
    """A later restart of this workspace has gone through, or another container runs than the one that was meant."""


class Driver(Protocol):
    """One kind of engine. Every call comes back within a limit of the driver's own."""

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        """Look at all of these at once; one that is not named in the answer is UNKNOWN. Never raises."""

    async def inspect(self, target: Target) -> Observation:
        """Look at one. Never raises."""

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        """End what is left of `expected` and start the agent; the same fence again starts nothing again.

        Raises:
            CannotRunError: it does not know how.
            FencedError: a later fence has been seen, or something else runs than `expected`.
            DriverError: try again.
        """

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        """End `expected` and all that it started.

        Raises: as `restart`.
        """

    def exits(self) -> AsyncIterator[Exit]:
        """Tell of containers that were seen running and have ended, as soon as the engine knows."""

    async def close(self) -> None:
        """Let go of the engine; agents go on running."""
