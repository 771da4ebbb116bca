"""What an operator may turn in scheduler."""

from __future__ import annotations

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of scheduler; a field `lease_s` here is `BIDE_SCHEDULER_LEASE_S`."""
