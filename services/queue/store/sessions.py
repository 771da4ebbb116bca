"""Stops of deliveries, and the proxies that live."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.queue.store.statements import SQL, columns
from shared.database import Connection


@dataclass(frozen=True, slots=True)
class Stopped:
    """A delivery that has been told to stop; `first`: not before."""

    queue_id: UUID
    workspace_id: str
    delivery_no: int
    stop_reason: str
    first: bool


async def stop(
    connection: Connection, wanted: Sequence[tuple[UUID, int, str, bool]], now: datetime | None = None
) -> list[Stopped]:
    """Stop deliveries, fenced: `(queue_id, delivery_no, reason, whether the owner hangs up)`; return what runs of them.

    The caller holds the workspaces' locks. No item stands twice.
    """
    rows = await connection.fetch(SQL["stop_items"], *columns(wanted), now) if wanted else []
    return [Stopped(**row) for row in rows]


async def beat_proxies(
    connection: Connection, proxy_ids: Collection[str], silent_s: float, now: datetime | None = None
) -> None:
    """Note that these live."""
    if proxy_ids:
        await connection.execute(SQL["beat_proxies"], list(proxy_ids), silent_s, now)


async def living_proxies(connection: Connection, silent_s: float, now: datetime | None = None) -> set[str]:
    return {row["proxy_id"] for row in await connection.fetch(SQL["living_proxies"], silent_s, now)}
