"""What every driver promises: the same suite for each engine. A new driver adds a bench in driver_kit.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, Driver, DriverError, FencedError, Killed, Target
from services.liveness.drivers.process import ProcessDriver
from services.liveness.drivers.webhook import WebhookDriver
from shared.processes import mark_of
from tests.conftest import until
from tests.integration.driver_kit import BENCHES, Bench, WebhookBench, bench_of
from tests.integration.liveness_kit import DEAF, PARENT, AgentsFile, agents

__all__ = ["agents"]


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = bench_of(request.param, request)
    yield made
    made.close()


@pytest.fixture
async def driver(bench: Bench) -> AsyncIterator[Driver]:
    made = bench.driver()
    yield made
    await made.close()


@pytest.fixture
async def other(bench: Bench) -> AsyncIterator[Driver]:
    """Another replica's driver for the same engine."""
    made = bench.driver()
    yield made
    await made.close()


async def started(driver: Driver, target: Target, fence: int = 1) -> str:
    seen = await driver.restart(target, expected=None, fence=fence)
    assert seen.container_id is not None, seen
    return seen.container_id


async def sees(driver: Driver, target: Target, *, kind: Seen) -> bool:
    return (await driver.inspect(target)).seen is kind


async def test_what_was_never_started_is_not_running(bench: Bench, driver: Driver) -> None:
    assert (await driver.inspect(bench.add("w1"))).seen is bench.unstarted


async def test_a_started_agent_runs_and_every_replica_sees_the_same(
    bench: Bench, driver: Driver, other: Driver
) -> None:
    target = bench.add("w1")
    before = datetime.now(UTC)
    seen = await driver.restart(target, expected=None, fence=1)
    assert seen.seen is Seen.RUNNING
    assert seen.started_at is not None
    assert abs(seen.started_at - before) < timedelta(seconds=10)
    assert await other.inspect(target) == await driver.inspect(target) == seen


async def test_many_are_listed_at_once(bench: Bench, driver: Driver) -> None:
    up, down = bench.add("w1"), bench.add("w2")
    await started(driver, up)
    seen = await driver.list([up, down])
    assert {name: each.seen for name, each in seen.items()} == {"w1": Seen.RUNNING, "w2": bench.unstarted}


async def test_the_same_fence_again_starts_nothing_again(bench: Bench, driver: Driver, other: Driver) -> None:
    """D-S12: also where the replica that started it died before it could write so."""
    target = bench.add("w1")
    both = await asyncio.gather(*(each.restart(target, expected=None, fence=4) for each in (driver, other)))
    assert both[0] == both[1] == await driver.restart(target, expected=None, fence=4)


async def test_a_restart_ends_the_old_one_and_starts_a_new_one(bench: Bench, driver: Driver, other: Driver) -> None:
    target = bench.add("w1")
    old = await started(driver, target)
    new = await other.restart(target, expected=old, fence=2)
    assert new.seen is Seen.RUNNING
    assert new.container_id != old
    assert not bench.runs(old)


async def test_a_restart_that_expected_another_container_does_nothing(bench: Bench, driver: Driver) -> None:
    """D-S12: the decision was about another life."""
    target = bench.add("w1")
    runs = await started(driver, target)
    with pytest.raises(FencedError):
        await driver.restart(target, expected="999999:1", fence=2)
    assert bench.runs(runs)


async def test_a_stale_fence_is_refused(bench: Bench, driver: Driver, other: Driver) -> None:
    """D-S12: a replica that stood still since before a later restart."""
    target = bench.add("w1")
    old = await started(driver, target, fence=1)
    new = await driver.restart(target, expected=old, fence=3)
    with pytest.raises(FencedError):
        await other.restart(target, expected=old, fence=2)
    knows = other if bench.shares_fences else driver
    with pytest.raises(FencedError):
        await knows.kill(target, expected=new.container_id, fence=2)
    assert await other.inspect(target) == new


async def test_a_start_without_expectation_leaves_alone_what_runs(bench: Bench, driver: Driver) -> None:
    target = bench.add("w1")
    runs = await started(driver, target)
    assert await started(driver, target, fence=2) == runs


async def test_a_crash_is_seen_as_stopped_with_its_own_id(bench: Bench, driver: Driver, other: Driver) -> None:
    target = bench.add("w1")
    runs = await started(driver, target)
    bench.crash(runs)
    for each in (driver, other):
        await until(lambda each=each: sees(each, target, kind=Seen.STOPPED))  # type: ignore[misc]
    assert (await driver.inspect(target)).container_id == runs
    assert (await driver.restart(target, expected=runs, fence=2)).seen is Seen.RUNNING


