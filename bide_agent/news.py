"""A signal that something has happened, for whoever waits until something holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class News:
    """Told on every message, beat and change of behaviour."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def until(self, holds: Callable[[], bool], within_s: float = 30.0) -> None:
        """Come back when `holds`; it is asked again at every piece of news.

        Raises:
            TimeoutError: it did not hold within `within_s`.
        """
        async with asyncio.timeout(within_s):
            while not holds():
                await self._next.wait()
