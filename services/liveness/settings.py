"""What an operator may turn in liveness."""

from __future__ import annotations

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of liveness; a field `lease_s` here is `BIDE_LIVENESS_LEASE_S`."""
