"""What liveness does with each fact: fetch, decide, write. A driver is never called here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.liveness import store
from services.liveness.decide import life as lives
from services.liveness.decide.life import Life, Status, believed
from services.liveness.metrics import EVIDENCE
from services.liveness.restart import door
from services.liveness.store import SQL
from shared.database import Connection
from shared.facts import (
    FactT,
    ProxyBeat,
    SessionKill,
    WorkspaceChanged,
    WorkspaceEvidence,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
)
from shared.intake import Tell

KNOWN_DRIVERS = frozenset({"process", "docker", "webhook"})
"""Any other word in `runtime` is as none: the agent is external."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers, bound to what they wake."""

    drivers: Collection[str]
    """Drivers that may act here; none in observe mode."""
    wake_looks: Callable[[], None]
    wake_restarts: Callable[[], None]

    async def registered(self, connection: Connection, facts: Sequence[WorkspaceRegistered]) -> Tell:
        """Take over the registry's word (WorkspaceRegistered and WorkspaceChanged)."""
        newest = _newest(facts)
        before = await store.lock(connection, newest)
        now = await store.clock(connection)
        after = []
        for fact in newest.values():
            driver = fact.runtime.get("driver")
            life = lives.registered(
                before.get(fact.workspace_id), fact, driver=driver if driver in KNOWN_DRIVERS else None, now=now,
                by_agent=not isinstance(fact, WorkspaceChanged),
            )  # fmt: skip
            if life is not None:
                after.append(await _settled(connection, before.get(fact.workspace_id), life, now))
        await store.save(connection, before, after, now)
        return self.wake

    async def removed(self, connection: Connection, facts: Sequence[WorkspaceRemoved]) -> Tell:
        """Let a workspace go for ever, and its restart with it."""
        newest = _newest(facts)
        before = await store.lock(connection, newest)
        now = await store.clock(connection)
        after = []
        for fact in newest.values():
            life = lives.gone(before.get(fact.workspace_id), fact.workspace_id, fact.rev)
            if life is not None:
                await door.withdraw(connection, life, "withdrawn", now)
                after.append(life)
        await store.save(connection, before, after, now)
        return self.wake

    async def heartbeats(self, connection: Connection, facts: Sequence[WorkspaceHeartbeat]) -> Tell:
        """Hear agents; of each only the newest beat of its newest incarnation."""
        newest: dict[str, WorkspaceHeartbeat] = {}
        for fact in sorted(facts, key=lambda fact: (fact.workspace_id, fact.incarnation, fact.rev)):
            newest[fact.workspace_id] = fact
        before = await store.lock(connection, newest)
        now = await store.clock(connection)
        after = []
        for name, life in before.items():
            told = lives.beat(life, newest[name], now)
            if told is not None:
                after.append(await _settled(connection, life, told, now))
        await store.save(connection, before, after, now)
        return lambda: None

    async def evidence(self, connection: Connection, facts: Sequence[WorkspaceEvidence]) -> Tell:
        """Take what those saw who talked to agents; a doubt is looked into at once."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        now = await store.clock(connection)
        after = dict(before)
        for fact in facts:
            EVIDENCE.labels(fact.kind.value).inc()
            life = after.get(fact.workspace_id)
            told = lives.evidence(life, fact, now) if life is not None else None
            if told is not None:
                after[fact.workspace_id] = told
        await store.save(connection, before, list(after.values()), now)
        return self.wake_looks

    async def proxy_beats(self, connection: Connection, facts: Sequence[ProxyBeat]) -> None:
        """Remember which proxies are heard: while none is, silence counts for nobody (D-S1)."""
        await connection.execute(SQL["hear_proxies"], sorted({fact.proxy_id for fact in facts}))

    async def kill(self, connection: Connection, facts: Sequence[SessionKill]) -> Tell:
        """Take orders to end the container of a session; each is answered once."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        now = await store.clock(connection)
        after = dict(before)
        for fact in facts:
            if not await store.insert_order(connection, fact, now):
                continue
            life = await door.order(connection, after.get(fact.workspace_id), fact, now, drivers=self.drivers)
            if life is not None:
                after[fact.workspace_id] = life
        await store.save(connection, before, list(after.values()), now)
        return self.wake_restarts

    def wake(self) -> None:
        self.wake_looks()
        self.wake_restarts()


async def _settled(connection: Connection, before: Life | None, life: Life, now: datetime) -> Life:
    """End the restart of an agent that was heard before anybody began it (A-L-07)."""
    if before is None or before.heard_at == life.heard_at:
        return life
    is_new = life.incarnation > before.incarnation
    if not is_new and life.status is not Status.OFFLINE:
        return life
    if await door.withdraw(connection, life, "recovered", now) and life.status is Status.OFFLINE:
        return replace(believed(life, Status.ONLINE, ""), next_check_at=now if life.driver is not None else None)
    return life


def _newest(facts: Iterable[FactT]) -> dict[str, FactT]:
    """The newest word about each workspace, in key order."""
    found: dict[str, FactT] = {}
    for fact in sorted(facts, key=lambda fact: (fact.workspace_id, fact.rev)):
        found[fact.workspace_id] = fact
    return found
