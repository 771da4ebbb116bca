"""What follows a death in the queue, on real servers: nothing begins, what runs is let go, the next life goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from shared.facts import ScheduleChanged, ScheduleTick, WorkspaceChanged
from tests.conftest import Stack, until
from tests.integration.queue_kit import agent, queue_service
from tests.integration.session_kit import Puppet, Supervisor, in_s, puppet, supervisor, task

GRACE_S = 0.6
TIMING = {
    "sweep_s": 0.3, "reread_s": 0.1, "snapshot_s": 0.3, "snapshot_pause_s": 0.1, "busy_base_s": 0.05,
    "busy_cap_s": 0.2, "follow_min_s": 0.05, "follow_max_s": 0.1, "stop_grace_s": GRACE_S,
}  # fmt: skip


@pytest.fixture
async def chief(stack: Stack) -> AsyncIterator[Supervisor]:
    async with supervisor(stack) as opened, queue_service(stack, **TIMING):
        yield opened
        counters = "SELECT workspace_id, waiting, running FROM workspaces WHERE waiting < 0 OR running < 0"
        assert not await opened.rows.fetch(counters)


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


async def kept(chief: Supervisor, name: str, **changes: Any) -> UUID:
    fact = chief.front.busy(name, "x", **changes)
    await chief.front.keep(fact)
    return fact.queue_id


async def asked(mute: Puppet, method: str = "message/send", times: int = 1) -> bool:
    return mute.asked.count(method) >= times


async def row_of(chief: Supervisor, queue_id: UUID) -> dict[str, Any]:
    row = await chief.rows.fetchrow("SELECT * FROM a2a_queue WHERE queue_id = $1", queue_id)
    return dict(row or {})


# ── nothing begins ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ("offline", "its agent is dead and is being started again"),
        ("restarting", "its agent has been started again and has not been heard yet"),
        ("gave_up", "its agent has died too often: an operator must look"),
    ],
)
async def test_nothing_is_delivered_to_the_dead_and_what_waits_says_so(
    chief: Supervisor, status: str, why: str
) -> None:
    """A-P-14: messages are kept, also while its port answers; sweeps and beats of the old life change nothing."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url)
        await chief.life(name, status)
        queue_id = await kept(chief, name)
        await chief.front.heartbeat(name, active=0)
        await chief.snapshot()  # sweeps have come by meanwhile
        await chief.snapshot()
        item = await chief.front.item(queue_id)
        assert (item["why"], item["waits"]["reason"]) == (f"next in line: {why}", "offline")
        assert (item["attempts"], len(worker.received)) == (0, 0)
        await chief.front.register(name, worker.url, incarnation=2)
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["delivery_no"]) == ("completed", 1)


async def _beats(chief: Supervisor, name: str) -> None:
    await chief.front.heartbeat(name, incarnation=2)


async def _is_online(chief: Supervisor, name: str) -> None:
    await chief.life(name, "online", incarnation=2)


async def _was_online(chief: Supervisor, name: str) -> None:
    """`heartbeat: none`, or an agent that keeps its number: its driver says RUNNING, and its card answers."""
    await chief.life(name, "online")


@pytest.mark.parametrize("opens", [_beats, _is_online, _was_online])
async def test_the_next_sign_of_life_opens_the_line(chief: Supervisor, opens: Any) -> None:
    """A-L-07, A-P-14."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url)
        await chief.life(name, "offline")
        queue_id = await kept(chief, name)
        await chief.snapshot()
        assert not worker.received
        await opens(chief, name)
        (item,) = await chief.front.ended(queue_id)
        assert item["status"] == "completed"


async def test_words_about_an_older_life_or_from_before_change_nothing(chief: Supervisor) -> None:
    """D-S25."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url, incarnation=2)
        await chief.life(name, "gave_up", incarnation=1)
        await chief.front.ended(await kept(chief, name))
        late = chief.rev()
        await chief.life(name, "online", incarnation=2)
        chief.rev = lambda: late  # type: ignore[method-assign]
        await chief.life(name, "offline", incarnation=2)
        await chief.front.ended(await kept(chief, name))
        assert len(worker.received) == 2


