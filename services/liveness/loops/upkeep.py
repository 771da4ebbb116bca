"""What must be done now and then: statuses said again, agents counted, old rows forgotten."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from services.liveness import store
from services.liveness.decide.life import Status
from services.liveness.metrics import BLIND, HEARD_AGE, STATUSES
from services.liveness.settings import Settings
from services.liveness.store import SQL
from shared.broker import Publisher
from shared.database import Pool
from shared.loops import Loop

_REPEAT_S = 30.0
_MEASURE_S = 5.0
_FORGET_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Each method is one loop's `run_once`."""

    settings: Settings
    pool: Pool
    publisher: Publisher

    def loops(self) -> list[Loop]:
        return [Loop("statuses", self.repeat), Loop("measure", self.measure), Loop("forget", self.forget)]

    async def repeat(self) -> float:
        """Say every status again: a proxy that has just come up, or was cut off, has none."""
        for row in await self.pool.fetch(SQL["repeat_statuses"]):
            self.publisher.post(store.status_of(store.life_of(row)))
        return _REPEAT_S

    async def measure(self) -> float:
        counts: Counter[str] = Counter()
        blind, silent_s = 0, 0.0
        for row in await self.pool.fetch(SQL["measure"]):
            counts[row["status"]] += row["agents"]
            blind += row["blind"]
            silent_s = max(silent_s, row["silent_s"] or 0.0)
        for status in Status:
            STATUSES.labels(status.value).set(counts[status.value])
        BLIND.set(blind)
        HEARD_AGE.set(silent_s)
        return _MEASURE_S

    async def forget(self, now: datetime | None = None) -> float:
        await self.pool.execute(SQL["forget_proxies"])
        about = (now, self.settings.evidence_days, _FORGET_ROWS)
        names = ("forget_evidence", "forget_restarts", "forget_orders")
        done = {await self.pool.execute(SQL[name], *about) for name in names}
        return 0.0 if f"DELETE {_FORGET_ROWS}" in done else 3600.0
