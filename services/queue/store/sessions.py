"""Stops of deliveries, and the proxies that live."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass
from datetime import datetime
from uuid import UUID

from services.queue.store.statements import SQL, columns
from shared.database import Connection


@dataclass(frozen=True, slots=True)
class Stop:
    """A delivery that is to stop, and whether its owner hangs up."""

    queue_id: UUID
    delivery_no: int
    workspace_id: str
    reason: str
    hangs_up: bool = False


@dataclass(frozen=True, slots=True)
class Stopped:
    """A delivery that has been told to stop; `first`: not before."""

    queue_id: UUID
    workspace_id: str
    delivery_no: int
    stop_reason: str
    first: bool


async def stop(connection: Connection, wanted: Iterable[Stop], now: datetime | None = None) -> list[Stopped]:
    """Stop deliveries, fenced; return what runs of them. The caller holds the workspaces' locks; none stands twice."""
    values = [astuple(each) for each in wanted]
    rows = await connection.fetch(SQL["stop_items"], *columns(values), now) if values else []
    return [Stopped(**row) for row in rows]


async def beat_proxies(
    connection: Connection, proxy_ids: Collection[str], silent_s: float, now: datetime | None = None
) -> None:
    """Note that these live."""
    if proxy_ids:
        await connection.execute(SQL["beat_proxies"], list(proxy_ids), silent_s, now)


async def living_proxies(connection: Connection, silent_s: float, now: datetime | None = None) -> set[str]:
    return {row["proxy_id"] for row in await connection.fetch(SQL["living_proxies"], silent_s, now)}
