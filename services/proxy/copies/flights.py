"""Messages that this replica has in hand, by caller and key: a second one with the same key joins the first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from services.proxy.decide import InFlight

FlightKey = tuple[str, bytes, bytes]
"""Workspace, caller's hash, key's hash."""

RECORDED_BYTES_MAX = 1 << 20
"""An answer that is larger is not kept for those who joined."""


@dataclass(slots=True, eq=False)
class Flight:
    """One message from the moment its body was read until it is answered."""

    method: str
    body_hash: bytes
    queue_word: str
    """What it is kept under, if it is: whoever joined it is told this id and none of his own."""
    landed: asyncio.Future[object]
    """What became of it, for those who joined; `api` knows the kinds."""
    joined: int = 0


@dataclass(slots=True)
class Flights:
    """All of them."""

    _flights: dict[FlightKey, Flight] = field(default_factory=dict)

    def look(self, key: FlightKey, method: str, body_hash: bytes) -> InFlight:
        flight = self._flights.get(key)
        if flight is None:
            return InFlight.NO
        same = flight.body_hash == body_hash and flight.method == method
        return InFlight.SAME if same else InFlight.OTHER_BODY

    def find(self, key: FlightKey) -> Flight | None:
        return self._flights.get(key)

    def begin(self, key: FlightKey, method: str, body_hash: bytes, queue_word: str) -> Flight:
        flight = Flight(method, body_hash, queue_word, asyncio.get_running_loop().create_future())
        self._flights[key] = flight
        return flight

    def end(self, key: FlightKey, flight: Flight) -> None:
        """Let those who joined go: whoever knows an answer has set it before."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.landed.done():
            flight.landed.cancel()
