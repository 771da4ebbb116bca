"""Wiring of proxy, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from services.proxy.settings import Settings
from shared.service import running, start

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(settings: Settings) -> None:
    async with running("proxy", settings, MIGRATIONS) as service:
        await service.serve()


if __name__ == "__main__":
    sys.exit(start("proxy", Settings, main))
