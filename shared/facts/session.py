"""A session, wherever it is spoken of."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import AwareDatetime, Field

from shared.facts.fact import Digest, Part


class Running(Part):
    """A delivery or a live forward that is under way."""

    session_id: str
    key_hash: Digest | None = None
    started_at: AwareDatetime
    ceiling_s: Annotated[float, Field(ge=0)] | None = None
    """Of its own, as its schedule says; None: its workspace's. 0: no ceiling."""
    schedule_id: UUID | None = None
    """The schedule whose tick it is."""


class Ended(Part):
    """A live forward that ended in the last 60 s."""

    session_id: str
    outcome: str
    started_at: AwareDatetime
    ended_at: AwareDatetime
