"""Health, loops and logs: what an operator relies on when something is wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from pydantic import SecretStr

from shared.http import health_app
from shared.loops import Loop, LoopSilent, turning
from shared.settings import SharedSettings
from shared.telemetry import Health, log, start_logging


async def get(health: Health, path: str) -> tuple[int, bytes]:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {}

    await health_app(health)({"type": "http", "path": path}, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def never() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise ConnectionRefusedError("refused")


async def works() -> None:
    pass


async def test_livez_touches_no_dependency() -> None:
    """A broker outage must not restart a single service."""
    health = Health()
    health.add("postgres", never)
    assert (await get(health, "/livez"))[0] == 200


async def test_readyz_of_a_service_that_is_starting_says_so_whatever_begins_meanwhile() -> None:
    """A probe that is added while the others are asked has not answered yet: it is no error of the service."""
    health = Health()

    async def goes_on() -> None:
        health.add("rabbitmq", works)

    health.add("postgres", goes_on)
    status, body = await get(health, "/readyz")
    assert (status, json.loads(body)) == (503, {"status": "not ready", "service": "starting", "postgres": "ok"})


async def test_livez_tells_of_a_loop_that_hangs_and_not_of_one_that_fails() -> None:
    """D-S26, C-R6: a decision loop that no longer turns is noticed by whoever supervises; an outage is no reason."""
    hanging, failing = Loop("hanging", _hangs), Loop("failing", _refused)
    health = Health()
    for loop in (hanging, failing):
        health.add_pulse(loop.name, loop.age_s, limit_s=0.3)
    async with turning([hanging, failing]):
        assert (await get(health, "/livez"))[0] == 200
        async with asyncio.timeout(30):
            while (await get(health, "/livez"))[0] == 200:
                failing.wake()
                await asyncio.sleep(0.01)  # time is what is tested
        status, body = await get(health, "/livez")
    assert status == 503
    assert set(json.loads(body)) == {"status", "hanging"}


async def _hangs() -> float:
    await asyncio.Event().wait()
    return 0.0


async def _refused() -> float:
    raise ConnectionRefusedError("refused")


async def test_readyz_names_what_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.telemetry.PROBE_TIMEOUT_S", 0.02)
    health = Health()
    health.add("postgres", fails)
    health.add("rabbitmq", never)
    health.started()
    status, body = await get(health, "/readyz")
    assert status == 503
    assert json.loads(body) == {
        "status": "not ready",
        "service": "ok",
        "postgres": "ConnectionRefusedError: refused",
        "rabbitmq": "no answer within 0.02 s",
    }


async def test_a_service_that_has_not_begun_is_not_ready() -> None:
    health = Health()
    health.add("postgres", works)
    assert (await get(health, "/readyz"))[0] == 503
    health.started()
    assert (await get(health, "/readyz"))[0] == 200


async def test_many_questions_are_one_probe() -> None:
    """/readyz is open to anyone: it must not become a load."""
    asked = 0

    async def probe() -> None:
        nonlocal asked
        asked += 1

    health = Health()
    health.add("postgres", probe)
    await asyncio.gather(*(health.check() for _ in range(50)))
    assert asked == 1


async def test_an_unknown_path_is_a_problem_that_says_what_to_try() -> None:
    status, body = await get(Health(), "/helthz")
    assert status == 404
    assert "/readyz" in json.loads(body)["detail"]


async def test_a_loop_survives_what_its_work_raises() -> None:
    """A-S-01: a panic once killed a loop and nobody saw for twelve hours."""
    turns: asyncio.Queue[int] = asyncio.Queue()

    async def work() -> float:
        turns.put_nowait(1)
        if turns.qsize() < 2:
            raise KeyError("a bug")
        return 3600

    async with turning([Loop("test_raising", work)]), asyncio.timeout(30):
        while turns.qsize() < 2:  # noqa: ASYNC110 - a loop's backoff, at most 0.2 s
            await asyncio.sleep(0.01)
    assert REGISTRY.get_sample_value("bide_loop_failed_turns_total", {"loop": "test_raising"}) == 1


async def test_a_wake_during_a_turn_is_not_lost() -> None:
    turns = 0
    twice = asyncio.Event()

    async def work() -> float:
        nonlocal turns
        turns += 1
        if turns == 1:
            loop.wake()
        else:
            twice.set()
        return 3600

    loop = Loop("test_wake", work)
    async with turning([loop]), asyncio.timeout(30):
        await twice.wait()


async def test_a_loop_that_does_not_come_through_is_not_ready() -> None:
    """C-R6: whatever it waits for; asked in between, one that only sleeps is well."""
    stuck, turned = asyncio.Event(), asyncio.Event()

    async def work() -> float:
        turned.set()
        await stuck.wait()
        return 3600

    loop = Loop("test_silent", work)
    async with turning([loop]), asyncio.timeout(30):
        await turned.wait()
        await loop.probe(60)
        with pytest.raises(LoopSilent, match="no turn"):
            await loop.probe(0)
        before = REGISTRY.get_sample_value("bide_loop_last_turn_timestamp_seconds", {"loop": "test_silent"})
        stuck.set()
        while REGISTRY.get_sample_value("bide_loop_last_turn_timestamp_seconds", {"loop": "test_silent"}) == before:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await loop.probe(1)


@pytest.fixture
def own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    logging.basicConfig(handlers=[], force=True)


@pytest.mark.usefixtures("own_logging")
def test_a_log_line_is_json_with_service_replica_and_the_bound_facts(capsys: pytest.CaptureFixture[str]) -> None:
    settings = SharedSettings(
        database_url=SecretStr("postgresql://h/d"), amqp_url=SecretStr("amqp://h/"), replica_id="r1"
    )
    start_logging("queue", settings)
    structlog.contextvars.bind_contextvars(fact="SessionStop")
    log.info("batch_stored", facts=3)
    structlog.contextvars.clear_contextvars()
    said = capsys.readouterr().err
    line = json.loads(said)
    assert said == json.dumps(line) + "\n"
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "batch_stored", "level": "info", "service": "queue", "replica": "r1", "fact": "SessionStop",
        "facts": 3,
    }  # fmt: skip


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("é\n", "é\n"), ("\ud800", "\ud800"), (1 << 70, 1 << 70), ({"a": {"b": [1]}}, {"a": {"b": [1]}}), (1j, "1j"),
    ],
)  # fmt: skip
def test_whatever_a_fact_is_its_line_is_one_line_of_json(
    value: object, read: object, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SharedSettings(
        database_url=SecretStr("postgresql://h/d"), amqp_url=SecretStr("amqp://h/"), replica_id="r1"
    )
    start_logging("queue", settings)
    log.info("said", value=value)
    logging.getLogger("a.library").warning("said too")
    ours, theirs = capsys.readouterr().err.splitlines()
    assert json.loads(ours)["value"] == read
    assert json.loads(theirs)["event"] == "said too"
