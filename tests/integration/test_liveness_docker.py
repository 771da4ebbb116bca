"""The docker driver against a real dockerd: what it sees, what it leaves alone, and an engine that is ill."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiodocker
import pytest
from aiodocker import DockerError
from aiodocker.containers import DockerContainer

from services.liveness.decide.seen import Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target
from services.liveness.drivers.docker import LABEL, DockerDriver
from tests.conftest import until
from tests.integration.dockerd_kit import DEAF, IMAGE, Engine

BY_LABEL = {"driver": "docker"}
PATIENCE_S = 0.5


@pytest.fixture
def engine(dockerd: Engine) -> Iterator[Engine]:
    yield dockerd
    dockerd.clear()


@pytest.fixture
async def driver(engine: Engine) -> AsyncIterator[DockerDriver]:
    made = engine.driver(look_s=5.0)
    yield made
    await made.close()


@pytest.fixture
async def hasty(engine: Engine) -> AsyncIterator[DockerDriver]:
    """One that does not wait long: neither for the engine nor for a container."""
    made = engine.driver(look_s=PATIENCE_S, stop_max_s=1)
    yield made
    await made.close()


def target(workspace_id: str, container: str | None = None) -> Target:
    return Target(workspace_id, BY_LABEL if container is None else {**BY_LABEL, "container": container})


async def listening(driver: DockerDriver) -> None:
    """Come back when it hears the engine."""
    driver._engine.open()
    await until(lambda: _is(driver._engine.hears()))


async def told(driver: DockerDriver, within_s: float = 5.0) -> Exit:
    async with asyncio.timeout(within_s):
        return await anext(driver.exits())


# ── which container is meant ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_container_is_known_by_its_label_alone(engine: Engine, driver: DockerDriver) -> None:
    made = engine.run("w1")
    seen = await driver.inspect(target("w1"))
    assert (seen.seen, seen.container_id) == (Seen.RUNNING, engine.life(made))
    assert (await driver.restart(target("w1"), expected=seen.container_id, fence=1)).seen is Seen.RUNNING
    assert engine.starts(made) == 2


@pytest.mark.parametrize("labelled", [None, "another"])
async def test_what_has_not_the_workspaces_label_is_never_touched(
    engine: Engine, driver: DockerDriver, labelled: str | None
) -> None:
    """Whatever stands in `runtime`: the label is the consent of who made the container."""
    made = engine.run(labelled, "precious")
    for name in ("precious", made.id, made.id[:12]):
        meant = target("w1", name)
        seen = await driver.inspect(meant)
        assert (seen.seen, seen.container_id) == (Seen.UNKNOWN, None)
        assert "has not the label bide.workspace=w1" in seen.why
        assert await driver.list([meant]) == {"w1": seen}
        for act in (driver.restart, driver.kill):
            with pytest.raises(CannotRunError):
                await act(meant, expected=engine.life(made), fence=1)
    assert engine.runs(engine.life(made))
    assert engine.starts(made) == 1


async def test_what_is_no_name_is_no_path_either(engine: Engine, driver: DockerDriver) -> None:
    engine.run("w1", "precious")
    seen = await driver.inspect(target("w1", "x/../precious"))
    assert (seen.seen, seen.why) == (Seen.UNKNOWN, "'x/../precious' is no name of a container")


async def test_the_one_that_is_up_is_meant_and_of_two_neither(engine: Engine, driver: DockerDriver) -> None:
    old = engine.run("w1", "old")
    old.kill()
    new = engine.run("w1", "new")
    assert (await driver.inspect(target("w1"))).container_id == engine.life(new)
    assert (await driver.inspect(target("w1", "old"))).seen is Seen.STOPPED
    old.start()
    assert (await driver.inspect(target("w1"))).seen is Seen.UNKNOWN
    with pytest.raises(CannotRunError, match="2 containers"):
        await driver.restart(target("w1"), expected=engine.life(new), fence=1)
    assert (await driver.inspect(target("w1", "new"))).container_id == engine.life(new)


async def test_a_container_that_was_removed_is_not_found_and_cannot_be_run(
    engine: Engine, driver: DockerDriver
) -> None:
    made = engine.run("w1")
    life = engine.life(made)
    made.remove(force=True)
    assert (await driver.inspect(target("w1"))).seen is Seen.NOT_FOUND
    assert await driver.kill(target("w1"), expected=life, fence=1) is Killed.GONE
    with pytest.raises(CannotRunError, match="no container has the label"):
        await driver.restart(target("w1"), expected=life, fence=1)


# ── what an engine says ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_states_are_seen_as_what_they_are(engine: Engine, driver: DockerDriver) -> None:
    """D-S17: `State.Running` is true of a paused one."""
    made = engine.create("w1")
    seen = await driver.inspect(target("w1"))
    assert (seen.seen, seen.started_at, seen.why) == (Seen.TRANSITION, None, "the container is created")
    for do, kind, why in (
        (made.start, Seen.RUNNING, "the container is running"),
        (made.pause, Seen.TRANSITION, "the container is paused"),
        (made.unpause, Seen.RUNNING, "the container is running"),
        (made.stop, Seen.STOPPED, "the container has exited with 0"),
    ):
        await asyncio.to_thread(do)
        seen = await driver.inspect(target("w1"))
        assert (seen.seen, seen.why, seen.container_id) == (kind, why, engine.life(made))


async def test_an_exit_is_told_of_a_crash_and_not_of_what_somebody_asked_for(
    engine: Engine, driver: DockerDriver
) -> None:
    """D-S6, D-S17: a pause, a stop and a restart by hand are seen by looking, and not raced."""
    await listening(driver)
    paused, stopped, restarted, crashed, shot = (engine.run(f"w{number}") for number in range(5))
    lives = {f"w{number}": engine.life(made) for number, made in enumerate((paused, stopped, restarted, crashed, shot))}
    seen = await driver.list([target(name) for name in lives])
    assert {name: each.container_id for name, each in seen.items()} == lives
    for do in (paused.pause, stopped.stop, restarted.restart):
        await asyncio.to_thread(do)
    engine.crash(crashed)
    assert await told(driver) == Exit("w3", lives["w3"])
    await asyncio.to_thread(shot.kill)
    assert await told(driver) == Exit("w4", lives["w4"])
    seen = await driver.list([target(name) for name in lives])
    assert [each.seen for each in seen.values()] == [
        Seen.TRANSITION, Seen.STOPPED, Seen.RUNNING, Seen.STOPPED, Seen.STOPPED,
    ]  # fmt: skip
    assert seen["w2"].container_id not in (None, lives["w2"]), "another StartedAt is another life"


async def test_an_exit_names_the_life_that_ended(engine: Engine, driver: DockerDriver) -> None:
    await listening(driver)
    made = engine.run("w1", code=DEAF)
    lives = []
    for _ in range(2):
        lives.append(engine.life(made))
        await until(lambda: _sees(driver, "w1", lives[-1]))
        engine.crash(made)
        assert await told(driver) == Exit("w1", lives[-1])
        await asyncio.to_thread(made.start)
    assert len(set(lives)) == 2


async def test_what_happened_while_the_stream_was_cut_is_told_afterwards(engine: Engine, driver: DockerDriver) -> None:
    await listening(driver)
    made = engine.run("w1")
    life = (await driver.inspect(target("w1"))).container_id
    stream: Any = driver._engine.open().events.json_stream
    await stream._close()
    engine.crash(made)
    assert await told(driver) == Exit("w1", life or "")


async def test_an_end_that_is_told_late_is_not_that_of_the_life_that_was_seen_since(
    engine: Engine, driver: DockerDriver
) -> None:
    """A cut stream tells of the old life when the new one is known already."""
    made = engine.run("w1")
    engine.crash(made)
    await until(lambda: _ended(made))
    late = engine.told(made)
    assert late[-1]["Action"] == "die"
    await asyncio.to_thread(made.start)
    await listening(driver)
    assert (await driver.inspect(target("w1"))).container_id == engine.life(made)
    for event in late:
        driver._engine._hear(event)
    assert driver._engine.exits.empty()
    engine.crash(made)
    assert await told(driver) == Exit("w1", engine.life(made))


async def test_a_sweep_is_one_call_and_each_life_is_asked_for_once(
    engine: Engine, driver: DockerDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-S21."""
    asked: Counter[str] = Counter()
    ask = aiodocker.Docker._query_json

    async def counted(self: aiodocker.Docker, path: str, *args: Any, **kwargs: Any) -> Any:
        asked["list" if path == "containers/json" else "inspect"] += 1
        return await ask(self, path, *args, **kwargs)

    await listening(driver)
    made = [engine.run(f"w{number}") for number in range(6)]
    targets = [target(f"w{number}") for number in range(6)] + [target("nobody")]
    monkeypatch.setattr(aiodocker.Docker, "_query_json", counted)
    first = await driver.list(targets)
    assert asked == {"list": 1, "inspect": 6}
    asked.clear()
    assert await driver.list(targets) == first
    assert asked == {"list": 1}
    asked.clear()
    before = driver._engine._told[made[3].id]
    await asyncio.to_thread(made[3].restart)
    await until(lambda: _is(driver._engine._told[made[3].id] == before + 3))  # kill, die, start
    assert (await driver.list(targets))["w3"].container_id == engine.life(made[3])
    assert asked == {"list": 1, "inspect": 1}
    asked.clear()
    assert len(set(await asyncio.gather(*(driver.inspect(targets[3]) for _ in range(20))))) == 1
    assert asked == {"list": 1}, "one flight for all who ask of the same agent"


