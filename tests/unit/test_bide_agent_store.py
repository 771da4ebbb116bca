"""What is kept of items on disk: bounded, and never worth an answer or a start."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bide_agent import Message, Session
from bide_agent.runner.command import Command
from bide_agent.runtime import parts
from bide_agent.runtime.store import STATE_BYTES_MAX, Store
from tests.unit.runtime_kit import alone, send, text_of

READ = Path("/proc/self/io")


def test_what_is_remembered_of_items_is_bounded(tmp_path: Path) -> None:
    with Store(tmp_path / "items.sqlite", remembered=3, bytes_max=100) as store:
        for number in range(5):
            store.keep_answer(f"q-{number}", f"t-{number}", {"n": number})
        assert [store.answer(f"q-{number}") for number in range(5)] == [None, None, {"n": 2}, {"n": 3}, {"n": 4}]
        assert store.answer_of_task("t-4") == {"n": 4}
        store.keep_answer("q-9", "t-9", {"n": "x" * 200})
        assert store.answer("q-9"), "the newest is kept, however large"
        assert store.answer("q-4") is None
        with pytest.raises(ValueError, match="bytes of state"):
            store.save("q-1", "x" * STATE_BYTES_MAX)
        with pytest.raises(TypeError):
            store.save("q-1", object())
    assert (tmp_path / "items.sqlite").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not READ.exists(), reason="what a process reads is said by Linux")
def test_saving_costs_the_same_however_much_is_kept(tmp_path: Path) -> None:
    """It is done in the agent's loop, between two tool calls: a trim that read all that is kept took 0.2 s."""
    with Store(tmp_path / "items.sqlite") as store:
        for number in range(60):
            store.save(f"q-{number}", "x" * 1_000_000)
        before = bytes_read()
        for step in range(5):
            store.save("q", {"step": step})
        read = bytes_read() - before
    print(f"five saves beside 60 MB read {read} bytes")
    assert read < 20_000_000, "not even once all"


def bytes_read() -> int:
    """By this process so far, from the page cache too."""
    return int(READ.read_text().split("rchar:")[1].split()[0])


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda raw: bytes(len(raw)),  # as after a power cut
    "half": lambda raw: raw[: len(raw) // 2],
    "a page": lambda raw: raw[:4096] + b"\xff" * 4096 + raw[8192:],
    "not ours": lambda _: b"my own notes, and long enough not to be a header" * 10,
}


@pytest.mark.parametrize("how", BREAKS)
async def test_a_broken_file_is_set_aside_and_the_agent_starts(tmp_path: Path, how: str) -> None:
    """It started no more; or it started, and could save nothing ever after."""
    path, runs = tmp_path / "w1/items.sqlite", []

    async def handle(message: Message, session: Session) -> str:
        runs.append(message.text)
        session.save(message.text)
        return message.text

    with Store(path) as store:
        for number in range(100):
            store.keep_answer(f"q-{number}", f"t-{number}", {"x": "y" * 1000})
    broken = BREAKS[how](path.read_bytes())
    path.write_bytes(broken)
    async with alone(handle, tmp_path) as host:
        texts = [text_of(await send(host, queue_id="q-1")) for _ in range(2)]
    assert (texts, runs) == (["hello", "hello"], ["hello"])
    assert path.with_name("items.sqlite.broken").read_bytes() == broken


async def test_an_answer_that_the_disk_does_not_take_is_not_worked_out_again(tmp_path: Path) -> None:
    runs = []

    async def handle(message: Message, _session: Session) -> str:
        runs.append(message.text)
        return "x" * 100_000

    async with alone(handle, tmp_path) as host:
        (pages,) = host._work.store._db.execute("PRAGMA page_count").fetchone()
        host._work.store._db.execute(f"PRAGMA max_page_count = {pages}")  # to SQLite this is a full disk
        replies = [await send(host, queue_id="q-1") for _ in range(3)]
        assert host._work.store.answer("q-1") is None
    assert {reply.body for reply in replies} == {replies[0].body}
    assert (text_of(replies[0]), runs) == ("x" * 100_000, ["hello"])


async def test_a_command_runs_where_nothing_can_be_saved(tmp_path: Path) -> None:
    async with alone(Command(arguments=["cat"]), tmp_path) as host:
        host._work.store._db.execute("PRAGMA query_only = 1")
        assert text_of(await send(host, queue_id="q-1")) == "hello"


def test_two_processes_may_have_one_folder(tmp_path: Path) -> None:
    """A twin, or the next one while the last one ends: both open it at once, and read what the other has kept."""
    path = tmp_path / "items.sqlite"
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(Store, (path, path))
    with one, other, ThreadPoolExecutor(2) as pool:
        kept = pool.map(
            lambda number: (one, other)[number % 2].keep_answer(f"q-{number}", f"t-{number}", {"n": number}), range(100)
        )
        assert all(kept)
        assert [one.answer(f"q-{number}") for number in range(100)] == [{"n": number} for number in range(100)]


async def test_an_answer_of_ten_megabytes_comes_again_as_it_was(tmp_path: Path) -> None:
    async def handle(_message: Message, session: Session) -> str:
        session.save("begun")
        return "x" * 10_000_000

    async with alone(handle, tmp_path) as host:
        first, again = [await send(host, queue_id="q-1") for _ in range(2)]
    assert len(text_of(first)) == 10_000_000
    assert again.body == first.body


async def test_what_has_no_letters_for_it_is_kept_too(tmp_path: Path) -> None:
    """A-Q-06: NUL, a lone surrogate, a name beyond ASCII."""
    odd = "\0 \ud800 \u202e \U0001f600"

    async def handle(message: Message, session: Session) -> str:
        session.save(message.text)
        return message.text

    async with alone(handle, tmp_path) as host:
        replies = [await send(host, odd, queue_id="q-ü", context_id="\ud800") for _ in range(2)]
    assert text_of(replies[0]) == odd
    assert replies[0].body == replies[1].body


def test_neighbouring_texts_are_one_and_other_parts_keep_their_places() -> None:
    """Chunks of a stream are no paragraphs."""
    chunks = [{"text": "token "}] * 3
    joined = parts.joined([*chunks, {"text": "x", "metadata": {}}, *chunks, {"data": 1}, {"data": 2}])
    said = {"text": "token token token "}
    assert joined == [said, {"text": "x", "metadata": {}}, said, {"data": 1}, {"data": 2}]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "items.sqlite").mkdir()
    with pytest.raises(OSError, match=r"items\.sqlite"):
        Store(tmp_path / "items.sqlite")
