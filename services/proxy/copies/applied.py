"""Which rev of each schedule the queue holds: whoever has changed one waits here until the change is in effect."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from uuid import UUID

from shared.facts import ScheduleApplied

_REMEMBERED_MAX = 10_000


@dataclass(slots=True)
class Applied:
    """The newest rev of each that was told since this replica started; the oldest are forgotten."""

    _revs: OrderedDict[UUID, int] = field(default_factory=OrderedDict)
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, fact: ScheduleApplied) -> None:
        self._revs[fact.schedule_id] = max(fact.rev, self._revs.get(fact.schedule_id, 0))
        self._revs.move_to_end(fact.schedule_id)
        if len(self._revs) > _REMEMBERED_MAX:
            self._revs.popitem(last=False)
        heard, self._heard = self._heard, asyncio.Event()
        heard.set()

    async def wait(self, schedule_id: UUID, rev: int, within_s: float) -> bool:
        """Whether the queue holds this rev, at the latest after `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                while self._revs.get(schedule_id, -1) < rev:
                    await self._heard.wait()
        except TimeoutError:
            return False
        return True
