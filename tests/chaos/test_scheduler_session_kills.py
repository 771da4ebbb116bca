"""Real schedulers that are killed and frozen while a session comes to its end: nothing is reset, nothing done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from shared.database import Pool
from shared.facts import (
    BacklogSnapshot,
    GateClosed,
    KillDone,
    NamedBacklog,
    Running,
    SessionDirective,
    SessionGate,
    SessionKill,
    SessionStop,
)
from tests.chaos.kit.processes import ring
from tests.conftest import Stack, until
from tests.integration.conftest import Replica, replica
from tests.integration.listening import listening
from tests.integration.scheduler_kit import TABLES

STATES = ("running", "checkpoint_sent", "stop_sent", "kill_ordered")
QUICK = {
    "BIDE_SCHEDULER_SESSION_REPEAT_S": "0.4",
    "BIDE_SCHEDULER_GATE_REPEAT_S": "0.4",
    "BIDE_SCHEDULER_LOOK_S": "1",
    "BIDE_SCHEDULER_SESSION_NOTE_S": "0",
}
CEILING_S = 60.0


def graces(seconds: float) -> dict[str, str]:
    """Seconds for minutes: how long each step lasts."""
    return {
        **QUICK,
        "BIDE_SESSION_CEILING_S": f"{CEILING_S:g}",
        "BIDE_CHECKPOINT_GRACE_S": f"{seconds:g}",
        "BIDE_STOP_GRACE_S": f"{seconds:g}",
    }


@dataclass
class Around:
    """Queue, proxies and liveness as far as a scheduler notices them."""

    side: Replica
    rows: Pool
    session: Running
    directives: list[SessionDirective]
    stops: list[SessionStop]
    gates: list[SessionGate]
    kills: list[SessionKill]
    name: str

    async def tell(self) -> None:
        """Snapshots, and the gate's word wherever it was asked to close, for as long as nobody cancels this."""
        number = 0
        while True:
            number += 1
            backlog = NamedBacklog(
                workspace_id=self.name, rev=number, incarnation=1, waiting=0, in_use=1, running=(self.session,)
            )
            snapshot = BacklogSnapshot(rev=number, snapshot_id=uuid7(), part=0, parts=1, backlogs=[backlog])
            self.side.publisher.post(snapshot)
            if self.gates and self.gates[-1].closed:
                self.side.publisher.post(self._shut(number))
            await asyncio.sleep(0.3)

    def _shut(self, number: int) -> GateClosed:
        now = datetime.now(UTC)
        return GateClosed(
            workspace_id=self.name, rev=number, session_id=self.session.session_id, incarnation=1, generation=1,
            until=now + timedelta(seconds=60), in_flight=(self.session,), beat_at=now, cadence_s=1.0,
        )  # fmt: skip

    async def row(self) -> asyncpg.Record:
        row = await self.rows.fetchrow("SELECT * FROM sessions WHERE session_id = $1", self.session.session_id)
        assert row is not None
        return row

    async def reached(self, state: str, within_s: float = 60.0) -> asyncpg.Record:
        """Its row, in this state or past it."""

        async def is_there() -> bool:
            row = await self.rows.fetchrow("SELECT state FROM sessions WHERE session_id = $1", self.session.session_id)
            return row is not None and STATES.index(row["state"]) >= STATES.index(state)

        await until(is_there, within_s)
        return await self.row()

    async def heard_again(self) -> None:
        """Come back when the session was spoken of since now."""
        before = self.count()

        async def more() -> bool:
            return self.count() > before

        await until(more)

    def count(self) -> int:
        return len(self.directives) + len(self.stops) + len(self.gates)

    def check_contents(self) -> None:
        """Whatever was said twice was the same, and there was one order."""
        ids: dict[object, tuple[object, ...]] = {}
        for each in self.directives:
            content = (each.kind, each.reason, each.session_id, each.deadline)
            assert ids.setdefault(each.directive_id, content) == content
        said = {(each.kind.value, each.reason) for each in self.directives}
        assert said == {("checkpoint", "ceiling_near"), ("checkpoint", "ceiling"), ("stop", "ceiling")}
        assert len(ids) == len(said), sorted(ids.values(), key=str)
        assert len({each.order_id for each in self.kills}) == 1
        assert len({each.fact_id for each in self.kills}) == 1


@asynccontextmanager
async def emptied(stack: Stack) -> AsyncIterator[None]:
    """No rows before and none after; around the services, because to empty tables while they are read is a deadlock."""
    async with replica(stack, "scheduler") as scheduler:
        await scheduler.pool.execute(f"TRUNCATE {TABLES}; UPDATE last_snapshot SET at = '-infinity'")
        yield
        await scheduler.pool.execute(f"TRUNCATE {TABLES}")


