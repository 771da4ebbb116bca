"""What an operator may turn in proxy."""

from __future__ import annotations

from pydantic import Field

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of proxy; a field `lease_s` here is `BIDE_PROXY_LEASE_S`."""

    public_url: str | None = Field(default=None, pattern=r"^https?://[^/?#]+(/[^?#]*)?$")
    """Origin that agent cards name, where a load balancer hides ours. None: what the caller's Host header says."""
    body_bytes_max: int = Field(default=1 << 20, ge=1024)
    """A larger request is refused (413), never cut (A-P-17)."""
    body_read_s: float = Field(default=30.0, gt=0)
    """How long a caller may take to send its body."""
    hops_max: int = Field(default=16, ge=1)
    """Bides that a message may pass; more is a loop (508)."""
    queue_depth_max: int = Field(default=1000, ge=1)
    """Messages that may wait for one workspace, where its own setting says nothing else."""
    caller_rate_per_s: float = Field(default=200.0, ge=0)
    """A2A calls that one caller may make, on average, of each replica of proxy; more is 429. 0: no limit; operators
    have none."""
    caller_burst: int = Field(default=2000, ge=1)
    """Calls that a caller who was quiet may make at once."""
    critical_per_minute: int = Field(default=10, ge=0)
    """CRITICAL messages of one caller that take a new place, operators' too; more is 429. Each replica of proxy counts
    what it sees: with three of them a caller has at most three times as many. 0: no limit."""
    copy_stale_s: float = Field(default=20.0, gt=0)
    """A copy of the backlog that is older no longer holds anything back: idle agents stay reachable."""
    kept_wait_s: float = Field(default=0.25, ge=0)
    """How long a 202 waits for the queue to say the position, and whether the message is known already."""
    wait_max_s: float = Field(default=300.0, gt=0)
    """The longest `Prefer: wait=N`; a longer one is cut to it."""
    query_timeout_s: float = Field(default=2.0, gt=0)
    """How long a question to the queue service may take before the caller is told to come again."""
    applied_wait_s: float = Field(default=1.0, ge=0)
    """How long the answer to a changed schedule waits for the queue's word that it holds the change."""
    not_yet_visible_s: float = Field(default=60.0, ge=0)
    """An unknown id that is younger may have been promised by another replica a moment ago: 503 instead of 404."""
    beat_s: float = Field(default=5.0, gt=0)
    """How often live forwards are told to the others while nothing changes."""
    beat_pause_s: float = Field(default=0.1, gt=0)
    """The least time between two beats where no message waits for what they tell."""
    control_timeout_s: float = Field(default=5.0, gt=0)
    """How long an agent may take to answer a directive that is brought to it; it hears it with its next beat anyway."""
    control_calls_max: int = Field(default=32, ge=1)
    """Agents that are called so at once; there is never more than one call to one of them."""
    cancel_timeout_s: float = Field(default=10.0, gt=0)
    """How long an agent may take to answer `tasks/cancel` for a live forward that was stopped (C-K11)."""
    sessions_wait_s: float = Field(default=0.5, ge=0)
    """How long GET /workspaces waits for the scheduler's word on sessions before it says that they are not known."""
    evidence_pause_s: float = Field(default=5.0, ge=0)
    """The least time between two answers of one agent that are told to liveness as a sign of its life."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    forward_idle_s: float = Field(default=300.0, gt=0)
    """A live forward without a byte and without a heartbeat of its agent is cut after this."""
    forward_max_s: float = Field(default=86_400.0, gt=0)
    """The longest live forward."""
    caller_stall_s: float = Field(default=60.0, gt=0)
    """A caller that takes no byte for this long is treated as gone; its forward is finished without it."""
    task_owner_keep_s: float = Field(default=7 * 86_400.0, gt=0)
    """How long it is remembered whose an agent's Task is; after that its agent alone says who may ask for it."""
    task_owner_pause_s: float = Field(default=0.1, gt=0)
    """The least time between two writes of it."""
    token_unknown_s: float = Field(default=5.0, ge=0)
    """How long an unknown token is remembered as unknown, so that it costs one look-up."""
    key_fresh_s: float = Field(default=30.0, ge=0)
    """How long an API key is believed without asking Postgres again: a revoked one works this much longer."""
