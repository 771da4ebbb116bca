"""Questions and commands to another service: asked over the bus, answered to this replica's own queue, in time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from uuid_utils.compat import uuid7

from services.proxy.copies import Copies
from services.proxy.settings import Settings
from shared import topology
from shared.broker import NotPublished, Publisher, PublishUnknown
from shared.facts import LivenessQuery, QueryAnswered, QueueQuery, ScheduleQuery


@dataclass(frozen=True, slots=True)
class Found:
    """What a service said: an HTTP status and a JSON object, as bytes."""

    status: int
    body: bytes

    def read(self) -> dict[str, Any]:
        said = json.loads(self.body)
        return said if isinstance(said, dict) else {}


class Asking:
    """Asks, and waits for the answer."""

    def __init__(self, settings: Settings, copies: Copies, publisher: Publisher) -> None:
        self._settings = settings
        self._copies = copies
        self._publisher = publisher
        self._reply_to = topology.route(QueryAnswered, "proxy").queue(settings.replica_id)

    async def ask(
        self,
        kind: type[QueueQuery | ScheduleQuery | LivenessQuery],
        workspace_id: str,
        *,
        within_s: float | None = None,
        **about: Any,
    ) -> Found | None:
        """What the service says that reads this kind, `about` as its fields are; None: it does not answer.

        `within_s` None: `query_timeout_s`, as for whoever can be told to come again.
        """
        timeout_s = self._settings.query_timeout_s if within_s is None else within_s
        query = kind(
            workspace_id=workspace_id,
            rev=0,
            query_id=uuid7(),
            expires_at=datetime.now(UTC) + timedelta(seconds=timeout_s),
            reply_to=self._reply_to,
            **about,
        )
        with self._copies.queries.asking(query.query_id) as answer:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._publisher.publish(query)
                    said = await answer
            except (TimeoutError, NotPublished, PublishUnknown):
                return None
        # 408: it was met after its deadline, and nothing was done.
        return Found(said.status, said.body) if said.status != 408 else None  # noqa: PLR2004
