"""What is kept of an answer while it passes: the whole of a small one, the last events, the task that it names."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.proxy.forward.ending import TaskKnown
from shared.results import Kind, Result, read_result

JUDGED_BYTES_MAX = 1 << 16
"""An answer is held back until it is whole or this long: no agent says `busy` in more bytes."""
RECORDED_BYTES_MAX = 1 << 20
"""What is remembered of an answer for those who sent the same message meanwhile."""


@dataclass(slots=True)
class Tape:
    """What has been passed on, as long as it is not too much."""

    size: int = 0
    _pieces: list[bytes] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.size <= RECORDED_BYTES_MAX

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.is_whole:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def bytes(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


@dataclass(slots=True)
class LastEvent:
    """The end of a stream says whether the turn is over: its last events are enough, and only they are read."""

    _tail: bytes = b""

    def add(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-JUDGED_BYTES_MAX:]

    def read(self) -> Result:
        seen = Result(Kind.NOTHING)
        for event in self._tail.replace(b"\r\n", b"\n").split(b"\n\n")[-8:]:
            data = _data(event)
            if data:
                seen = seen.then(read_result(data))
        return seen


@dataclass(slots=True)
class FirstTask:
    """A stream is of one task, and its first event that names it says which: the rest is not read for it."""

    told: TaskKnown | None
    _rest: bytes = b""

    def add(self, chunk: bytes) -> None:
        if self.told is None:
            return
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = _data(event)
            task_id = read_result(data).task_id if data else None
            if task_id is not None:
                self.told(task_id)
                self.told = None
                return
        if len(self._rest) > RECORDED_BYTES_MAX:
            self.told = None


def _data(event: bytes) -> bytes:
    lines = (line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines)
