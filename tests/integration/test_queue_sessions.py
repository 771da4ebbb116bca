"""How sessions end in the queue, on real servers: the gate, stops, what snapshots name, and what liveness is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.queue import deliver, evidence
from services.queue.decide import Reply
from services.queue.deliver import Ending
from services.queue.store import SQL, Stop, stop
from shared.database import Connection, transact
from shared.facts import EvidenceKind, Priority, ScheduleChanged, ScheduleTick, TickSettled, WorkspaceChanged
from tests.conftest import Stack, until
from tests.integration import claim_kit
from tests.integration.calendar_kit import free
from tests.integration.conftest import replica
from tests.integration.queue_kit import agent, queue_service
from tests.integration.session_kit import TABLES, Puppet, Supervisor, in_s, puppet, supervisor, task

LONG = 60.0
"""A turn that ends when the test says so."""
TIMING = {
    "sweep_s": 0.3, "reread_s": 0.1, "snapshot_s": 0.3, "snapshot_pause_s": 0.1, "busy_cap_s": 0.2,
    "follow_min_s": 0.05, "follow_max_s": 0.1, "stop_grace_s": 0.5,
}  # fmt: skip


@pytest.fixture
async def chief(stack: Stack) -> AsyncIterator[Supervisor]:
    async with supervisor(stack) as opened, queue_service(stack, **TIMING):
        yield opened
        counters = "SELECT workspace_id, waiting, running FROM workspaces WHERE waiting < 0 OR running < 0"
        assert not await opened.rows.fetch(counters)


def fresh() -> str:
    return f"w-{uuid7().hex[-8:]}"


async def kept(chief: Supervisor, name: str, text: str = "x", **changes: Any) -> UUID:
    fact = chief.front.busy(name, text, **changes)
    await chief.front.keep(fact)
    return fact.queue_id


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_begins_while_the_gate_is_closed_and_what_waits_goes_when_it_is_left(chief: Supervisor) -> None:
    """C-K6: a new message while the session before it is being ended; CRITICAL too, and a sweep finds nothing to do."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url)
        await chief.gate(name, "old")
        await chief.gate(name, "other")
        first, second = await kept(chief, name), await kept(chief, name, priority=Priority.CRITICAL)
        snapshot = await chief.snapshot()  # sweeps have come by meanwhile
        assert snapshot[name].gate_until is not None
        assert (snapshot[name].gate_generation, snapshot[name].waiting) == (1, 2)
        item = await chief.front.item(first)
        assert "its session is being ended" in item["why"]
        assert item["waits"]["reason"] == "gate"
        await chief.gate(name, "old", closed=False)
        await chief.snapshot()
        assert not worker.received, "one session is still in it"
        await chief.gate(name, "other", closed=False)
        items = await chief.front.ended(first, second)
        assert {each["status"] for each in items} == {"completed"}
        assert [each.queue_id for each in worker.received] == [str(second), str(first)]
        assert name not in await chief.snapshot()


async def test_a_gate_that_nobody_renews_opens_by_itself(chief: Supervisor) -> None:
    """C-K6: its scheduler is gone."""
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url)
        await chief.gate(name, for_s=1.5)
        queue_id = await kept(chief, name)
        await chief.front.ended(queue_id)
        row = await chief.rows.fetchrow(
            """SELECT dispatched_at >= to_timestamp((gates -> 's' ->> 1)::float8) AS later FROM a2a_finished
               JOIN workspaces USING (workspace_id) WHERE queue_id = $1""",
            queue_id,
        )
        assert row is not None
        assert row["later"]


