"""Restarts that are due: leased, and carried out by their driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial

from services.liveness import store
from services.liveness.decide import budget
from services.liveness.decide.life import Life, Status, believed
from services.liveness.decide.seen import Observation
from services.liveness.drivers import CannotRunError, Driver, DriverError, FencedError, Killed, Target
from services.liveness.restart import door
from services.liveness.restart.outcome import Job, Outcomes, release
from services.liveness.settings import Settings
from services.liveness.store import SQL, Restart
from shared.database import Connection, Pool, transact
from shared.loops import Loop
from shared.telemetry import log

_CLAIM_MAX = 200
_HELD_ELSEWHERE_S = 0.05


class Restarts:
    """Begins what is due, within the cap of each engine. Every replica turns it; `told` follows a commit with facts."""

    def __init__(
        self, settings: Settings, pool: Pool, drivers: Mapping[str, Driver], *, told: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._drivers = drivers
        self._told = told
        self._outcomes = Outcomes(settings)
        self._running: set[asyncio.Task[None]] = set()
        self.loop = Loop("restarts", self.run_once)

    async def run_once(self, now: datetime | None = None) -> float:
        """Lease what is due and call drivers beside this loop; return the seconds until the next is due."""
        jobs = await transact(self._pool, partial(self._claim, now=now))
        if jobs:
            self._told()
        for job in jobs:
            task = asyncio.create_task(self._carry_out(job, now), name=f"restart {job.restart.workspace_id}")
            self._running.add(task)
            task.add_done_callback(self._done)
        until_s: float | None = await self._pool.fetchval(SQL["next_restart_in"], now)
        if until_s is None:
            return self._settings.look_s
        return min(max(until_s, _HELD_ELSEWHERE_S if until_s > 0 else 1.0), self._settings.look_s)

    async def settled(self) -> None:
        """Come back when no driver call of this replica is under way."""
        while self._running:
            await asyncio.wait(self._running)

    async def stop(self, within_s: float) -> None:
        """Wait for the calls under way; what is cut short is finished by another replica."""
        if self._running:
            await asyncio.wait(self._running, timeout=within_s)
        for task in self._running:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Not written: the lease ends, and somebody goes on under the same fence.
            log.error("restart_not_written", error=f"{type(error).__name__}: {error}"[: door.ERROR_MAX])
        self.loop.wake()

    # ── transaction 1 of an agent that runs; the lease of every one ──────────────────────────────────────────────────

    async def _claim(self, connection: Connection, *, now: datetime | None) -> list[Job]:
        await connection.execute(SQL["hold_fleet"])
        begun = time.monotonic()  # before the moment that leases and orders are reckoned from: never too long
        moment = await store.clock(connection, now)
        room = await self._room(connection, moment)
        jobs = []
        for due in await connection.fetch(SQL["due_restarts"], moment, _CLAIM_MAX):
            row = await connection.fetchrow(SQL["lock_restart"], due["restart_id"])
            assert row is not None, "it is held"
            restart = store.restart_of(row)
            life = (await store.lock(connection, [restart.workspace_id]))[restart.workspace_id]
            if (job := await self._begin(connection, restart, life, moment, begun=begun, room=room)) is not None:
                jobs.append(job)
        return jobs

    async def _room(self, connection: Connection, moment: datetime) -> dict[str, int]:
        rows = await connection.fetch(SQL["fleet_in_flight"], moment, self._settings.boot_slot_s)
        return {row["driver"]: budget.fleet_max(row["agents"]) - row["in_flight"] for row in rows}

    async def _begin(
        self, connection: Connection, restart: Restart, life: Life, moment: datetime, *, begun: float,
        room: dict[str, int],
    ) -> Job | None:  # fmt: skip
        live = await self._live_orders(connection, restart, moment)
        observes = self._settings.mode == "observe"
        if (result := _why_not(restart, life, has_orders=bool(live), observes=observes)) is not None:
            await door.end(connection, restart.restart_id, result, moment)
            await door.settle_orders(connection, life, moment)
            await release(connection, life, moment, down=False)
            return None
        if restart.driver not in self._drivers:
            return None  # a replica that has this driver does it
        if room.get(restart.driver, 0) <= 0:
            return None
        room[restart.driver] -= 1
        await connection.execute(
            SQL["lease_restart"], restart.restart_id, moment, self._settings.lease_s, self._settings.replica_id
        )
        words = f"it is being restarted: {restart.reason}"
        # The boot of a start before this one, if it was never heard, is over with it.
        down = believed(replace(life, boot_until=None), Status.RESTARTING, words)
        await store.save(connection, {life.workspace_id: life}, [down], moment)
        left_s = min(((row - moment).total_seconds() for row in live), default=0.0)
        return Job(restart, down, begun + self._settings.lease_s, begun + left_s)

    async def _live_orders(self, connection: Connection, restart: Restart, moment: datetime) -> list[datetime]:
        """When the orders expire that this kill may still answer; those that have are closed."""
        live = []
        for row in await connection.fetch(SQL["open_orders"], restart.workspace_id):
            if restart.phase == "kill" and row["expires_at"] <= moment:
                await door.answer(connection, row["order_id"], "expired", moment)
            else:
                live.append(row["expires_at"])
        return live

    # ── the driver call ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _carry_out(self, job: Job, now: datetime | None) -> None:
        """Call the driver and write what came of it (transaction 2)."""
        restart, write = job.restart, self._outcomes
        driver = self._drivers[restart.driver]
        target = Target(restart.workspace_id, job.life.runtime)
        try:
            if restart.phase == "kill":
                killed = await self._kill(driver, target, job)
                if not await transact(self._pool, partial(write.killed, job=job, killed=killed, now=now)):
                    return
            seen = await self._start(driver, target, job)
        except CannotRunError as error:
            work = partial(write.ended, job=job, result="cannot_run", error=str(error), now=now)
        except FencedError as error:
            work = partial(write.ended, job=job, result="replaced", error=str(error), now=now)
        except (DriverError, TimeoutError) as error:
            words = str(error) or "the driver did not answer in time"
            work = partial(write.postponed, job=job, error=words, now=now)
        else:
            work = partial(write.started, job=job, seen=seen, now=now)
        await transact(self._pool, work)
        self._told()

    async def _kill(self, driver: Driver, target: Target, job: Job) -> Killed:
        expected = job.restart.container_id
        async with asyncio.timeout(self._patience_s(job)):
            if expected is None:
                expected = (await driver.inspect(target)).container_id
            if time.monotonic() >= min(job.until, job.kill_until):
                raise DriverError("the order or the lease ended before the driver was called")
            return await driver.kill(target, expected=expected, fence=job.restart.fence)

    async def _start(self, driver: Driver, target: Target, job: Job) -> Observation:
        if time.monotonic() >= job.until:
            raise DriverError("the lease ended before the driver was called")
        async with asyncio.timeout(self._patience_s(job)):
            return await driver.restart(target, expected=job.restart.container_id, fence=job.restart.fence)

    def _patience_s(self, job: Job) -> float:
        """A call never outlives the lease: then another replica makes it."""
        return min(self._settings.call_s, job.until - time.monotonic())


def _why_not(restart: Restart, life: Life, *, has_orders: bool, observes: bool) -> str | None:
    """Why a restart is not begun after all; None: it is."""
    if life.incarnation > restart.incarnation and life.status not in {Status.OFFLINE, Status.RESTARTING}:
        return "recovered"
    if life.removed:
        return "withdrawn"
    if restart.phase == "kill":
        return None if has_orders and life.driver == restart.driver and not observes else "withdrawn"
    unwanted = life.paused or life.cordoned or life.desired == "stopped"
    return "withdrawn" if unwanted or observes or life.driver != restart.driver else None