async def test_a_tick_waits_for_the_next_life(chief: Supervisor) -> None:
    """A-P-14: fires meanwhile are one tick, and it runs once."""
    name, schedule = fresh(), uuid7()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url)
        await chief.life(name, "restarting")
        await chief.front.publisher.publish(ScheduleChanged(workspace_id=name, rev=1, schedule_id=schedule, prompt="p"))
        for number in range(3):
            await chief.front.publisher.publish(
                ScheduleTick(
                    workspace_id=name, rev=1, schedule_id=schedule, fire_at=in_s(number), queue_id=uuid7()
                )
            )  # fmt: skip
        merged = "SELECT max(merged_count) = 3 FROM a2a_queue WHERE workspace_id = $1 AND status = 'queued'"
        await until(lambda: chief._true(merged, name))
        assert not worker.received
        await chief.front.register(name, worker.url, incarnation=2)
        await until(lambda: chief._true("SELECT count(*) = 1 FROM a2a_finished WHERE workspace_id = $1", name))
        assert len(worker.received) == 1


# ── what runs is let go ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_a_dead_agent_had_is_let_go_after_the_grace_and_redelivered_to_the_next_life(
    chief: Supervisor,
) -> None:
    """A-Q-18: its connection stands half open, and nobody would ever hear of it."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: asked(mute))
        await chief.life(name, "offline")
        died_at = asyncio.get_running_loop().time()
        await chief.life(name, "restarting")
        await until(lambda: chief._true("SELECT status = 'queued' FROM a2a_queue WHERE queue_id = $1", queue_id))
        assert asyncio.get_running_loop().time() - died_at >= GRACE_S - 0.2
        row = await row_of(chief, queue_id)
        assert (row["attempts"], row["deaths"], row["delivery_no"], row["reason"]) == (1, 1, 1, "unknown")
        async with agent(name, work_s=0.01) as worker:
            await chief.front.register(name, worker.url, incarnation=2)
            (item,) = await chief.front.ended(queue_id)
            assert (item["status"], item["delivery_no"]) == ("completed", 2)
            assert [each.queue_id for each in worker.received] == [str(queue_id)]


async def test_an_agent_that_was_alive_after_all_keeps_what_it_has(chief: Supervisor) -> None:
    """A-L-07: it was heard before the grace was over."""
    name, over = fresh(), asyncio.Event()

    async def answers(_: dict[str, Any]) -> Any:
        await over.wait()
        return task("completed")

    async with puppet(send=answers) as slow:
        await chief.front.register(name, slow.url)
        queue_id = await kept(chief, name)
        await until(lambda: asked(slow))
        await chief.life(name, "offline")
        await chief.life(name, "online")
        await asyncio.gather(*(chief.snapshot() for _ in range(2)))
        await until(
            lambda: chief._true("SELECT clock_timestamp() > dispatched_at + $2 * interval '1 s' "
                                "FROM a2a_queue WHERE queue_id = $1", queue_id, 2 * GRACE_S)
        )  # fmt: skip
        over.set()
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["attempts"], item["delivery_no"]) == ("completed", 0, 1)


async def test_a_workspace_s_own_grace_wins_and_the_next_life_ends_it_at_once(chief: Supervisor) -> None:
    """A-Q-18: nobody waits for a grace once another life has been heard."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        own = {"stop_grace_s": 300.0}
        changed = WorkspaceChanged(
            workspace_id=name, rev=(uuid7().int >> 80) + 1, incarnation=1, url=mute.url, settings=own
        )
        await chief.front.publisher.publish(changed)
        await until(lambda: chief._true("SELECT stop_grace_s = 300 FROM workspaces WHERE workspace_id = $1", name))
        queue_id = await kept(chief, name)
        await until(lambda: asked(mute))
        await chief.life(name, "offline")
        old = "SELECT clock_timestamp() > dead_at + $2 * interval '1 s' FROM workspaces WHERE workspace_id = $1"
        await until(lambda: chief._true(old, name, 2 * GRACE_S))
        assert (await chief.front.item(queue_id))["status"] == "dispatched"
        mute.answers["message/send"] = _completes
        await chief.front.heartbeat(name, incarnation=2)
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["delivery_no"], item["attempts"]) == ("completed", 2, 1)


async def _completes(_: dict[str, Any]) -> Any:
    return task("completed")