@asynccontextmanager
async def around(stack: Stack, *, left_s: float) -> AsyncIterator[Around]:
    """One session, `left_s` before its ceiling."""
    name = f"w-{uuid4().hex[:8]}"
    async with AsyncExitStack() as exits:
        side = await exits.enter_async_context(replica(stack, "queue"))
        scheduler = await exits.enter_async_context(replica(stack, "scheduler"))
        opened = Around(
            side,
            scheduler.pool,
            Running(session_id=f"{uuid4()}:1", started_at=datetime.now(UTC)),
            await exits.enter_async_context(listening(stack, SessionDirective, "proxy.control")),
            await exits.enter_async_context(listening(stack, SessionStop)),
            await exits.enter_async_context(listening(stack, SessionGate)),
            await exits.enter_async_context(listening(stack, SessionKill, "liveness")),
            name,
        )
        # Counted from here: on a slow machine all these connections take longer than it has left.
        began_at = datetime.now(UTC) - timedelta(seconds=CEILING_S - left_s)
        opened.session = opened.session.model_copy(update={"started_at": began_at})
        telling = asyncio.create_task(opened.tell())
        try:
            yield opened
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)


async def ended_by_liveness(what: Around) -> None:
    order = what.kills[0]
    done = KillDone(
        workspace_id=what.name, rev=1, session_id=order.session_id, incarnation=1, order_id=order.order_id,
        result="applied",
    )  # fmt: skip
    await what.side.publisher.publish(done)

    async def ended() -> bool:
        return bool((await what.row())["end_reason"] == "kill_applied")

    await until(ended)


@pytest.mark.timeout(600)
async def test_a_scheduler_killed_in_every_state_repeats_and_resets_nothing(stack: Stack) -> None:
    """C-K3: SIGKILL in each state; its deadline stays, what is said again is the same, one kill is ordered."""
    grace_s = 12.0
    async with (
        emptied(stack),
        ring(stack, "scheduler-1", **graces(grace_s)) as services,
        around(stack, left_s=14.0) as what,
    ):
        (scheduler,) = services.of("scheduler")
        survived: dict[str, bool] = {}
        for state in STATES:
            before = await what.reached(state)
            if before["state"] != state:  # a slow machine: it took a step while a scheduler came up
                continue
            await what.heard_again()
            await scheduler.kill()
            await scheduler.start()
            await scheduler.ready()
            await what.heard_again()
            after = await what.row()
            survived[state] = after["state"] == state
            if after["state"] == state:
                assert after["deadline_at"] == before["deadline_at"]
            else:  # a slow machine: then the next step was not taken early
                entered_at = after["deadline_at"] - timedelta(seconds=grace_s)
                assert before["deadline_at"] is None or entered_at >= before["deadline_at"]
            assert after["started_at"] == what.session.started_at
        assert any(survived.values())

        async def ordered() -> bool:
            return bool(what.kills)

        await until(ordered)
        what.check_contents()
        await ended_by_liveness(what)

        async def opened() -> bool:
            return not what.gates[-1].closed

        await until(opened)
        print(f"the same state after the restart: {survived}")
        row = await what.row()
        print(f"directives {len(what.directives)}, stops {len(what.stops)}, orders {row['orders']}")


@pytest.mark.timeout(600)
async def test_of_two_schedulers_that_freeze_by_turns_none_takes_a_step_twice(stack: Stack) -> None:
    """C-K5: one stands still while the other takes a step, and goes on after it."""
    names = ("scheduler-1", "scheduler-2")
    async with emptied(stack), ring(stack, *names, **graces(3.0)) as services, around(stack, left_s=10.0) as what:
        schedulers = services.of("scheduler")
        deadlines = {}
        for number, state in enumerate(STATES):
            frozen = schedulers[number % 2]
            await frozen.freeze()
            row = await what.reached(state)
            deadlines[row["state"]] = row["deadline_at"]
            frozen.thaw()
            await what.heard_again()
            again = await what.row()
            assert again["state"] != row["state"] or again["deadline_at"] == row["deadline_at"]

        async def ordered() -> bool:
            return bool(what.kills)

        await until(ordered)
        what.check_contents()
        assert (await what.row())["orders"] == 1
        await ended_by_liveness(what)

        def logged(event: str) -> int:
            return sum(process.logged(event) for process in schedulers)

        async def is_logged() -> bool:  # a line comes after its commit
            return logged("session_stepped") >= len(STATES) - 1 and logged("session_ended") >= 1

        await until(is_logged)
        assert logged("session_stepped") == len(STATES) - 1, "each was taken once, by one of them"
        assert logged("session_ended") == 1
        assert logged("loop_failed") == 0
