"""Looks at agents when they are due, and the engine's word that one has ended: each is judged, and acted upon."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from services.liveness import store
from services.liveness.decide.doubts import doubt_of
from services.liveness.decide.judge import Decision, Doubt, Reason, Verdict, judge
from services.liveness.decide.life import DOWN, Life, Status, believed
from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import Driver, Exit, Target
from services.liveness.metrics import DETECTED, HOLDS, PROBES, VERDICTS, WINDOW
from services.liveness.restart import door
from services.liveness.settings import Settings
from services.liveness.store import SQL
from shared.database import Connection, Pool, Trouble, backoff_s, classify, transact
from shared.loops import Loop
from shared.telemetry import log

_CLAIM_MAX = 1000
_TOGETHER_S = 2.0
"""What is due so soon is looked at now: one list for all of an engine's agents (D-S21)."""
_LAG_S = 1.0
_LIST_S = 20.0


@dataclass(slots=True)
class Looks:
    """`died` is called after a commit that may have opened a restart, `told` after one that may have said something."""

    settings: Settings
    pool: Pool
    drivers: Mapping[str, Driver]
    died: Callable[[], None]
    told: Callable[[], None]
    loop: Loop = field(init=False)
    _started: float = field(default_factory=time.monotonic)
    _asleep_until: float | None = None

    def __post_init__(self) -> None:
        self.loop = Loop("looks", self.look)

    async def look(self, now: datetime | None = None) -> float:
        """Look at what is due: one list for each engine; judge each in a transaction of its own."""
        slow = self._is_slow()
        rows = await self.pool.fetch(SQL["claim_looks"], now, _TOGETHER_S, _CLAIM_MAX, self.settings.sweep_s)
        by_driver: dict[str, list[Life]] = defaultdict(list)
        for row in rows:
            by_driver[row["driver"]].append(store.life_of(row))
        await asyncio.gather(*(self._list(driver, due, now, slow=slow) for driver, due in by_driver.items()))
        until_s: float | None = await self.pool.fetchval(SQL["next_look_in"], now)
        delay_s = self.settings.look_s if until_s is None else min(max(until_s, 0.01), self.settings.look_s)
        self._asleep_until = time.monotonic() + delay_s
        return delay_s

    async def exits(self, driver: Driver) -> None:
        """Hear of ends from the engine itself, for as long as the service runs."""
        attempt = 0
        while True:
            try:
                async for ended in driver.exits():
                    attempt = 0
                    await self._ended(ended)
            except Exception as error:  # noqa: BLE001 - the looks still see everything, only later
                log.warning("exits_interrupted", error=f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1

    def _is_slow(self) -> bool:
        """Whether this replica should distrust itself: just started, or it woke much later than it meant to (D-S23)."""
        at = time.monotonic()
        lags = self._asleep_until is not None and at - self._asleep_until > _LAG_S
        return lags or at - self._started < self.settings.settle_s

    async def _list(self, name: str, due: Sequence[Life], now: datetime | None, *, slow: bool) -> None:
        # Before the look: what comes late of it, after a stall of ours, says nothing about the time since (D-S23).
        moment: datetime = await self.pool.fetchval(SQL["read_clock"], now)
        seen = await self._seen(name, due)
        doubt = await self._doubt(name, due, seen, moment, slow=slow)
        WINDOW.set(max(life.window_s for life in due))
        for life in due:
            observation = seen.get(life.workspace_id) or Observation(Seen.UNKNOWN, why="the driver did not name it")
            PROBES.labels(observation.seen.value).inc()
            if _says_nothing_new(life, judge(life, observation, moment, doubt)):
                continue
            work = partial(
                self._judge, name=life.workspace_id, fence=life.fence, seen=observation, doubt=doubt, seen_at=moment,
                now=now,
            )  # fmt: skip
            try:
                await transact(self.pool, work)
            except Exception as error:
                if (trouble := classify(error)) not in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
                    raise
                # No write, no restart (D-S19); the next look comes by itself.
                log.warning("verdict_not_written", workspace_id=life.workspace_id, error=str(error)[:300])
                if trouble is Trouble.INFRASTRUCTURE:
                    break  # it would fail for each of the others too, after the same wait
        self.told()
        self.died()

    async def _seen(self, name: str, due: Sequence[Life]) -> Mapping[str, Observation]:
        driver = self.drivers.get(name)
        if driver is None:
            return {life.workspace_id: Observation(Seen.UNKNOWN, why=f"no driver {name} here") for life in due}
        targets = [Target(life.workspace_id, life.runtime) for life in due]
        try:
            async with asyncio.timeout(_LIST_S):
                if len(targets) == 1:
                    return {targets[0].workspace_id: await driver.inspect(targets[0])}
                return await driver.list(targets)
        except TimeoutError:
            unknown = Observation(Seen.UNKNOWN, why=f"no answer within {_LIST_S:.0f} s")
            return {life.workspace_id: unknown for life in due}

    async def _ended(self, ended: Exit) -> None:
        seen = Observation(Seen.STOPPED, ended.container_id, why="the engine says so")
        await transact(
            self.pool,
            partial(self._judge, name=ended.workspace_id, fence=None, seen=seen, doubt=Doubt(), seen_at=None, now=None),
        )
        self.told()
        self.died()

    async def _judge(
        self, connection: Connection, *, name: str, fence: int | None, seen: Observation, doubt: Doubt,
        seen_at: datetime | None, now: datetime | None,
    ) -> None:  # fmt: skip
        """Judge one look under the agent's lock, as of when it was made; one from before a restart counts for nothing.

        Without a fence it is an exit event: it counts for the very container that it names.
        """
        before = (await store.lock(connection, [name])).get(name)
        if before is None or (fence is not None and before.fence != fence):
            return
        if fence is None and before.container_id != seen.container_id:
            return
        moment = await store.clock(connection, now)
        life = before
        if life.status in DOWN and life.boot_until is None and await store.find_open(connection, name) is None:
            life = believed(life, Status.ONLINE, "")  # nobody is at it any more
        decision = judge(life, seen, seen_at or moment, doubt, exited=fence is None)
        await self._act(connection, before, seen, decision, moment, source="exit" if fence is None else "look")

    async def _act(
        self, connection: Connection, before: Life, seen: Observation, decision: Decision, now: datetime, *, source: str
    ) -> None:
        VERDICTS.labels(decision.verdict.value).inc()
        life = decision.life
        match decision.verdict:
            case Verdict.DEAD if self.settings.mode == "observe":
                log.warning("would_restart", workspace_id=life.workspace_id, why=decision.sentence)
            case Verdict.DEAD:
                if before.suspected_at is not None:
                    DETECTED.observe((now - before.suspected_at).total_seconds())
                life = await door.declare_dead(
                    connection, life, decision.reason, decision.sentence, now, backoff_s=self.settings.backoff_s
                )
            case Verdict.WEDGED if life.restart_wedged and self.settings.mode == "act":
                life = await door.tell_and_restart(
                    connection, life, Reason.WEDGED, decision.sentence, now, notice_s=self.settings.notice_s,
                    backoff_s=self.settings.backoff_s,
                )  # fmt: skip
            case Verdict.SUSPECT:
                if decision.reason is Reason.HELD:
                    HOLDS.inc()
                log.info("suspect", workspace_id=life.workspace_id, why=decision.sentence)
            case Verdict.BLIND if decision.reason is Reason.PROBE_BLIND:
                log.error("probe_blind", workspace_id=life.workspace_id, why=decision.sentence)
            case _:
                pass
        if _is_news(before, life, decision):
            await store.record(connection, life, seen, decision, source=source, now=now)
        await store.save(connection, {before.workspace_id: before}, [life], now)

    async def _doubt(
        self, name: str, due: Sequence[Life], seen: Mapping[str, Observation], now: datetime, *, slow: bool
    ) -> Doubt:
        """What speaks against this look: all that it says is dead counts, before the first of them is judged."""
        hearing = await self.pool.fetchrow(SQL["hearing"], now)
        heard = await self.pool.fetchrow(SQL["fleet_heard"])
        fleet = await self.pool.fetchrow(SQL["fleet_doubts"], now, name, [life.workspace_id for life in due])
        assert heard is not None, "it selects a count"
        assert fleet is not None, "it selects counts"
        dead = sum(life.status not in DOWN and _speaks_of_death(seen.get(life.workspace_id)) for life in due)
        return doubt_of(
            agents=fleet["agents"], suspects=fleet["suspects"] + dead, expected=heard["expected"],
            last_beat_at=heard["beat_at"], cadence_s=heard["cadence_s"] or 30.0,
            listening_since=hearing["since_at"] if hearing is not None else None, self_slow=slow,
            wedged_after_s=self.settings.wedged_after_s, now=now,
        )  # fmt: skip


def _speaks_of_death(seen: Observation | None) -> bool:
    return seen is not None and seen.speaks_of_death


def _says_nothing_new(life: Life, decision: Decision) -> bool:
    """Whether a look changes nothing, as most do: then it costs no transaction."""
    if decision.verdict not in {Verdict.ALIVE, Verdict.LEFT_ALONE} or decision.life is not life:
        return False
    VERDICTS.labels(decision.verdict.value).inc()
    return True


def _is_news(before: Life, after: Life, decision: Decision) -> bool:
    """Whether an observation is worth a row: a look that found nothing changed is not."""
    if decision.verdict in {Verdict.ALIVE, Verdict.LEFT_ALONE, Verdict.WAIT, Verdict.BLIND, Verdict.WEDGED}:
        blind = (before.blind_since is None) != (after.blind_since is None)
        return before.status is not after.status or before.container_id != after.container_id or blind
    return True
