"""What came of a driver's call, written down (transaction 2), and what becomes of an agent whose restart ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.liveness import store
from services.liveness.decide import budget
from services.liveness.decide.life import Life, Status, believed
from services.liveness.decide.seen import Observation
from services.liveness.drivers import Killed
from services.liveness.metrics import CALLS_FAILED
from services.liveness.restart import door
from services.liveness.settings import Settings
from services.liveness.store import SQL, Restart
from shared.database import Connection
from shared.telemetry import log

_DOWN = frozenset({Status.OFFLINE, Status.RESTARTING})
_ANSWERS = {Killed.APPLIED: "applied", Killed.GONE: "already_ended", Killed.REPLACED: "stale"}


@dataclass(frozen=True, slots=True)
class Job:
    """A restart that this replica holds, until `until` by its own monotonic clock."""

    restart: Restart
    life: Life
    until: float
    kill_until: float
    """A kill must have begun by then: the gate opens."""

    @property
    def workspace_id(self) -> str:
        return self.restart.workspace_id


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Each method is the whole of a transaction; one whose lease has ended writes nothing."""

    settings: Settings

    async def killed(self, connection: Connection, *, job: Job, killed: Killed, now: datetime | None) -> bool:
        """Answer the orders. Returns whether a start is to follow."""
        moment, life = await _held(connection, job, now)
        if await connection.fetchval(SQL["killed_restart"], job.restart.restart_id, self.settings.replica_id) is None:
            return False  # its lease had ended: another replica has gone on
        await _answer(
            connection, job, _ANSWERS[killed], moment, upto=max(job.restart.incarnation, job.life.incarnation)
        )
        log.warning("killed", workspace_id=life.workspace_id, result=killed.value, fence=job.restart.fence)
        unwanted = life.desired == "stopped" or life.paused or life.cordoned or life.removed
        stays_down = unwanted or life.driver != job.restart.driver
        if killed is not Killed.REPLACED and not stays_down:
            return True
        result = "replaced" if killed is Killed.REPLACED else "killed"
        await door.end(connection, job.restart.restart_id, result, moment, owner=self.settings.replica_id)
        await release(connection, life, moment, down=killed is not Killed.REPLACED)
        return False

    async def started(self, connection: Connection, *, job: Job, seen: Observation, now: datetime | None) -> None:
        moment, life = await _held(connection, job, now)
        if not await door.end(connection, job.restart.restart_id, "started", moment, owner=self.settings.replica_id):
            log.warning("restart_was_finished", workspace_id=life.workspace_id, fence=job.restart.fence)
            return
        await _answer(connection, job, "already_ended", moment, upto=job.restart.incarnation)
        if life.removed or life.driver != job.restart.driver:
            # Removed or given to another driver during the call: what was started is not what is looked at now.
            await release(connection, life, moment, down=False)
            return
        await store.save(connection, {life.workspace_id: life}, [self._begun(life, job, seen, moment)], moment)
        fence = job.restart.fence
        log.warning("restarted", workspace_id=life.workspace_id, container_id=seen.container_id, fence=fence)

    def _begun(self, life: Life, job: Job, seen: Observation, moment: datetime) -> Life:
        """The agent after its start; another life that was heard during the call has booted already."""
        after = replace(
            life,
            known=True,
            container_id=seen.container_id,
            started_at=seen.started_at,
            restarts=life.restarts + 1,
            restarted_at=moment,
            suspected_at=None,
            suspected_last_at=None,
            suspicions=0,
            next_check_at=moment + timedelta(seconds=self.settings.sweep_s),
        )
        if life.incarnation != job.restart.incarnation:
            return after
        boot_until = moment + timedelta(seconds=self.settings.boot_s)
        # What was heard before this start was the one that is gone: it must not vouch for the new one.
        after = replace(after, boot_until=boot_until, unheard=life.unheard + 1, heard_at=None)
        return after if life.paused else believed(after, Status.RESTARTING, "it was started and has not been heard yet")

    async def ended(self, connection: Connection, *, job: Job, result: str, error: str, now: datetime | None) -> None:
        """End it without a start."""
        moment, life = await _held(connection, job, now)
        owner = self.settings.replica_id
        if not await door.end(connection, job.restart.restart_id, result, moment, error=error, owner=owner):
            return
        await door.settle_orders(connection, life, moment)
        if result == "cannot_run" and life.status in _DOWN:
            after = believed(life, Status.GAVE_UP, error)
            await store.save(connection, {life.workspace_id: life}, [after], moment)
        else:
            await release(connection, life, moment, down=False)
        log.error("restart_ended", workspace_id=job.workspace_id, result=result, error=error[: door.ERROR_MAX])

    async def postponed(self, connection: Connection, *, job: Job, error: str, now: datetime | None) -> None:
        """The call failed or hung: again, later each time, with a row that says so (D-S20)."""
        CALLS_FAILED.inc()
        wait_s = budget.retry_s(job.restart.tries + 1, backoff_s=self.settings.backoff_s)
        words, owner = error[: door.ERROR_MAX], self.settings.replica_id
        due_at = await store.clock(connection, now) + timedelta(seconds=wait_s)
        await connection.execute(SQL["postpone_restart"], job.restart.restart_id, due_at, words, owner)
        log.error("driver_call_failed", workspace_id=job.workspace_id, error=words, again_s=wait_s)


async def release(connection: Connection, life: Life, moment: datetime, *, down: bool) -> None:
    """Let an agent go whose restart ended without a start."""
    after = replace(life, next_check_at=moment if life.driver is not None and not life.removed else None)
    if life.status in _DOWN:
        status = Status.OFFLINE if down else Status.ONLINE
        after = believed(after, status, "it was ended, and is not wanted back" if down else "")
        if life.paused:
            after = believed(after, Status.PAUSED, "it was ended while it was paused" if down else "it is paused")
    await store.save(connection, {life.workspace_id: life}, [after], moment)


async def _held(connection: Connection, job: Job, now: datetime | None) -> tuple[datetime, Life]:
    moment = await store.clock(connection, now)
    return moment, (await store.lock(connection, [job.workspace_id]))[job.workspace_id]


async def _answer(connection: Connection, job: Job, result: str, moment: datetime, *, upto: int) -> None:
    """Answer the orders against this life, which is none later than incarnation `upto`."""
    for row in await connection.fetch(SQL["open_orders"], job.workspace_id):
        if row["incarnation"] <= upto:
            await door.answer(connection, row["order_id"], result, moment)