# ── acts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("expected", ["0123456789ab@2026-11-29T00:00:00Z", "{id}", "{id}@2026-11-29T00:00:00Z"])
async def test_a_restart_or_kill_of_another_life_is_refused(
    engine: Engine, driver: DockerDriver, expected: str
) -> None:
    """D-S12: the id alone is not enough, a restarted container keeps it."""
    made = engine.run("w1")
    expected = expected.format(id=made.id[:12])
    with pytest.raises(FencedError):
        await driver.restart(target("w1"), expected=expected, fence=1)
    assert await driver.kill(target("w1"), expected=expected, fence=1) is Killed.REPLACED
    assert engine.starts(made) == 1


async def test_one_that_is_deaf_to_sigterm_is_killed_after_its_time(engine: Engine, hasty: DockerDriver) -> None:
    """`t` is the time between SIGTERM and SIGKILL; here it is longer than the patience with the engine."""
    made = engine.run("w1", code=DEAF)
    life = engine.life(made)
    begun = time.monotonic()
    seen = await hasty.restart(target("w1"), expected=life, fence=1)
    assert time.monotonic() - begun >= 1
    assert (seen.seen, seen.container_id) == (Seen.RUNNING, engine.life(made))
    assert seen.container_id != life


@pytest.mark.parametrize("status", [409, 500])
async def test_what_the_engine_did_counts_and_not_what_it_answered(
    engine: Engine, driver: DockerDriver, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    made = engine.run("w1")
    old = engine.life(made)
    restart = DockerContainer.restart

    async def done_and_failed(self: DockerContainer, *, t: int | None = None) -> None:
        await restart(self, t=t)
        raise DockerError(status, "something went wrong")

    async def failed(_: DockerContainer, *, t: int | None = None) -> None:
        raise DockerError(status, f"something went wrong after {t} s")

    monkeypatch.setattr(DockerContainer, "restart", failed)
    with pytest.raises(DriverError, match="something went wrong"):
        await driver.restart(target("w1"), expected=old, fence=1)
    monkeypatch.setattr(DockerContainer, "restart", done_and_failed)
    seen = await driver.restart(target("w1"), expected=old, fence=1)
    assert (seen.seen, seen.container_id) == (Seen.RUNNING, engine.life(made))
    assert await driver.restart(target("w1"), expected=old, fence=1) == seen, "the same fence starts nothing again"
    assert engine.starts(made) == 2


async def test_what_the_engine_restarts_by_itself_is_not_restarted_once_more(
    engine: Engine, driver: DockerDriver
) -> None:
    await listening(driver)
    made = engine.run("w1", restart_policy={"Name": "always"})
    old = engine.life(made)
    assert (await driver.inspect(target("w1"))).container_id == old
    engine.crash(made)
    assert await told(driver) == Exit("w1", old)
    await until(lambda: _is(engine.life(made) != old))
    with pytest.raises(FencedError):
        await driver.restart(target("w1"), expected=old, fence=1)
    assert engine.starts(made) == 2


# ── an engine that is ill ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_frozen_engine_is_unknown_within_the_bound_and_recovers(engine: Engine, hasty: DockerDriver) -> None:
    """D-S14: no look says death, no act is done, nothing hangs; what died meanwhile is told when it thaws."""
    await listening(hasty)
    made, other = engine.run("w1"), engine.run("w2")
    lives = [engine.life(made), engine.life(other)]
    both = [target("w1"), target("w2")]
    assert [each.container_id for each in (await hasty.list(both)).values()] == lives
    engine.freeze()
    try:
        begun = time.monotonic()
        seen = [*(await hasty.list(both)).values(), *await asyncio.gather(*(hasty.inspect(both[0]) for _ in range(30)))]
        assert time.monotonic() - begun < 2 * PATIENCE_S + 1
        assert {each.seen for each in seen} == {Seen.UNKNOWN}
        assert {each.why for each in seen} == {"the engine did not answer in time"}
        for act in (hasty.restart, hasty.kill):
            with pytest.raises(DriverError):
                await act(both[0], expected=lives[0], fence=1)
        assert time.monotonic() - begun < 10
        engine.crash(other)
    finally:
        engine.thaw()
    assert await told(hasty) == Exit("w2", lives[1])
    await until(lambda: _sees(hasty, "w1", lives[0]))
    assert engine.starts(made) == 1


async def test_an_engine_that_is_not_there_is_unknown(tmp_path: Path) -> None:
    driver = DockerDriver(f"unix://{tmp_path}/none.sock")
    assert (await driver.inspect(target("w1"))).seen is Seen.UNKNOWN
    assert {name: each.seen for name, each in (await driver.list([target("w1")])).items()} == {"w1": Seen.UNKNOWN}
    with pytest.raises(DriverError):
        await driver.restart(target("w1"), expected=None, fence=1)
    await driver.close()


# ── testcontainers ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_container_of_testcontainers_is_an_agent_like_any_other(
    engine: Engine, driver: DockerDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    from testcontainers.core.config import testcontainers_config  # noqa: PLC0415 - it looks for its engine on import
    from testcontainers.core.container import DockerContainer as Contained  # noqa: PLC0415

    monkeypatch.setattr(testcontainers_config, "ryuk_disabled", True)
    made = Contained(IMAGE).with_command(["/bin/sh", "-c", DEAF])
    made.with_kwargs(network_mode="none", labels={LABEL: "w1"})
    await asyncio.to_thread(made.start)
    try:
        seen = await driver.inspect(target("w1"))
        assert seen.seen is Seen.RUNNING
        await asyncio.to_thread(made.get_wrapped_container().kill)
        assert (await driver.inspect(target("w1"))).seen is Seen.STOPPED
        again = await driver.restart(target("w1"), expected=seen.container_id, fence=1)
        assert engine.runs(again.container_id or "")
    finally:
        await asyncio.to_thread(made.stop)
        made.get_docker_client().client.close()


async def _ended(container: Any) -> bool:
    container.reload()
    return bool(container.status == "exited")


async def _is(value: bool) -> bool:
    return value


async def _sees(driver: DockerDriver, workspace_id: str, life: str) -> bool:
    return (await driver.inspect(target(workspace_id))).container_id == life