async def test_a_gate_is_told_closed_when_each_proxy_that_lives_has_seen_it(chief: Supervisor) -> None:
    name = fresh()
    async with agent(name, work_s=LONG) as worker:
        await chief.front.register(name, worker.url, maximum=2)
        queue_id = await kept(chief, name)
        await chief.running(queue_id)
        await chief.front.heartbeat(name, active=1, cadence_s=7)
        for proxy in ("p", "q"):
            await chief.proxy_lives(proxy)
        await chief.gate(name)
        await chief.proxy_says("p", name, generation=1, for_s=100)
        await chief.proxy_says("q", name, "f1", generation=0)
        assert not chief.closings(name), "q has not seen it"
        await chief.proxy_says("q", name, "f1", generation=1, for_s=50)
        (fact,) = await chief.closed(name)
        assert (fact.session_id, fact.generation, fact.incarnation) == ("s", 1, 1)
        assert abs(fact.until - in_s(50)) < timedelta(seconds=5)
        assert {each.session_id for each in fact.in_flight} == {f"{queue_id}:1", "f1"}
        assert fact.cadence_s == 7
        assert fact.beat_at is not None
        await chief.proxy_says("q", name, generation=1, for_s=60)
        assert len(chief.closings(name)) == 1, "it was known already"
        await chief.gate(name)
        again = (await chief.closed(name, 2))[-1]
        assert [each.session_id for each in again.in_flight] == [f"{queue_id}:1"]
        assert abs(again.until - in_s(60)) < timedelta(seconds=5)


async def test_the_next_closing_has_to_be_seen_anew(chief: Supervisor) -> None:
    """What a proxy said of the last closing licenses nothing in this one; nor does a late word of the last one."""
    name = fresh()
    await chief.front.register(name, "http://127.0.0.1:9")
    await chief.proxy_lives("p")
    old = await chief.gate(name)
    await chief.proxy_says("p", name, generation=1, for_s=100)
    await chief.closed(name)
    await chief.gate(name, closed=False)
    await chief.gate(name, "t")
    await chief.gate(name, "s", rev=old.rev)  # it was on its way for long
    await chief.gate(name, "t")
    assert len(chief.closings(name)) == 1
    await chief.proxy_says("p", name, generation=2, for_s=100)
    fact = (await chief.closed(name, 2))[-1]
    assert (fact.generation, fact.session_id) == (2, "t")


async def test_a_proxy_that_is_silent_is_not_waited_for_if_another_was_heard_meanwhile(chief: Supervisor) -> None:
    """After an outage of ours all of them are silent: then the first to be heard does not speak for the others."""
    name = fresh()
    await chief.front.register(name, "http://127.0.0.1:9")
    for proxy in ("dead", "p"):
        await chief.proxy_lives(proxy)
    await chief.rows.execute("UPDATE proxies SET beat_at = now() - interval '61 s' WHERE proxy_id = 'dead'")
    await chief.proxy_says("p", name, generation=1, for_s=100)
    await chief.gate(name)
    assert not chief.closings(name), "nobody was heard through all of that minute"
    await chief.rows.execute("UPDATE proxies SET unbroken_since = now() - interval '61 s' WHERE proxy_id = 'p'")
    await chief.gate(name)
    await chief.closed(name)


async def test_a_beat_of_the_fleet_is_about_no_workspace(chief: Supervisor) -> None:
    await chief.proxy_lives("p")
    assert not await chief.rows.fetchval("SELECT count(*) FROM workspace_ids WHERE workspace_id = '-'")


# ── what snapshots name ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_snapshot_names_what_an_agent_is_known_to_do(chief: Supervisor) -> None:
    foreign, forwarded, idle = fresh(), fresh(), fresh()
    for name in (foreign, forwarded, idle):
        await chief.front.register(name, "http://127.0.0.1:9", incarnation=4, maximum=3)
    await chief.front.heartbeat(foreign, active=2, incarnation=4)
    await chief.front.heartbeat(idle, active=0, incarnation=4)
    await chief.proxy_says("p", forwarded, "f1")
    await until(lambda: chief._true("SELECT beat_active = 2 FROM workspaces WHERE workspace_id = $1", foreign))
    named = await chief.snapshot()
    assert idle not in named
    assert (named[foreign].foreign, named[foreign].incarnation, named[foreign].running) == (2, 4, ())
    assert named[foreign].beat_at is not None
    assert [each.session_id for each in named[forwarded].forwards] == ["f1"]
    await chief.front.heartbeat(foreign, active=0, incarnation=4)
    await until(lambda: chief._true("SELECT NOT engaged FROM workspaces WHERE workspace_id = $1", foreign))
    assert foreign not in await chief.snapshot()


