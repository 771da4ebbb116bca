"""What an operator may turn in proxy."""

from __future__ import annotations

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of proxy; a field `lease_s` here is `BIDE_PROXY_LEASE_S`."""
