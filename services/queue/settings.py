"""What an operator may turn in queue."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from shared.settings import SharedSettings

_BEATS_MIN = 3


class Settings(SharedSettings):
    """Settings of queue; a field `lease_s` here is `BIDE_QUEUE_LEASE_S`."""

    deliveries_max: int = Field(default=500, ge=1)
    """Deliveries of one replica at once; beyond it nothing more is claimed here."""
    attempts_max: int = Field(default=5, ge=1)
    deaths_max: int = Field(default=3, ge=1)
    """Deliveries that the agent did not survive, after which a message is poison."""
    starvation_limit_s: float = Field(default=1800.0, ge=0)
    """What has waited for longer takes every second turn from CRITICAL."""
    sweep_s: float = Field(default=5.0, gt=0)
    """How often workspaces that wait are looked at without a reason, and expired items end."""
    reconcile_s: float = Field(default=30.0, gt=0)
    """How often the counters of workspaces are held against their rows."""
    snapshot_s: float = Field(default=5.0, gt=0)
    snapshot_pause_s: float = Field(default=0.5, gt=0)
    """The least time between two snapshots, however many proxies ask for one."""
    owner_beat_s: float = Field(default=5.0, gt=0)
    owner_silent_s: float = Field(default=20.0, gt=0)
    """A replica that has not beaten for this long, by the database's clock, has lost its deliveries.

    Whose own beats come further apart than half of it takes nobody's.
    """

    @field_validator("owner_silent_s")
    @classmethod
    def _is_several_beats(cls, silent_s: float, info: ValidationInfo) -> float:
        """One late beat says nothing: a loop that is busy for a moment must not lose what it delivers (B-09)."""
        beat_s = info.data.get("owner_beat_s")
        if beat_s is not None and silent_s < _BEATS_MIN * beat_s:
            raise ValueError(f"write at least {_BEATS_MIN} times BIDE_QUEUE_OWNER_BEAT_S, or one late beat is a death")
        return silent_s

    reread_s: float = Field(default=1.0, gt=0)
    """How often an owner re-reads its own deliveries for a cancel, a stop, or a fence."""
    proxy_silent_s: float = Field(default=60.0, gt=0)
    """A proxy that has not beaten for this long begins no forward any more: no gate waits for its word."""
    forward_idle_s: float = Field(default=300.0, gt=0)
    """A turn without a byte and without a beat of its agent is cut after this."""
    forward_max_s: float = Field(default=86400.0, gt=0)
    """The longest turn where no ceiling bounds it."""
    follow_min_s: float = Field(default=1.0, gt=0)
    follow_max_s: float = Field(default=15.0, gt=0)
    """An accepted Task is asked for between these, ever less often."""
    busy_base_s: float = Field(default=1.0, gt=0)
    busy_cap_s: float = Field(default=60.0, gt=0)
    """A busy workspace is closed for a random part of base doubling to cap; a beat with capacity opens it."""
    answer_bytes_max: int = Field(default=8 << 20, ge=1)
    idempotency_keep_s: float = Field(default=7 * 86400.0, gt=0)
    """How long an explicit Idempotency-Key answers with what it once gave."""
    retention_days: int = Field(default=7, ge=1)
    """UTC days for which an item is found after the day of its ending; then it is 404."""
    bodies_days: int | None = Field(default=None, ge=0)
    """The same for its body alone, if that is to go earlier. An item without its body cannot be retried."""
    dead_letters_days: int = Field(default=30, ge=1)
    """How long a fact that was set aside can be listed and replayed."""
