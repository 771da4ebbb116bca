"""The heart in its own thread: what a handler does to the loop does not silence it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bide_agent import Message, Session
from bide_agent.runtime.pulse import Lag
from bide_agent.tokens import Tokens
from tests.unit.runtime_kit import SESSION, Steps, behind, fake_bide, send, task_of, text_of
from tests.unit.test_bide_agent_heart import FakeBide, serving

BEAT_S = 0.1


@contextmanager
def bide_in_a_thread() -> Iterator[FakeBide]:
    """A Bide that goes on while the test's loop is blocked."""
    bide, ready = FakeBide(), threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def run() -> None:
        async with serving(bide):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    ready.wait()
    try:
        yield bide
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def block_until_beats(bide: FakeBide, count: int) -> None:
    """Block the loop, as careless handlers do, for so many beats."""
    until = time.monotonic() + 20
    before = len(bide.beats)
    while len(bide.beats) < before + count and time.monotonic() < until:
        time.sleep(0.01)


async def test_a_handler_that_blocks_the_loop_for_several_beats_does_not_silence_them_and_they_say_so(
    tmp_path: Path,
) -> None:
    """A-L-12, B-09: the process lives, its loop does not, and both are told; progress stands still meanwhile."""
    with bide_in_a_thread() as bide:

        async def handle(_message: Message, _session: Session) -> str:
            block_until_beats(bide, 15)
            return "done"

        async with behind(bide, handle, tmp_path, heartbeat_s=BEAT_S) as host:
            assert bide.registrations[0].body["heartbeat_interval_s"] == BEAT_S
            before = len(bide.beats)
            assert text_of(await send(host, queue_id="q-1")) == "done"
            during = [beat.body for beat in bide.beats[before + 2 : before + 14]]
            after = host.beats + 5
            await host.until(lambda: host.beats >= after)
            last = bide.beats[-1].body
    lags = [beat["loop_lag_s"] for beat in during]
    print(
        f"{len(during)} beats while the loop was blocked, lag {lags[0]} … {lags[-1]} s: {during[-1]['runtime_state']}"
    )
    assert len(during) == 12
    assert {beat["active_tasks"] for beat in during} == {1}
    assert len({beat["progress"] for beat in during}) == 1
    assert lags == sorted(lags)
    assert lags[-1] > 1
    assert "loop lags" in during[-1]["runtime_state"]
    assert (last["active_tasks"], last["runtime_state"]) == (0, "ok")
    assert last["loop_lag_s"] < 1


async def test_a_handler_that_blocks_the_loop_can_still_see_what_it_is_asked(tmp_path: Path) -> None:
    with bide_in_a_thread() as bide:

        async def handle(_message: Message, session: Session) -> str:
            bide.directives = [{"id": "d-1", "kind": "checkpoint", "reason": "ceiling", "session_id": SESSION}]
            block_until_beats(bide, 3)
            assert session.asked
            await session.checkpoint(f"saw {session.asked.reason}")
            return "never"

        async with behind(bide, handle, tmp_path, heartbeat_s=BEAT_S) as host:
            assert text_of(await send(host, queue_id="q-1")) == "saw ceiling"
            told = [beat.body["acknowledged"] for beat in bide.beats if beat.body["acknowledged"]]
    assert told[0] == [{"id": "d-1", "result": "asked"}]


async def test_a_stop_in_a_reply_to_a_beat_cancels_the_turn(tmp_path: Path) -> None:
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return "never"

    async with fake_bide() as bide, behind(bide, handle, tmp_path) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        bide.directives = [{"id": "d-1", "kind": "stop", "reason": "ceiling", "session_id": SESSION}]
        host.beat_now()
        assert task_of(await sent)["status"]["state"] == "canceled"
        await host.until(lambda: any(beat.body["acknowledged"] for beat in bide.beats))
        told = next(beat.body["acknowledged"] for beat in bide.beats if beat.body["acknowledged"])
        assert told == [{"id": "d-1", "result": "stopping"}]
        assert len(host.directives) == 1


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated beside it", "no longer known"])
async def test_a_refused_token_is_read_again_or_asked_for_again(tmp_path: Path, *, rotated: bool) -> None:
    """A-A-10, A-L-09: from disk first, where somebody may have put another; the enrolment token after that."""

    async def handle(_message: Message, _session: Session) -> str:
        return "done"

    async with fake_bide() as bide, behind(bide, handle, tmp_path) as host:
        if rotated:
            (tmp_path / "w1/w1.token").write_text("own-2")
            bide.taken = {"own-2"}
        else:
            bide.taken, bide.issues = {"enrol", "own-2"}, ["own-2"]
        host.beat_now()
        await host.until(lambda: host.beats == 2)
        assert bide.beats[-1].token == "own-2"
        assert len(bide.registrations) == (1 if rotated else 2)
        assert (tmp_path / "w1/w1.token").read_text() == "own-2"


