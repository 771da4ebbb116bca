"""What a replica of proxy holds in memory, so that its hot routes ask nobody: copies of others' things, its own calls.

Each copy is fed by facts (`handlers.py`), says how old it is, and is healed by the next snapshot. There is no I/O here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.proxy.copies.applied import Applied
from services.proxy.copies.backlogs import Backlogs
from services.proxy.copies.calls import Calls
from services.proxy.copies.directives import Directives
from services.proxy.copies.flights import Flights
from services.proxy.copies.keeps import Keeps
from services.proxy.copies.owners import Owners
from services.proxy.copies.queries import Queries
from services.proxy.copies.registry import Registry
from services.proxy.copies.uses import Uses

__all__ = [
    "Applied", "Backlogs", "Calls", "Copies", "Directives", "Flights", "Keeps", "Owners", "Queries", "Registry", "Uses",
]  # fmt: skip


@dataclass(slots=True)
class Copies:
    """All of them."""

    replica_id: str
    registry: Registry = field(default_factory=Registry)
    backlogs: Backlogs = field(default_factory=Backlogs)
    keeps: Keeps = field(default_factory=Keeps)
    flights: Flights = field(default_factory=Flights)
    owners: Owners = field(default_factory=Owners)
    queries: Queries = field(default_factory=Queries)
    applied: Applied = field(default_factory=Applied)
    directives: Directives = field(default_factory=Directives)
    calls: Calls = field(default_factory=Calls)
    uses: Uses = field(init=False)

    def __post_init__(self) -> None:
        self.uses = Uses(self.replica_id)