@pytest.mark.parametrize("is_there", [True, False], ids=["goes on", "lost"])
async def test_a_task_that_outlives_its_owner_is_as_old_as_it_is(stack: Stack, is_there: bool) -> None:
    """A redeploy of queue begins no ceiling anew; a task that its agent has lost meanwhile is another turn."""
    name, is_lost = fresh(), asyncio.Event()

    async def get(_: dict[str, Any]) -> Any:
        return {"code": -32001, "message": "no such task"} if is_lost.is_set() else task("working")

    async def send(_: dict[str, Any]) -> Any:
        is_lost.clear()
        return task("working")

    async with supervisor(stack) as front, puppet(send=send, get=get) as mute:
        async with queue_service(stack, **TIMING, drain_s=0.1):
            await front.front.register(name, mute.url)
            queue_id = await kept(front, name)
            await until(lambda: _asked(mute, "tasks/get"))
            (first,) = (await front.snapshot())[name].running
        if not is_there:
            is_lost.set()
        polls = mute.asked.count("tasks/get")
        async with queue_service(stack, **TIMING, drain_s=0.1):
            await until(lambda: _asked(mute, "tasks/get", polls + 2))
            (again,) = (await front.snapshot())[name].running
    assert (first.session_id, again.session_id) == (f"{queue_id}:1", f"{queue_id}:2")
    assert mute.asked.count("message/send") == (1 if is_there else 2)
    assert (again.started_at == first.started_at) is is_there


async def test_a_tick_that_runs_is_named_with_its_schedule_and_its_ceiling_and_a_stop_settles_it(
    chief: Supervisor, stack: Stack
) -> None:
    settled: list[TickSettled] = []

    async def hears(_: Connection, facts: list[TickSettled]) -> None:
        settled.extend(facts)

    name, schedule = fresh(), uuid7()
    async with (
        replica(stack, "scheduler") as side,
        puppet(send=_answers(task("working")), get=_answers(task("working"))) as mute,
    ):
        side.reader.store(TickSettled, hears)  # type: ignore[arg-type]
        await side.reader.start()
        await chief.front.register(name, mute.url)
        publisher = chief.front.publisher
        await publisher.publish(ScheduleChanged(workspace_id=name, rev=1, schedule_id=schedule, prompt="p"))
        for number, reason in ((1, "ceiling"), (2, "operator")):
            tick = ScheduleTick(
                workspace_id=name, rev=1, schedule_id=schedule, fire_at=in_s(number), queue_id=uuid7(), ceiling_s=900
            )
            await publisher.publish(tick)
            await until(lambda tick=tick: _exists(chief, tick.queue_id))  # type: ignore[misc]
            await chief.running(tick.queue_id)
            (running,) = (await chief.snapshot())[name].running
            assert (running.session_id, running.schedule_id) == (f"{tick.queue_id}:1", schedule)
            assert running.ceiling_s == 900
            await chief.stop(name, tick.queue_id, reason)
            await chief.killed(name, f"{tick.queue_id}:1", "not_killable")
            await chief.front.ended(tick.queue_id)

        async def both() -> bool:
            return len(settled) == 2

        await until(both)
        assert [(each.outcome, each.reason) for each in settled] == [("ceiling", None), ("canceled", "stopped")]


async def _exists(chief: Supervisor, queue_id: UUID) -> bool:
    return await chief._true("SELECT EXISTS (SELECT FROM a2a_queue WHERE queue_id = $1)", queue_id)


# ── stops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _answers(result: Any) -> Any:
    async def answer(_: dict[str, Any]) -> Any:
        return result

    return answer


async def test_a_stop_has_the_agent_cancel_its_task_and_the_item_has_met_its_ceiling(chief: Supervisor) -> None:
    """The agent obeys: its task ends as canceled, which is no answer."""
    name = fresh()
    async with agent(name, work_s=LONG, behaviour={"asynchronous": True}) as worker:
        await chief.front.register(name, worker.url)
        queue_id = await kept(chief, name)
        await until(
            lambda: chief._true("SELECT agent_task_id IS NOT NULL FROM a2a_queue WHERE queue_id = $1", queue_id)
        )
        await chief.stop(name, queue_id)
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"]) == ("failed", "ceiling")
        assert item["answer"]["result"]["status"]["state"] == "canceled"
        worker.behave(work_s=0.01)
        await chief.front.ended(await kept(chief, name))