async def test_a_life_that_nobody_declared_dead_is_over_when_another_is_heard(chief: Supervisor) -> None:
    """C-K13: its host is gone. What began a moment before may have met the new life, and stays."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url, maximum=2)
        old, young = await kept(chief, name), await kept(chief, name)
        await until(lambda: asked(mute, times=2))
        await chief.rows.execute(
            "UPDATE a2a_queue SET dispatched_at = dispatched_at - interval '1 minute' WHERE queue_id = $1", old
        )
        mute.answers["message/send"] = _completes
        await chief.front.register(name, mute.url, incarnation=2, maximum=2)
        (item,) = await chief.front.ended(old)
        assert (item["status"], item["delivery_no"]) == ("completed", 2)
        assert (await row_of(chief, young))["delivery_no"] == 1
        assert (await chief.front.item(young))["status"] == "dispatched"


async def test_a_task_that_outlived_its_agent_goes_on_in_the_next_life(chief: Supervisor) -> None:
    """A-Q-18: who keeps tasks on disk is asked for it, and no attempt is counted."""
    name, over = fresh(), asyncio.Event()

    async def works(_: dict[str, Any]) -> Any:
        return task("working")

    async def get(_: dict[str, Any]) -> Any:
        return task("completed" if over.is_set() else "working")

    async with puppet(send=works, get=get) as old, puppet(get=get) as new:
        await chief.front.register(name, old.url)
        queue_id = await kept(chief, name)
        await until(lambda: asked(old, "tasks/get"))
        await chief.life(name, "offline")
        await chief.front.register(name, new.url, incarnation=2)
        await until(lambda: asked(new, "tasks/get", 2))
        over.set()
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["attempts"], item["delivery_no"]) == ("completed", 0, 1)


async def test_where_the_connection_is_refused_nothing_is_counted(chief: Supervisor) -> None:
    """A-Q-18: it died before it was declared dead, and what came meanwhile was never with it."""
    name = fresh()
    await chief.front.register(name, "http://127.0.0.1:9/")
    queue_id = await kept(chief, name)
    tried = "SELECT reason = 'not_delivered' FROM a2a_queue WHERE queue_id = $1 AND delivery_no > 1"
    await until(lambda: chief._true(tried, queue_id))
    await chief.life(name, "offline")
    await until(lambda: chief._true("SELECT status = 'queued' FROM a2a_queue WHERE queue_id = $1", queue_id))
    row = await row_of(chief, queue_id)
    await chief.snapshot()
    assert (await row_of(chief, queue_id))["delivery_no"] == row["delivery_no"], "nobody tries any more"
    assert (row["attempts"], row["deaths"]) == (0, 0)
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url, incarnation=2)
        (item,) = await chief.front.ended(queue_id)
        assert item["status"] == "completed"


async def test_a_dead_agent_ends_what_was_told_to_stop(chief: Supervisor) -> None:
    """C-K13: it never goes back to the line."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: asked(mute))
        await chief.stop(name, queue_id)
        await chief.life(name, "gave_up")
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"], item["attempts"]) == ("failed", "ceiling", 0)


# ── what bounds a turn ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_other_defaults_reach_workspaces_that_say_nothing_when_a_replica_starts(stack: Stack) -> None:
    """One number, one place: nobody has to register anew."""
    plain, own = fresh(), fresh()
    bounds = "SELECT array[ceiling_s, checkpoint_grace_s, stop_grace_s] FROM workspaces WHERE workspace_id = $1"
    known = "SELECT count(*) = 1 FROM workspaces WHERE workspace_id = $1 AND url IS NOT NULL"
    async with supervisor(stack) as chief:
        async with queue_service(stack, **TIMING):
            for name, settings in ((plain, {}), (own, {"session_ceiling_s": 1800, "checkpoint_grace_s": 9})):
                fact = WorkspaceChanged(
                    workspace_id=name, rev=1, incarnation=1, url="http://127.0.0.1:9/", settings=settings
                )
                await chief.front.publisher.publish(fact)
                await until(lambda name=name: chief._true(known, name))  # type: ignore[misc]
            assert await chief.rows.fetchval(bounds, plain) == [1800, 120, GRACE_S]
            assert await chief.rows.fetchval(bounds, own) == [1800, 9, GRACE_S]
        other = {**TIMING, "session_ceiling_s": 7200.0, "checkpoint_grace_s": 60.0, "stop_grace_s": 1.0}
        async with queue_service(stack, **other):
            await until(lambda: chief._true("SELECT stop_grace_s = 1 FROM workspaces WHERE workspace_id = $1", plain))
            assert await chief.rows.fetchval(bounds, plain) == [7200, 60, 1]
            assert await chief.rows.fetchval(bounds, own) == [1800, 9, 1]
