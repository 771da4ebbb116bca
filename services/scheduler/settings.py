"""What an operator may turn in scheduler."""

from __future__ import annotations

from pydantic import Field

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of scheduler; a field `lease_s` here is `BIDE_SCHEDULER_LEASE_S`."""

    claim_rows: int = Field(default=500, ge=1, le=5000)
    """Schedules that one transaction fires."""
    look_s: float = Field(default=5.0, gt=0, le=60)
    """The longest sleep between two looks at what is due: so late is a schedule whose replica died after an edit."""
    schedules_max: int = Field(default=1000, ge=1)
    """Schedules that one workspace may have."""
    retention_days: int = Field(default=90, ge=1)
    """How long a fire is shown after it ended."""
    audit_days: int = Field(default=365, ge=1)
    """How long it is remembered who changed which schedule."""