async def test_a_crash_is_told_at_once_also_to_a_replica_that_did_not_start_it(
    bench: Bench, driver: Driver, other: Driver
) -> None:
    """D-S6. An engine that tells nothing says nothing of it: there it is found by looking."""
    target = bench.add("w1")
    runs = await started(driver, target)
    assert (await other.inspect(target)).seen is Seen.RUNNING
    bench.crash(runs)
    if not bench.tells_of_exits:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(other.exits())
        assert await sees(other, target, kind=Seen.STOPPED)
        return
    for each in (driver, other):
        async with asyncio.timeout(30):
            ended = await anext(each.exits())
        assert (ended.workspace_id, ended.container_id) == ("w1", runs)


async def test_a_paused_agent_is_in_transition(bench: Bench, driver: Driver) -> None:
    """D-S17: it neither runs nor is it dead."""
    target = bench.add("w1")
    runs = await started(driver, target)
    bench.pause(runs)
    await until(lambda: sees(driver, target, kind=Seen.TRANSITION))
    bench.resume(runs)
    await until(lambda: sees(driver, target, kind=Seen.RUNNING))


async def test_a_kill_ends_what_was_meant_and_nothing_else(bench: Bench, driver: Driver, other: Driver) -> None:
    target, neighbour = bench.add("w1"), bench.add("w2")
    runs, beside = await started(driver, target), await started(driver, neighbour)
    assert await other.kill(target, expected="999999:1", fence=2) is Killed.REPLACED
    assert bench.runs(runs)
    assert await other.kill(target, expected=runs, fence=2) is Killed.APPLIED
    assert not bench.runs(runs)
    assert bench.runs(beside)
    assert await other.kill(target, expected=runs, fence=2) is Killed.GONE
    assert (await driver.restart(target, expected=runs, fence=2)).seen is Seen.RUNNING


async def test_a_paused_agent_is_killed_too(bench: Bench, driver: Driver) -> None:
    target = bench.add("w1")
    runs = await started(driver, target)
    bench.pause(runs)
    assert await driver.kill(target, expected=runs, fence=2) is Killed.APPLIED


async def test_agents_outlive_their_driver(bench: Bench, driver: Driver, other: Driver) -> None:
    target = bench.add("w1")
    runs = await started(driver, target)
    await driver.close()
    assert bench.runs(runs)
    assert (await other.inspect(target)).container_id == runs


async def test_what_nobody_knows_how_to_run_is_refused_and_looks_like_nothing(bench: Bench, driver: Driver) -> None:
    target = Target("nobody", bench.add("w1").runtime)
    assert (await driver.inspect(target)).seen is Seen.UNKNOWN
    with pytest.raises(CannotRunError):
        await driver.restart(target, expected=None, fence=1)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def look(driver: ProcessDriver, name: str) -> Observation:
    return await driver.inspect(Target(name))


async def test_one_that_is_deaf_to_sigterm_is_killed_after_its_stop_time(agents: AgentsFile) -> None:
    agents.add("w1", DEAF, stop_s=0.2)
    driver = agents.driver()
    runs = await started(driver, Target("w1"))
    await until(lambda: _said(agents, "deaf"))
    assert await driver.kill(Target("w1"), expected=runs, fence=2) is Killed.APPLIED
    await driver.close()


async def test_what_an_agent_started_in_a_session_of_its_own_ends_with_it(agents: AgentsFile) -> None:
    """A-L-14, C-K12: nothing leaks, also when the agent itself died long before."""
    agents.add("w1", PARENT)
    driver = agents.driver()
    for fence, crash in ((1, False), (2, True)):
        last = await driver.restart(Target("w1"), expected=None, fence=fence)
        await until(lambda fence=fence: _lines(agents, fence))  # type: ignore[misc]
        child = mark_of(int(agents.said("w1").split()[-1]))
        assert child is not None
        assert last.container_id is not None
        if crash:
            os.kill(int(last.container_id.partition(":")[0]), signal.SIGKILL)
            await until(lambda: sees(driver, Target("w1"), kind=Seen.STOPPED))
        assert await driver.kill(Target("w1"), expected=last.container_id, fence=fence + 1) in Killed
        assert mark_of(child.pid) != child
    await driver.close()