@pytest.mark.parametrize(
    ("behaviour", "reason", "ends"),
    [
        ({"cut": 1}, "ceiling", ("failed", "ceiling")),
        ({"preempted": 1}, "ceiling", ("failed", "ceiling")),
        ({"failing": 1}, "ceiling", ("failed", "ceiling")),
        ({"half_answer": 1, "work_s": 0.01}, "ceiling", ("failed", "ceiling")),
        ({"cut": 1}, "operator", ("canceled", "stopped")),
        ({"work_s": 0.01}, "ceiling", ("completed", None)),
    ],
    ids=["EOF", "preempted", "failed attempt", "half an answer", "an operator's", "a real answer"],
)
async def test_what_was_told_to_stop_is_not_delivered_again(
    chief: Supervisor, behaviour: dict[str, float], reason: str, ends: tuple[str, str | None]
) -> None:
    name = fresh()
    async with agent(name, behaviour={"slow_s": LONG, **behaviour}) as worker:
        await chief.front.register(name, worker.url)
        queue_id = await kept(chief, name)
        await worker.until(lambda: worker.active == 1)
        await chief.stop(name, queue_id, reason)
        worker.behave(slow_s=0)
        free(worker)
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"], item["delivery_no"]) == (*ends, 1)
        worker.behave(work_s=0.01)
        await chief.front.ended(await kept(chief, name))
        assert len(worker.received) == 2


async def test_a_cancel_that_never_returns_holds_nothing(chief: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """C-K11: there are servers that wait in it for the end of the turn: the task is asked for on, and answers."""
    monkeypatch.setattr(deliver, "CANCEL_TIMEOUT_S", 0.3)
    name, over = fresh(), asyncio.Event()

    async def get(_: dict[str, Any]) -> Any:
        return task("completed" if over.is_set() else "working")

    async with puppet(send=_answers(task("working")), get=get) as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "tasks/get"))
        await chief.stop(name, queue_id)
        await until(lambda: _asked(mute, "tasks/cancel"))
        polls = mute.asked.count("tasks/get")
        await until(lambda: _asked(mute, "tasks/get", polls + 3))
        assert mute.asked.count("tasks/cancel") == 1
        over.set()
        (item,) = await chief.front.ended(queue_id)
        assert item["status"] == "completed"


async def test_a_poll_that_never_returns_holds_no_cancel(chief: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """C-K11, of GetTask."""
    monkeypatch.setattr(deliver, "POLL_TIMEOUT_S", 0.3)
    name = fresh()
    async with puppet(send=_answers(task("working")), cancel=_answers(task("canceled"))) as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "tasks/get"))
        await chief.stop(name, queue_id)
        await until(lambda: _asked(mute, "tasks/cancel"))
        mute.answers["tasks/get"] = _answers(task("canceled"))
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"]) == ("failed", "ceiling")


async def _asked(mute: Puppet, method: str, times: int = 1) -> bool:
    return mute.asked.count(method) >= times


async def test_where_nothing_can_be_killed_the_owner_hangs_up_and_the_slot_is_free(chief: Supervisor) -> None:
    """The agent is external and hangs: nobody waits for it any more."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "message/send"))
        await chief.stop(name, queue_id)
        await chief.killed(name, f"{queue_id}:1", "applied")
        await chief.killed(name, f"{queue_id}:7", "not_killable")  # another delivery of it
        await chief.killed(name, "foreign:w:1:1", "not_killable")
        assert (await chief.front.item(queue_id))["status"] == "dispatched"
        await chief.killed(name, f"{queue_id}:1", "not_killable")
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"]) == ("failed", "ceiling")
        mute.answers["message/send"] = _answers(task("completed"))
        await chief.front.ended(await kept(chief, name))


async def test_a_slot_is_free_though_the_word_of_the_kill_is_lost(chief: Supervisor) -> None:
    """C-K13: the container died, KillDone did not come; the connection's end is enough, and the next life is served."""
    name = fresh()
    async with agent(name, behaviour={"slow_s": LONG}, grace_s=0.0) as first:
        await chief.front.register(name, first.url)
        queue_id = await kept(chief, name)
        await first.until(lambda: first.active == 1)
        await chief.stop(name, queue_id)
        waits = await kept(chief, name)
    (item,) = await chief.front.ended(queue_id)
    assert (item["status"], item["reason"]) == ("failed", "ceiling")
    async with agent(name, work_s=0.01) as second:
        await chief.front.register(name, second.url, incarnation=2)
        (item,) = await chief.front.ended(waits)
        assert item["status"] == "completed"


