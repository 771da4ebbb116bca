"""What liveness tells, and what it is asked."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field

from shared.facts.fact import Count, Fact


class WorkspaceStatus(Fact):
    incarnation: Count
    status: Literal["online", "busy", "suspect", "offline", "restarting", "wedged", "paused", "gave_up", "removed"]
    reason: str


class LivenessQuery(Fact):
    """A question or a command about an agent's life; answered with QueryAnswered to `reply_to`.

    A command (`restart`, `resume`) answers after its commit, may be sent again, and is refused after `expires_at`.
    `show` tells what is believed and why, `history` the evidence and the restarts, newest first.
    """

    query_id: UUID
    verb: Literal["show", "history", "restart", "resume"]
    note: str = ""
    by: str
    """Who says it, as it is shown."""
    limit: Annotated[int, Field(ge=1, le=500)] = 50
    expires_at: AwareDatetime
    reply_to: str
