"""A clock that jumps: an event loop whose waits take no time. Whatever runs in it sees a day go by in seconds."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

BEGIN = datetime(2026, 4, 16, tzinfo=UTC)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is virtual and begins at 0; when nothing is ready it is at once the moment of the next timer.

    Raises:
        RuntimeError: no timer is left, so that a real loop would wait for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._virtual_s = 0.0
        self._selector: Any
        self._selector.select = self._skip

    def time(self) -> float:
        return self._virtual_s

    def monotonic(self) -> float:
        """As the module `time` has it: this loop may stand in its place."""
        return self._virtual_s

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self._virtual_s)

    def _skip(self, wait_s: float | None) -> list[Any]:
        if wait_s is None:
            raise RuntimeError("nothing will ever happen again")
        self._virtual_s += max(wait_s, 0.0)
        return []
