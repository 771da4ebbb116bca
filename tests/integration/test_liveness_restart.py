"""The one door on real rows: fenced, finished once, bounded, and with a history that explains each decision."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from services.liveness.decide.judge import Reason
from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit
from services.liveness.restart.door import declare_dead
from services.liveness.store import lock
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import (
    EvidenceKind,
    KillDone,
    SessionDirective,
    WorkspaceEvidence,
    WorkspaceRemoved,
    WorkspaceStatus,
)
from tests.conftest import Stack, until
from tests.integration.liveness_kit import (
    FakeEngine,
    Replica,
    agent_row,
    beat,
    change,
    emptied,
    kill_order,
    liveness_settings,
    registration,
    restart_rows,
)


@pytest.fixture
async def pool(stack: Stack) -> AsyncIterator[Pool]:
    async with open_pool(liveness_settings(stack)) as opened:
        await emptied(opened)
        yield opened


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def one(stack: Stack, pool: Pool, engine: FakeEngine) -> Replica:
    return Replica(liveness_settings(stack), pool, engine)


@pytest.fixture
def two(stack: Stack, pool: Pool, engine: FakeEngine) -> Replica:
    """Another replica, on the same rows and the same engine."""
    return Replica(liveness_settings(stack), pool, engine)


async def crashed(one: Replica, engine: FakeEngine, *names: str) -> None:
    """Agents that were up, and have crashed in silence."""
    await one.up(engine, *names)
    engine.crash(*names)
    await one.silence(*names)


# ── from a look to a restart ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_flake_of_a_healthy_agent_restarts_nothing(one: Replica, two: Replica, engine: FakeEngine) -> None:
    """A-L-03, D-S3, D-S4: one look says it is gone, the next that it runs; evidence is counted for all replicas."""
    await one.up(engine, "w1")
    now = datetime.now(UTC)
    engine.says["w1"] = Observation(Seen.NOT_FOUND, why="flake")
    await one.look(now)
    await two.look(now + timedelta(seconds=1))
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["suspicions"]) == ("suspect", 2)
    assert row["next_check_at"] == row["suspected_at"] + timedelta(seconds=9)
    del engine.says["w1"]
    await two.look(now + timedelta(seconds=9))
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["suspicions"]) == ("online", 0)
    assert await restart_rows(one.pool, "w1") == []
    _, history = await one.ask("w1", "history")
    assert any(
        each["sentence"].startswith("1 of 2 within 30 s, heard 0 s ago: waiting") for each in history["evidence"]
    )


async def test_two_looks_of_different_replicas_fifteen_seconds_apart_are_a_death(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S6: found by looking, although it was heard a moment ago."""
    await one.up(engine, "w1")
    engine.crash("w1")
    now = datetime.now(UTC)
    await one.look(now)
    await two.look(now + timedelta(seconds=9))
    assert (await agent_row(one.pool, "w1"))["next_check_at"] == now + timedelta(seconds=15)
    await two.look(now + timedelta(seconds=15))
    assert (await agent_row(one.pool, "w1"))["status"] == "offline"
    await two.restart(now + timedelta(seconds=15))
    assert engine.calls == [("restart", "w1", 1)]
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["container_id"]) == ("restarting", engine.running["w1"])
    await one.hear(beat("w1", incarnation=2))
    assert [each.status for each in await one.told(WorkspaceStatus)] == [
        "suspect", "offline", "restarting", "restarting", "online",
    ]  # fmt: skip
    revs = [each.rev for each in await one.told(WorkspaceStatus)]
    assert revs == sorted(set(revs))


async def test_errors_of_the_engine_are_no_death_however_long(one: Replica, engine: FakeEngine) -> None:
    """A-L-01, D-S14."""
    await one.up(engine, "w1", "w2", "w3")
    for name in ("w1", "w2", "w3"):
        engine.says[name] = Observation(Seen.UNKNOWN, why="frozen")
    await one.silence("w1", "w2", "w3")
    now = datetime.now(UTC)
    for turn in range(20):
        await one.look(now + timedelta(seconds=10 * turn))
    assert await one.pool.fetchval("SELECT count(*) FROM restarts") == 0
    assert (await agent_row(one.pool, "w1"))["blind_since"] is not None
    engine.says.clear()
    await one.look(now + timedelta(seconds=210))
    assert (await agent_row(one.pool, "w1"))["blind_since"] is None