async def test_an_agent_gets_its_own_environment_and_none_of_ours(
    agents: AgentsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIDE_DATABASE_URL", "postgresql://secret")
    agents.add("w1", "import os; print(sorted(os.environ)); print(os.environ['GIVEN'])", env={"GIVEN": "yes"})
    driver = agents.driver()
    await started(driver, Target("w1"))
    await until(lambda: _lines(agents, 2))
    assert "yes" in agents.said("w1")
    assert "DATABASE" not in agents.said("w1")
    await driver.close()


async def test_one_whose_starter_died_before_it_wrote_so_is_found_by_its_mark(agents: AgentsFile) -> None:
    """D-S13."""
    agents.add("w1")
    driver = agents.driver()
    runs = await started(driver, Target("w1"), fence=5)
    (agents.folder / "w1.json").unlink()
    other = agents.driver()
    assert (await look(other, "w1")).container_id == runs
    assert await started(other, Target("w1"), fence=5) == runs
    await driver.close()
    await other.close()


async def test_a_file_that_cannot_be_read_is_no_death(agents: AgentsFile) -> None:
    agents.add("w1")
    driver = agents.driver()
    runs = await started(driver, Target("w1"))
    agents.path.write_text("[agents.w1]\ncommand = 'a line'\n")
    assert (await look(driver, "w1")).seen is Seen.RUNNING
    assert (await look(driver, "w2")).seen is Seen.UNKNOWN
    with pytest.raises(DriverError):
        await driver.restart(Target("w1"), expected=runs, fence=2)
    agents.write()
    await driver.close()


async def test_what_is_wrong_in_the_operators_file_is_said_without_its_values(agents: AgentsFile) -> None:
    agents.add("w1")
    agents.path.write_text("[agents.w1]\ncommand = ['x']\nTOKEN = 'sk-secret'\n")
    driver = agents.driver()
    why = (await look(driver, "w1")).why
    assert "agents.w1.TOKEN" in why
    assert "sk-secret" not in why
    agents.write()
    await driver.close()


async def test_a_command_that_does_not_exist_is_an_error_and_can_be_tried_again(agents: AgentsFile) -> None:
    agents.agents["w1"] = {"command": ["/no/such/thing"]}
    agents.write()
    driver = agents.driver()
    with pytest.raises(DriverError):
        await driver.restart(Target("w1"), expected=None, fence=1)
    agents.add("w1")
    assert await started(driver, Target("w1"), fence=1)
    await driver.close()


@pytest.mark.parametrize("mode", [0o777, 0o770])
async def test_a_folder_that_others_may_write_to_is_not_believed(agents: AgentsFile, mode: int) -> None:
    """Its default stands in /tmp: a planted w1.json would have any process of ours ended."""
    agents.add("w1")
    agents.folder.mkdir()
    agents.folder.chmod(mode)
    victim = mark_of(os.getpid())
    assert victim is not None
    planted = {"fence": 1, "pid": victim.pid, "start_ticks": victim.start_ticks, "machine": "", "at": 0.0}
    (agents.folder / "w1.json").write_text(json.dumps(planted))
    driver = agents.driver()
    assert (await look(driver, "w1")).seen is Seen.UNKNOWN
    with pytest.raises(DriverError, match="not ours alone"):
        await driver.restart(Target("w1"), expected=None, fence=2)
    with pytest.raises(DriverError, match="not ours alone"):
        await driver.kill(Target("w1"), expected=None, fence=2)
    await driver.close()
    (agents.folder / "w1.json").unlink()
    agents.folder.chmod(0o700)


async def test_output_does_not_grow_from_start_to_start(agents: AgentsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.liveness.drivers.process.driver._OUTPUT_MAX", 3)
    agents.add("w1", "print('once', flush=True); import time; time.sleep(60)")
    driver = agents.driver()
    runs = await started(driver, Target("w1"))
    for fence in (2, 3):
        await until(lambda: _lines(agents, 1))
        seen = await driver.restart(Target("w1"), expected=runs, fence=fence)
        assert seen.container_id is not None
        runs = seen.container_id
    await until(lambda: _lines(agents, 1))
    assert [each.read_text() for each in sorted(agents.folder.glob("w1.log*"))] == ["once\n", "once\n"]
    await driver.close()


# ── webhooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_control_plane_gets_the_fence_as_key_and_believes_no_other_secret(agents: AgentsFile) -> None:
    bench = WebhookBench(agents)
    target = bench.add("w1")
    good, bad = bench.driver(), WebhookDriver("another")
    await started(good, target, fence=7)
    assert bench.keys == ["w1:restart:7"]
    assert (await bad.inspect(target)).seen is Seen.UNKNOWN
    with pytest.raises(DriverError):
        await bad.restart(target, expected=None, fence=8)
    bench.close()
    assert (await good.inspect(target)).seen is Seen.UNKNOWN
    for driver in (good, bad):
        await driver.close()


async def test_an_answer_that_comes_in_drops_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: each byte is in time, and the whole never comes to an end."""
    monkeypatch.setattr("services.liveness.drivers.webhook._LOOK_S", 0.3)

    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"}")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)
        finally:
            writer.close()
            left.set()

    left = asyncio.Event()
    server = await asyncio.start_server(drips, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    driver = WebhookDriver("secret")
    async with asyncio.timeout(30):
        seen = await driver.inspect(Target("w1", {"driver": "webhook", "url": f"http://127.0.0.1:{port}/"}))
    assert (seen.seen, seen.why) == (Seen.UNKNOWN, "its answer does not come to an end")
    await driver.close()
    async with asyncio.timeout(30):
        await left.wait()
    server.close()


async def _said(agents: AgentsFile, word: str) -> bool:
    return word in agents.said("w1")


async def _lines(agents: AgentsFile, count: int) -> bool:
    return len(agents.said("w1").splitlines()) >= count
