"""Questions that are under way to the queue service, by id."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from shared.facts import QueryAnswered


@dataclass(slots=True)
class Queries:
    """A table of futures: one reply queue serves all questions of this replica at once."""

    _asked: dict[UUID, asyncio.Future[QueryAnswered]] = field(default_factory=dict)

    @contextmanager
    def asking(self, query_id: UUID) -> Iterator[asyncio.Future[QueryAnswered]]:
        answered = asyncio.get_running_loop().create_future()
        self._asked[query_id] = answered
        try:
            yield answered
        finally:
            del self._asked[query_id]

    def hear(self, fact: QueryAnswered) -> None:
        answered = self._asked.get(fact.query_id)
        if answered is not None and not answered.done():
            answered.set_result(fact)