async def test_a_new_life_ends_what_the_last_one_was_told_to_stop(chief: Supervisor) -> None:
    """C-K13: the kill left the connection half open, and its confirmation was lost."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        queue_id, waits = await kept(chief, name), await kept(chief, name)
        await until(lambda: _asked(mute, "message/send"))
        await chief.stop(name, queue_id)
        await chief.front.register(name, mute.url, incarnation=2)
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"]) == ("failed", "ceiling")
        await until(lambda: _asked(mute, "message/send", 2))
        await chief.front.register(name, mute.url, incarnation=3)
        await until(lambda: chief._true("SELECT incarnation = 3 FROM workspaces WHERE workspace_id = $1", name))
        await chief.snapshot()
        assert (await chief.front.item(waits))["status"] == "dispatched", "nobody told this one to stop"
        await chief.stop(name, waits)
        await chief.front.ended(waits)


@pytest.mark.parametrize("ever", [1, 0], ids=["it did say 1", "it always says 0"])
async def test_what_the_beats_of_an_agent_no_longer_show_is_abandoned(chief: Supervisor, ever: int) -> None:
    """It dropped the message and never said so: its next beat after the grace does, if its beats ever said anything."""
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        await chief.front.heartbeat(name, active=ever)
        await chief.front.heartbeat(name, active=0)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "message/send"))
        await chief.stop(name, queue_id)
        if not ever:
            for _ in range(3):  # the grace is over meanwhile, and the row is read again several times
                await chief.front.heartbeat(name, active=0)
                await chief.snapshot()
            assert (await chief.front.item(queue_id))["status"] == "dispatched"
            await chief.killed(name, f"{queue_id}:1", "not_killable")

        async def ended() -> bool:
            await chief.front.heartbeat(name, active=0)
            return bool(await chief.rows.fetchval("SELECT count(*) FROM a2a_finished WHERE queue_id = $1", queue_id))

        await until(ended)
        item = await chief.front.item(queue_id)
        assert (item["status"], item["reason"]) == ("failed", "abandoned" if ever else "ceiling")
        mute.answers["message/send"] = _answers(task("completed"))
        await chief.front.ended(await kept(chief, name))


async def test_nothing_is_killed_for_what_is_about_to_be_abandoned(stack: Stack) -> None:
    """Policies §3: the gate's word would license a kill between the beat that shows nothing and its owner's look."""
    name = fresh()
    slow = {**TIMING, "reread_s": 1.0}
    async with supervisor(stack) as chief, queue_service(stack, **slow), puppet() as mute:
        await chief.front.register(name, mute.url)
        await chief.proxy_lives("p")
        await chief.front.heartbeat(name, active=1)
        await chief.front.heartbeat(name, active=0)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "message/send"))
        await chief.front.heartbeat(name, active=1)
        await chief.stop(name, queue_id)
        session = f"{queue_id}:1"
        await chief.gate(name, session)
        await chief.proxy_says("p", name, generation=1, for_s=120)
        await chief.closed(name)  # it goes on, as far as anybody knows

        async def ended() -> bool:
            await chief.front.heartbeat(name, active=0)
            told = len(chief.closings(name))
            await chief.gate(name, session)
            await chief.snapshot()
            assert len(chief.closings(name)) == told
            return bool(await chief.rows.fetchval("SELECT count(*) FROM a2a_finished WHERE queue_id = $1", queue_id))

        await until(ended)
        assert (await chief.front.item(queue_id))["reason"] == "abandoned"


async def test_a_lower_ceiling_reaches_what_runs(chief: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """C-K9: changed while a delivery runs, it bounds that one too, after the time in which a session is ended."""
    monkeypatch.setattr(deliver, "TURN_SLACK_S", 0.0)
    name = fresh()
    async with puppet() as mute:
        await chief.front.register(name, mute.url)
        queue_id = await kept(chief, name)
        await until(lambda: _asked(mute, "message/send"))
        for ceiling_s in (3600.0, 0.1):
            changed = WorkspaceChanged(
                workspace_id=name, rev=(uuid7().int >> 80) + 1, incarnation=1, url=mute.url,
                settings={"session_ceiling_s": ceiling_s, "checkpoint_grace_s": 0.1, "stop_grace_s": 0.2},
            )  # fmt: skip
            await chief.front.publisher.publish(changed)
            await until(lambda ceiling_s=ceiling_s: _is_bound(chief, name, ceiling_s))  # type: ignore[misc]
        (item,) = await chief.front.ended(queue_id)
        assert (item["status"], item["reason"], item["delivery_no"]) == ("failed", "ceiling", 1)


async def _is_bound(chief: Supervisor, name: str, ceiling_s: float) -> bool:
    return await chief._true("SELECT ceiling_s = $2 FROM workspaces WHERE workspace_id = $1", name, ceiling_s)


# ── on the rows ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reply", ["owner_died", "written_back", "busy", "unknown", "preempted"])
async def test_an_ending_that_was_on_its_way_meets_the_stop(stack: Stack, reply: Reply) -> None:
    """The owner died, or had its ending in memory, when the stop was written: it ends all the same, once."""
    async with claim_kit.bench(stack) as bench:
        await bench.pool.execute(f"TRUNCATE {TABLES}")
        async with bench.pool.acquire() as connection:
            await claim_kit.load(connection, "w", 2)
            turn = await bench.turn(connection, "w")
            (item,) = turn.items

            async def stops(number: int, name: str = "w") -> int:
                wanted = [Stop(item.queue_id, number, name, "ceiling")]
                return len(await transact(bench.pool, lambda each: stop(each, wanted)))

            assert await stops(item.delivery_no + 1) == 0, "another delivery of it"
            assert await stops(item.delivery_no, "v") == 0, "another workspace"
            assert await stops(item.delivery_no) == 1
            await bench.turn(connection, "w", [Ending(item, reply)], room=0)
            row = await connection.fetchrow(
                "SELECT status, reason FROM a2a_finished WHERE queue_id = $1", item.queue_id
            )
            assert tuple(row or ()) == ("failed", "ceiling")
            assert await stops(item.delivery_no) == 0, "what has ended is not stopped"
            counters = await connection.fetchrow("SELECT waiting, running FROM workspaces")
            assert tuple(counters or ()) == (1, 0)
        await bench.pool.execute(f"TRUNCATE {TABLES}")


async def test_a_row_that_was_told_to_stop_never_waits_again(stack: Stack) -> None:
    """Whoever tries meets the table itself."""
    async with claim_kit.bench(stack) as bench:
        await bench.pool.execute(f"TRUNCATE {TABLES}")
        async with bench.pool.acquire() as connection:
            await claim_kit.load(connection, "w", 1)
            (item,) = (await bench.turn(connection, "w")).items
            await transact(bench.pool, lambda each: stop(each, [Stop(item.queue_id, 1, "w", "ceiling")]))
            with pytest.raises(Exception, match="a2a_queue_check"):
                await connection.fetch(
                    SQL["requeue_items"], [item.queue_id], [1], [0], [0], [0.0], ["busy"], [None], [False]
                )
        await bench.pool.execute(f"TRUNCATE {TABLES}")


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_comes_back_is_evidence_of_the_life_that_it_was_sent_to(
    chief: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it answers is told once in a while; trouble every time."""
    monkeypatch.setattr(evidence, "LIFE_EVERY_S", 3600.0)
    name = fresh()
    async with agent(name, work_s=0.01) as worker:
        await chief.front.register(name, worker.url, incarnation=3)
        for _ in range(3):
            await chief.front.ended(await kept(chief, name))
        worker.behave(cut=2)
        await chief.front.ended(await kept(chief, name))
        worker.busy_for(LONG)
        waits = await kept(chief, name)
        await worker.until(lambda: len(worker.refused) >= 3)

        async def all_told() -> bool:
            return len([each for each in chief.evidence if each.workspace_id == name]) >= 4

        await until(all_told)
        worker.busy_for(0)
        await chief.front.ended(waits)
    told = [each for each in chief.evidence if each.workspace_id == name]
    assert [each.kind for each in told] == [
        EvidenceKind.ANSWERED, EvidenceKind.RESET, EvidenceKind.RESET, EvidenceKind.BUSY,
    ]  # fmt: skip
    assert {each.incarnation for each in told} == {3}
    assert [each.rev for each in told] == sorted(each.rev for each in told)