async def test_while_no_proxy_is_heard_nobodys_silence_counts(one: Replica, engine: FakeEngine) -> None:
    """D-S1: five minutes without the broker; a flake meanwhile is looked at again."""
    await one.up(engine, "w1")
    await one.silence("w1")
    await one.pool.execute("UPDATE proxies SET beat_at = now() - interval '5 minutes'")
    engine.says["w1"] = Observation(Seen.NOT_FOUND, why="flake")
    await one.look()
    assert (await agent_row(one.pool, "w1"))["status"] == "suspect"
    assert await restart_rows(one.pool, "w1") == []


async def test_a_sweep_is_one_list_of_the_engine(one: Replica, engine: FakeEngine) -> None:
    """D-S21."""
    await one.up(engine, *(f"w{n}" for n in range(40)))
    before = engine.lists
    await one.look()
    assert engine.lists == before + 1


async def test_a_failed_delivery_is_looked_into_and_a_real_crash_found_by_it(one: Replica, engine: FakeEngine) -> None:
    """D-S2, D-S7: the request that failed is what finds a machine that died long ago."""
    await crashed(one, engine, "w1")
    await one.hear(WorkspaceEvidence(workspace_id="w1", rev=1, incarnation=1, kind=EvidenceKind.REFUSED))
    await one.looks.look()
    assert [row["reason"] for row in await restart_rows(one.pool, "w1")] == ["not_found"]


# ── the fence ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_replicas_that_decide_at_once_open_one_restart(one: Replica, two: Replica, engine: FakeEngine) -> None:
    """D-S12."""
    await crashed(one, engine, "w1")
    await asyncio.gather(*(each.look() for each in (one, two, one, two)))
    await asyncio.gather(*(each.restart() for each in (one, two, one, two)))
    assert engine.calls == [("restart", "w1", 1)]
    assert len(await restart_rows(one.pool, "w1")) == 1


async def test_a_verdict_about_another_life_opens_nothing(one: Replica, engine: FakeEngine) -> None:
    """D-S25."""
    await one.up(engine, "w1")

    async def late(connection: Connection) -> None:
        life = (await lock(connection, ["w1"]))["w1"]
        await connection.execute("UPDATE agents SET incarnation = 2")
        await declare_dead(connection, life, Reason.STOPPED, "seen long ago", datetime.now(UTC))

    await transact(one.pool, late)
    assert await restart_rows(one.pool, "w1") == []


