"""What an operator may turn in queue."""

from __future__ import annotations

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of queue; a field `lease_s` here is `BIDE_QUEUE_LEASE_S`."""