@pytest.mark.parametrize("found", [b"", b"\0\0\0", b"own\r\nx: y", b"\xff\xfe"])
async def test_a_token_file_that_holds_no_token_is_as_good_as_none(tmp_path: Path, found: bytes) -> None:
    """A power cut leaves zeros: no header that Bide could read, and so no 401 to learn from."""

    async def handle(_message: Message, _session: Session) -> str:
        return "done"

    (tmp_path / "w1").mkdir()
    (tmp_path / "w1/w1.token").write_bytes(found)
    async with fake_bide() as bide, behind(bide, handle, tmp_path) as host:
        assert host.registered
    assert (tmp_path / "w1/w1.token").read_text() == bide.beats[-1].token


async def test_an_agent_beats_until_its_last_turn_has_ended(tmp_path: Path) -> None:
    """Told to end, with a long grace: it was silent meanwhile, and a ceiling could not reach it."""

    async def handle(_message: Message, session: Session) -> str:
        asked = await session.until_asked()
        before = host.beats
        await host.until(lambda: host.beats >= before + 3)
        return asked.reason

    async with fake_bide() as bide:
        async with behind(bide, handle, tmp_path, heartbeat_s=0.1, grace_s=10.0) as host:
            sent = asyncio.create_task(send(host, queue_id="q-1"))
            await host.until(lambda: host.active == 1)
        assert text_of(await sent) == "shutdown"


async def test_an_agent_that_starts_again_shows_the_token_it_was_told(tmp_path: Path) -> None:
    async def handle(_message: Message, _session: Session) -> str:
        return "done"

    boots = []
    async with fake_bide() as bide:
        for _ in range(2):
            async with behind(bide, handle, tmp_path) as host:
                boots.append(host.boot_id)
        assert [one.token for one in bide.registrations] == ["enrol", "own-1"]
    assert len(set(boots)) == 2


async def test_an_agent_goes_on_while_bide_is_away(tmp_path: Path) -> None:
    """A-A-03: beats are tried again, each time later; the turn does not notice."""
    steps = Steps()

    async def handle(_message: Message, _session: Session) -> str:
        async with steps.turn():
            await steps.go_on.wait()
            return "done"

    async with fake_bide() as bide, behind(bide, handle, tmp_path, heartbeat_s=0.05) as host:
        sent = asyncio.create_task(send(host, queue_id="q-1"))
        await steps.began.wait()
        bide.broken = [0, 0, 503, 500]
        await host.until(lambda: not bide.broken)
        steps.go_on.set()
        assert text_of(await sent) == "done"
        beats = host.beats
        await host.until(lambda: host.beats > beats)


async def test_a_lag_is_the_longer_of_the_last_echo_and_the_one_that_is_out() -> None:
    lag = Lag(asyncio.get_running_loop())
    lag.ask()
    time.sleep(0.5)  # noqa: ASYNC251 - to block the loop is the case
    assert lag.seconds >= 0.5
    await asyncio.sleep(0)
    assert lag.seconds >= 0.5
    lag.ask()
    await asyncio.sleep(0)
    assert lag.seconds < 0.5


async def test_a_heart_that_stumbles_over_its_own_disk_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has thought of costs a pause: a thread that died would leave an agent that only looks alive."""
    monkeypatch.setattr("bide_agent.runtime.pulse.RETRY_MAX_S", 0.01)

    async def handle(_message: Message, _session: Session) -> str:
        return "done"

    full = [OSError("No space left on device")]
    keep = Tokens.keep

    def keeps(tokens: Tokens, own: str) -> None:
        if full:
            raise full.pop()
        keep(tokens, own)

    monkeypatch.setattr(Tokens, "keep", keeps)
    async with fake_bide(issues=["own-1", "own-1"]) as bide, behind(bide, handle, tmp_path) as host:
        assert host.registered
        assert len(bide.registrations) == 2