async def test_one_that_dies_between_offline_and_restart_is_finished_once_by_another(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S13, D-S26: before the lease nobody waits; after it, until it ends."""
    await crashed(one, engine, "w1", "w2")
    await one.look()
    await two.restart()
    assert sorted(engine.calls) == [("restart", "w1", 1), ("restart", "w2", 1)]
    engine.crash("w1")
    await one.hear(beat("w1", incarnation=2))
    await one.pool.execute("UPDATE agents SET restarted_at = NULL")
    await one.silence("w1")
    await one.look()
    engine.before_call = asyncio.Event()
    await one.restarts.run_once()
    await engine.called.wait()
    await one.restarts.stop(0)  # it dies in the midst of the call
    engine.before_call = None
    now = datetime.now(UTC)
    await two.restart(now)
    assert len(engine.calls) == 2, "its lease stands"
    await two.restart(now + timedelta(seconds=one.settings.lease_s + 1))
    await one.restart(now + timedelta(seconds=one.settings.lease_s + 2))
    assert engine.calls[2:] == [("restart", "w1", 2)]
    assert [row["result"] for row in await restart_rows(one.pool, "w1")] == ["started", "started"]


async def test_one_that_stands_still_between_deciding_and_acting_does_nothing_when_it_wakes(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S12: the driver's fence, and the lease."""
    await crashed(one, engine, "w1")
    await one.look()
    stands_still = engine.before_call = asyncio.Event()
    await one.restarts.run_once()
    await engine.called.wait()
    engine.before_call = None
    now = datetime.now(UTC) + timedelta(seconds=one.settings.lease_s + 1)
    await two.restart(now)
    up = engine.running["w1"]
    stands_still.set()
    await one.restarts.settled()
    assert engine.calls == [("restart", "w1", 1)]
    assert engine.running["w1"] == up
    assert (await agent_row(one.pool, "w1"))["restarts"] == 1


async def test_a_call_that_fails_is_made_again_later_under_the_same_fence(one: Replica, engine: FakeEngine) -> None:
    """D-S20: bounded, with a row that says so."""
    await crashed(one, engine, "w1")
    await one.look()
    engine.fails = [DriverError("500"), DriverError("502")]
    now = datetime.now(UTC)
    await one.restart(now)
    (row,) = await restart_rows(one.pool, "w1")
    assert (row["last_error"], row["tries"], row["due_at"]) == ("500", 1, now + timedelta(seconds=10))
    await one.restart(now + timedelta(seconds=9))
    await one.restart(now + timedelta(seconds=10))
    await one.restart(now + timedelta(seconds=30))
    (row,) = await restart_rows(one.pool, "w1")
    assert (row["result"], row["tries"]) == ("started", 3)
    assert engine.calls == [("restart", "w1", 1)]


async def test_a_call_that_hangs_ends(stack: Stack, pool: Pool, engine: FakeEngine) -> None:
    """D-S20."""
    one = Replica(liveness_settings(stack, call_s=0.05), pool, engine)
    await crashed(one, engine, "w1")
    await one.look()
    engine.before_call = asyncio.Event()
    async with asyncio.timeout(30):
        await one.restart()
    (row,) = await restart_rows(pool, "w1")
    assert "in time" in row["last_error"]


async def test_an_engine_that_died_brings_its_agents_back_a_few_at_a_time(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S15: twenty agents, five at once."""
    names = [f"w{n}" for n in range(20)]
    await crashed(one, engine, *names)
    now = datetime.now(UTC)
    await one.look(now)
    later = now + timedelta(seconds=15)
    await one.look(later)
    assert await one.pool.fetchval("SELECT count(*) FROM restarts") == 20
    life = 1
    while len(engine.running) < 20:
        await asyncio.gather(one.restart(later), two.restart(later))
        life += 1
        for name in engine.running:
            await one.hear(beat(name, incarnation=2))
        assert life < 10
    assert life == 5
    assert engine.most_at_once <= 5


# ── what is asked for meanwhile, and what makes it needless ──────────────────────────────────────────────────────────


async def test_requests_during_a_restart_are_that_restart(one: Replica, engine: FakeEngine) -> None:
    """A-L-06."""
    await crashed(one, engine, "w1")
    await one.look()
    for _ in range(3):
        assert (await one.ask("w1", "restart"))[0] == 200
    await one.restart()
    (row,) = await restart_rows(one.pool, "w1")
    assert row["asked_again"] == 3
    assert engine.calls == [("restart", "w1", 1)]


async def test_a_beat_before_anybody_began_takes_the_restart_back(one: Replica, engine: FakeEngine) -> None:
    """A-L-07."""
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(beat("w1"))
    await one.restart()
    (row,) = await restart_rows(one.pool, "w1")
    assert row["result"] == "recovered"
    assert (await agent_row(one.pool, "w1"))["status"] == "online"
    assert engine.calls == []


async def test_the_last_words_of_a_container_that_has_ended_take_nothing_back(one: Replica, engine: FakeEngine) -> None:
    """D-S6: its beat was on its way when the engine told of its end. Another life of it is another matter."""
    await one.up(engine, "w1")
    ended = Exit("w1", engine.running["w1"])
    engine.crash("w1")
    await one.looks._ended(ended)
    await one.hear(beat("w1"))
    assert (await agent_row(one.pool, "w1"))["status"] == "offline"
    await one.restart()
    assert engine.calls == [("restart", "w1", 1)]
    ended = Exit("w1", engine.running["w1"])
    await one.hear(beat("w1"))
    engine.crash("w1")
    await one.looks._ended(ended)
    engine.start("w1")
    await one.hear(beat("w1", incarnation=2))
    await one.restart()
    assert [row["result"] for row in await restart_rows(one.pool, "w1")] == ["started", "recovered"]
    assert (await agent_row(one.pool, "w1"))["status"] == "online"


@pytest.mark.parametrize("about", [{"paused": True}, {"desired": "stopped"}, {"settings": {"cordoned": True}}])
async def test_what_an_operator_holds_back_is_not_restarted_and_comes_back_when_he_lets_go(
    one: Replica, engine: FakeEngine, about: dict[str, Any]
) -> None:
    """A-L-18, D-S17: also where the restart had been decided before."""
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(change("w1", rev=2, **about))
    await one.restart()
    for _ in range(3):
        await one.look()
        await one.restart()
    assert engine.calls == []
    await one.hear(change("w1", rev=3))
    await one.look()
    await one.restart()
    assert [verb for verb, _, _ in engine.calls] == ["restart"]


async def test_a_workspace_that_is_removed_while_suspect_is_gone(one: Replica, engine: FakeEngine) -> None:
    """A-L-08, D-S18."""
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(WorkspaceRemoved(workspace_id="w1", rev=9))
    await one.hear(beat("w1", incarnation=7), registration("w1", rev=8, incarnation=7))
    await one.look()
    await one.restart()
    assert engine.calls == []
    assert (await agent_row(one.pool, "w1"))["status"] == "removed"
    assert (await one.ask("w1", "restart"))[0] == 404


async def test_the_first_two_words_about_an_agent_may_come_at_once(one: Replica, engine: FakeEngine) -> None:
    """They come by two queues, and neither finds a row to lock: the older one must not win by being slower."""
    engine.start("w1")
    async with one.pool.acquire() as connection:
        async with connection.transaction():
            await one.handlers.registered(connection, [registration("w1", rev=1, runtime={})])
            later = asyncio.create_task(one.hear(change("w1", rev=2)))
            await until(lambda: _waits_for_a_row(one.pool))
        await later
    row = await agent_row(one.pool, "w1")
    assert (row["rev"], row["driver"]) == (2, "process")
    async with one.pool.acquire() as connection:
        async with connection.transaction():
            await one.handlers.registered(connection, [change("w2", rev=2)])
            later = asyncio.create_task(one.hear(registration("w2", rev=1, runtime={})))
            await until(lambda: _waits_for_a_row(one.pool))
        await later
    row = await agent_row(one.pool, "w2")
    assert (row["rev"], row["driver"]) == (2, "process")


async def _waits_for_a_row(pool: Pool) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INTO agents%'"
    return bool(await pool.fetchval(query) == 1)


# ── budget, operator, wedge, observe ─────────────────────────────────────────────────────────────────────────────────


async def test_a_crash_loop_is_given_up_and_an_operator_brings_it_back(one: Replica, engine: FakeEngine) -> None:
    """A-L-17, D-S10, D-S11."""
    await crashed(one, engine, "w1")
    now = datetime.now(UTC)
    for turn in range(2, 7):
        await one.look(now)
        (due_at,) = await one.pool.fetchrow("SELECT max(due_at) FROM restarts") or (now,)
        now = max(now, due_at)
        await one.restart(now)
        await one.hear(beat("w1", incarnation=turn))
        engine.crash("w1")
        await one.silence("w1")
    await one.look(now)
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["reason"]) == (
        "gave_up", "5 restarts in 600 s: given up until an operator or a new registration",
    )  # fmt: skip
    await one.look(now + timedelta(hours=1))
    assert len(engine.calls) == 5, "time alone brings nothing back"
    assert (await one.ask("w1", "restart", note="mended"))[0] == 200
    await one.restart(datetime.now(UTC) + timedelta(seconds=11))
    assert len(engine.calls) == 6
    assert [row["action"] for row in await one.pool.fetch("SELECT * FROM audit")] == ["restart"]


async def test_one_that_runs_and_is_never_heard_is_restarted_after_its_boot_and_given_up_at_last(
    one: Replica, engine: FakeEngine
) -> None:
    """A-L-17, D-S9, D-S10: neither left booting for ever nor restarted for ever; its first word brings it back."""
    await one.up(None, "w1")
    now = datetime.now(UTC)
    for starts in range(1, 6):
        await one.restart(now)
        assert len(engine.calls) == starts
        await one.look(now + timedelta(seconds=119))
        assert (await agent_row(one.pool, "w1"))["status"] == "restarting"
        now += timedelta(seconds=120)
        await one.look(now)
    rows = await restart_rows(one.pool, "w1")
    assert [row["reason"] for row in rows] == ["first_start", *["unheard"] * 4]
    assert [row["container_id"] for row in rows[1:]] == ["c1", "c2", "c3", "c4"], "each ends the one before it"
    for minutes in range(3):
        await one.look(now + timedelta(minutes=minutes))
        await one.restart(now + timedelta(minutes=minutes))
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["reason"]) == (
        "gave_up", "5 unheard starts: given up until an operator or a new registration",
    )  # fmt: skip
    assert engine.running == {"w1": "c5"}, "what runs is left for somebody to look at"
    await one.hear(beat("w1", incarnation=2))
    assert (await agent_row(one.pool, "w1"))["status"] == "online"


async def test_an_agent_that_can_hear_is_told_before_its_restart(one: Replica, engine: FakeEngine) -> None:
    """A-L-19."""
    await one.up(engine, "w1")
    now = datetime.now(UTC)
    await one.ask("w1", "restart")
    (directive,) = await one.told(SessionDirective)
    assert (directive.kind.value, directive.reason, directive.incarnation) == ("checkpoint", "restart", 1)
    await one.restart(now + timedelta(seconds=5))
    assert engine.calls == []
    assert (await agent_row(one.pool, "w1"))["status"] == "online", "until its turn comes"
    await one.restart(now + timedelta(seconds=12))
    assert engine.calls == [("restart", "w1", 1)]


@pytest.mark.parametrize(("allowed", "calls"), [(False, 0), (True, 1)])
async def test_a_wedged_agent_is_shown_and_restarted_only_where_that_is_wanted(
    one: Replica, engine: FakeEngine, allowed: bool, calls: int
) -> None:
    """A-L-12, D-S8."""
    await one.up(engine, "w1", settings={"restart_wedged": allowed})
    await one.hear(beat("w1", active_tasks=1))
    await one.pool.execute("UPDATE agents SET progress_at = now() - interval '1 hour'")
    await one.silence("w1", seconds=241)
    for _ in range(2):
        await one.look()
    assert (await agent_row(one.pool, "w1"))["status"] == "wedged"
    assert len([each for each in await one.told(WorkspaceStatus) if each.status == "wedged"]) == 1
    await one.restart(datetime.now(UTC) + timedelta(seconds=11))
    assert len(engine.calls) == calls


async def test_a_wedge_ends_with_the_first_sign_of_life(one: Replica, engine: FakeEngine) -> None:
    """A-L-13."""
    await one.up(engine, "w1")
    await one.hear(beat("w1", active_tasks=1))
    await one.pool.execute("UPDATE agents SET progress_at = NULL")
    await one.silence("w1")
    await one.look()
    assert (await agent_row(one.pool, "w1"))["status"] == "wedged"
    await one.hear(beat("w1", active_tasks=1))
    assert (await agent_row(one.pool, "w1"))["status"] == "online"


async def test_an_observer_decides_and_records_and_does_nothing(stack: Stack, pool: Pool, engine: FakeEngine) -> None:
    one = Replica(liveness_settings(stack, mode="observe"), pool, engine)
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(kill_order("w1"))
    await one.restart()
    assert engine.calls == []
    assert [each.result for each in await one.told(KillDone)] == ["not_killable"]
    assert await pool.fetchval("SELECT verdict FROM evidence ORDER BY id DESC LIMIT 1") == "dead"
    assert (await one.ask("w1", "restart"))[0] == 409


# ── orders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_two_orders_against_one_life_are_one_kill_and_two_answers(one: Replica, engine: FakeEngine) -> None:
    await one.up(engine, "w1")
    first, second = kill_order("w1", session_id="a"), kill_order("w1", session_id="b")
    await one.hear(first, second)
    await one.restart()
    assert [verb for verb, _, _ in engine.calls] == ["kill", "restart"]
    assert {each.session_id: each.result for each in await one.told(KillDone)} == {"a": "applied", "b": "applied"}


async def test_a_kill_waits_for_the_cap_and_not_beyond_its_expiry(one: Replica, engine: FakeEngine) -> None:
    """I6, I7: the gate opens again; whoever runs then is not to blame."""
    await crashed(one, engine, "w1", "w2")
    await one.up(engine, "w3")
    now = datetime.now(UTC)
    await one.look(now)
    await one.restart(now)
    await one.hear(kill_order("w3", expires_at=now + timedelta(seconds=20)))
    await one.restart(now)
    assert engine.calls == [("restart", "w1", 1), ("restart", "w2", 1)], "both places are taken"
    await one.restart(now + timedelta(seconds=31))
    assert len(engine.calls) == 2
    assert await one.told(KillDone) == []
    assert (await agent_row(one.pool, "w3"))["status"] == "online"
    assert [row["result"] for row in await restart_rows(one.pool, "w3")] == ["withdrawn"]


async def test_an_order_that_ran_out_is_carried_out_when_it_is_given_more_time(
    one: Replica, engine: FakeEngine
) -> None:
    await one.up(engine, "w1")
    past = datetime.now(UTC) - timedelta(seconds=1)
    order = kill_order("w1", expires_at=past)
    await one.hear(order)
    assert await one.told(KillDone) == []
    await one.hear(kill_order("w1", order_id=order.order_id))
    await one.restart()
    assert [each.result for each in await one.told(KillDone)] == ["applied"]


async def test_an_order_against_a_life_that_has_died_meanwhile_is_answered_by_its_restart(
    one: Replica, engine: FakeEngine
) -> None:
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(kill_order("w1"))
    await one.restart()
    assert [each.result for each in await one.told(KillDone)] == ["already_ended"]
    assert engine.calls == [("restart", "w1", 1)]


async def test_a_kill_hits_no_container_that_came_later(one: Replica, engine: FakeEngine) -> None:
    await one.up(engine, "w1")
    await one.hear(kill_order("w1"))
    engine.crash("w1")
    engine.start("w1")
    await one.restart()
    assert [each.result for each in await one.told(KillDone)] == ["stale"]
    assert engine.calls == []


async def test_an_order_that_comes_late_hits_no_container_that_was_started_since(
    one: Replica, engine: FakeEngine
) -> None:
    """I6, D-S25: an agent without boot ids is heard under the same number in its next container."""
    await crashed(one, engine, "w1")
    ordered_at: datetime = await one.pool.fetchval("SELECT clock_timestamp()")
    await one.look()
    await one.restart()
    await one.hear(beat("w1"))
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["incarnation"]) == ("online", 1)
    await one.hear(kill_order("w1", session_id="late", occurred_at=ordered_at))
    await one.restart()
    assert [verb for verb, _, _ in engine.calls] == ["restart"]
    await one.hear(kill_order("w1", session_id="its own"))
    await one.restart()
    assert [verb for verb, _, _ in engine.calls] == ["restart", "kill", "restart"]
    results = {each.session_id: each.result for each in await one.told(KillDone)}
    assert results == {"late": "stale", "its own": "applied"}


async def test_a_paused_agent_is_killed_and_stays_down(one: Replica, engine: FakeEngine) -> None:
    await one.up(engine, "w1")
    await one.hear(change("w1", rev=2, paused=True), kill_order("w1"))
    await one.restart()
    assert [each.result for each in await one.told(KillDone)] == ["applied"]
    assert [verb for verb, _, _ in engine.calls] == ["kill"]
    assert (await agent_row(one.pool, "w1"))["status"] == "paused"
    await one.hear(change("w1", rev=3))
    await one.silence("w1")
    await one.look()
    await one.restart()
    assert [verb for verb, _, _ in engine.calls] == ["kill", "restart"]


async def test_one_that_dies_between_the_kill_and_the_start_is_finished_by_another(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S13."""
    await one.up(engine, "w1")
    await one.hear(kill_order("w1"))
    engine.fails = []
    restart = engine.restart
    never = asyncio.Event()
    reached = asyncio.Event()

    async def hangs(*_: object, **__: object) -> Observation:
        reached.set()
        await never.wait()
        raise AssertionError

    engine.restart = hangs  # type: ignore[method-assign]
    await one.restarts.run_once()
    await reached.wait()
    await one.restarts.stop(0)
    engine.restart = restart  # type: ignore[method-assign]
    await two.restart(datetime.now(UTC) + timedelta(seconds=one.settings.lease_s + 1))
    assert engine.calls == [("kill", "w1", 1), ("restart", "w1", 1)]
    assert [each.result for each in await one.told(KillDone)] == ["applied"]


async def test_an_engine_that_lies_about_many_at_once_is_not_believed(one: Replica, engine: FakeEngine) -> None:
    """D-S16, D-S5: all of a third are counted before the first of them is judged; silent ones get a second look too."""
    names = [f"w{n}" for n in range(9)]
    await one.up(engine, *names)
    lied = names[:3]
    await one.silence(*lied)
    for name in lied:
        engine.says[name] = Observation(Seen.NOT_FOUND, why="a lie")
    now = datetime.now(UTC)
    await one.look(now)
    assert await one.pool.fetchval("SELECT count(*) FROM agents WHERE status = 'suspect'") == 3
    engine.says.clear()
    await one.look(now + timedelta(seconds=9))
    assert await one.pool.fetchval("SELECT count(*) FROM restarts") == 0
    assert await one.pool.fetchval("SELECT count(*) FROM agents WHERE status = 'online'") == 9


async def test_a_look_that_finds_all_well_writes_nothing(one: Replica, engine: FakeEngine) -> None:
    """D-S21."""
    await one.up(engine, "w1", "w2")
    await one.look()
    before = await one.pool.fetch("SELECT to_jsonb(a) - 'next_check_at' AS row FROM agents a ORDER BY workspace_id")
    rows = await one.pool.fetchval("SELECT count(*) FROM evidence")
    await one.look()
    after = await one.pool.fetch("SELECT to_jsonb(a) - 'next_check_at' AS row FROM agents a ORDER BY workspace_id")
    assert before == after
    assert await one.pool.fetchval("SELECT count(*) FROM evidence") == rows


async def test_a_replica_that_has_just_started_gives_no_verdict_from_one_look(
    stack: Stack, pool: Pool, engine: FakeEngine
) -> None:
    """D-S23."""
    one = Replica(liveness_settings(stack, settle_s=60.0), pool, engine)
    await crashed(one, engine, "w1")
    now = datetime.now(UTC)
    await one.look(now)
    assert (await agent_row(pool, "w1"))["status"] == "suspect"
    await one.look(now + timedelta(seconds=15))
    assert (await agent_row(pool, "w1"))["status"] == "offline"


async def test_a_verdict_that_cannot_be_written_restarts_nothing(one: Replica, engine: FakeEngine) -> None:
    """D-S19: Postgres refuses at the moment of the decision."""
    await crashed(one, engine, "w1")
    await one.pool.execute("ALTER TABLE restarts ADD CONSTRAINT trial CHECK (false) NOT VALID")
    try:
        with pytest.raises(asyncpg.CheckViolationError):
            await one.look()
        await one.restart()
    finally:
        await one.pool.execute("ALTER TABLE restarts DROP CONSTRAINT trial")
    assert engine.calls == []
    assert (await agent_row(one.pool, "w1"))["status"] == "online"
    await one.look()
    await one.restart()
    assert engine.calls == [("restart", "w1", 1)]


async def test_nothing_that_is_seen_during_a_restart_begins_another(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """A-L-05, D-S9: neither before its turn, nor during the call, nor while it boots."""
    await crashed(one, engine, "w1")
    now = datetime.now(UTC)
    await one.look(now)
    await two.look(now + timedelta(seconds=1))
    engine.before_call = asyncio.Event()
    await one.restarts.run_once(now)
    await engine.called.wait()
    await two.look(now + timedelta(seconds=12))
    engine.before_call.set()
    await one.restarts.settled()
    engine.crash("w1")
    for seconds in (15, 30, 119):
        await two.look(now + timedelta(seconds=seconds))
        await two.restart(now + timedelta(seconds=seconds))
    assert engine.calls == [("restart", "w1", 1)]
    await two.look(now + timedelta(seconds=121))
    await two.restart(now + timedelta(seconds=121))
    assert len(engine.calls) == 2, "its boot is over, and it is not there"


async def test_a_machine_that_is_gone_is_found_without_any_traffic(one: Replica, engine: FakeEngine) -> None:
    """A-L-10: nobody calls it, nobody hears it, its row says online."""
    await crashed(one, engine, "w1")
    assert (await agent_row(one.pool, "w1"))["status"] == "online"
    await one.look()
    await one.restart()
    assert engine.calls == [("restart", "w1", 1)]


async def test_after_a_false_alarm_a_real_death_is_found_as_before(one: Replica, engine: FakeEngine) -> None:
    """A-L-16."""
    await crashed(one, engine, "w1")
    await one.look()
    await one.hear(beat("w1"))
    engine.start("w1")
    await one.restart()
    await one.look()
    engine.crash("w1")
    await one.silence("w1")
    await one.look()
    await one.restart()
    assert [row["result"] for row in await restart_rows(one.pool, "w1")] == ["recovered", "started"]


async def test_a_look_that_a_stall_of_ours_has_made_old_is_judged_as_of_then(
    one: Replica, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-S5, D-S23, I7: between the engine's answer and the verdict our loop stood for 60 s, and heard nobody."""
    await one.up(engine, "w1")
    engine.says["w1"] = Observation(Seen.STOPPED, engine.running["w1"], why="flake")

    async def late(_: Connection, now: datetime | None = None) -> datetime:
        return (now or datetime.now(UTC)) + timedelta(seconds=60)

    monkeypatch.setattr("services.liveness.store.clock", late)
    await one.look()
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["suspicions"]) == ("suspect", 1)


async def test_one_that_is_wedged_is_one_row_of_evidence(one: Replica, engine: FakeEngine) -> None:
    await one.up(engine, "w1")
    await one.hear(beat("w1", active_tasks=1))
    now = datetime.now(UTC)
    for seconds in (300, 310, 320):
        await one.look(now + timedelta(seconds=seconds))
    assert (await agent_row(one.pool, "w1"))["status"] == "wedged"
    assert await one.pool.fetchval("SELECT count(*) FROM evidence WHERE verdict = 'wedged'") == 1


async def test_a_workspace_that_is_removed_under_a_kill_stops_no_other_restart(
    one: Replica, two: Replica, engine: FakeEngine
) -> None:
    """D-S13, D-S18: the replica that held the kill is dead, and the order has not run out."""
    await crashed(one, engine, "w2")
    await one.up(engine, "w1")
    await one.hear(kill_order("w1", expires_at=datetime.now(UTC) + timedelta(seconds=600)))
    engine.before_call = asyncio.Event()
    await one.restarts.run_once()
    await engine.called.wait()
    await one.restarts.stop(0)
    engine.before_call = None
    await one.hear(WorkspaceRemoved(workspace_id="w1", rev=9))
    later = datetime.now(UTC) + timedelta(seconds=one.settings.lease_s + 1)
    await two.look(later)
    await two.restart(later)
    assert engine.calls == [("restart", "w2", 1)]
    assert [each.result for each in await one.told(KillDone)] == ["already_ended"]
    assert (await agent_row(one.pool, "w1"))["status"] == "removed"


@pytest.mark.parametrize("fails", [False, True])
async def test_one_that_changes_hands_during_its_restart_is_written_down_and_reachable(
    one: Replica, engine: FakeEngine, *, fails: bool
) -> None:
    """A-L-18: it is external by now, nobody looks, and what is down is not sent to."""
    await crashed(one, engine, "w1")
    await one.look()
    engine.before_call = asyncio.Event()
    if fails:
        engine.fails = [CannotRunError("it is not in the file")]
    await one.restarts.run_once()
    await engine.called.wait()
    await one.hear(change("w1", rev=2, runtime={}))
    engine.before_call.set()
    await one.restarts.settled()
    assert [row["result"] for row in await restart_rows(one.pool, "w1")] == ["cannot_run" if fails else "started"]
    row = await agent_row(one.pool, "w1")
    assert (row["status"], row["next_check_at"]) == ("online", None)


async def test_one_that_is_paused_during_its_restart_stays_paused(one: Replica, engine: FakeEngine) -> None:
    await crashed(one, engine, "w1")
    await one.look()
    engine.before_call = asyncio.Event()
    await one.restarts.run_once()
    await engine.called.wait()
    await one.hear(change("w1", rev=2, paused=True))
    engine.before_call.set()
    await one.restarts.settled()
    assert (await agent_row(one.pool, "w1"))["status"] == "paused"
