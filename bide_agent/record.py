"""What an agent has received: kept in memory, and as JSON lines from which overlap and order can be computed.

One line per event, each written by one `write` to a file opened with O_APPEND, so that several agents may share it:

    begin      a turn began; `active` counts it
    end        it is over, `ended_at` and `outcome` are set; `active` no longer counts it. A dead agent writes none
    refused    no turn began; `outcome` says why (busy, bare_503, wrong_token, unreadable)
    directive  a directive came for the first time, or its `result` is another one than before: `directive` is its id,
               and `kind`, `reason`, `session_id`, `deadline` are as it said them. No line of a message

`started_at` and `ended_at` are seconds of the machine's monotonic clock, comparable between processes of one boot. The
slot is free before the answer leaves, so what one caller sends after an answer never overlaps the turn that gave it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BODY_MAX = 64 * 1024
"""Bodies and texts up to this length are written out; of longer ones the hash has to do."""


@dataclass(slots=True, kw_only=True)
class Received:
    """One message as it came in. Nothing is deduped: the same message twice is two of these."""

    workspace: str
    body: bytes
    message_id: str | None = None
    queue_id: str | None = None
    delivery: int | None = None
    session: str | None = None
    hops: int | None = None
    text: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    active: int = 0
    outcome: str | None = None

    def line(self, event: str) -> dict[str, Any]:
        short = len(self.body) <= BODY_MAX
        return {
            "event": event,
            "at": _now(),
            "workspace": self.workspace,
            "message_id": self.message_id,
            "queue_id": self.queue_id,
            "delivery": self.delivery,
            "session": self.session,
            "hops": self.hops,
            "text": self.text[:BODY_MAX],
            "body_sha256": hashlib.sha256(self.body).hexdigest(),
            "body_b64": base64.b64encode(self.body).decode() if short else None,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "active": self.active,
            "outcome": self.outcome,
        }


def received(workspace: str, body: bytes, headers: Mapping[str, str]) -> Received:
    """What Bide says of a message in its headers; the message itself is read later."""
    return Received(
        workspace=workspace,
        body=body,
        queue_id=headers.get("x-queue-id"),
        delivery=_number(headers.get("x-bide-delivery")),
        session=headers.get("x-bide-session"),
        hops=_number(headers.get("x-bide-hops")),
    )


def _now() -> dict[str, Any]:
    return {"monotonic": time.monotonic(), "wall": datetime.now(UTC).isoformat()}


def _number(value: str | None) -> int | None:
    return int(value) if value and value.isascii() and value.isdigit() else None


@dataclass(slots=True)
class Record:
    """The lists, and the file if there is one. `on_news` is called after every event."""

    path: Path | None
    on_news: Callable[[], None]
    begun: list[Received] = field(default_factory=list)
    refused: list[Received] = field(default_factory=list)
    _file: int | None = None

    def __enter__(self) -> Self:
        if self.path:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def begin(self, one: Received, *, active: int) -> None:
        one.started_at, one.active = time.monotonic(), active
        self.begun.append(one)
        self._write(one.line("begin"))

    def end(self, one: Received, *, active: int, outcome: str) -> None:
        one.ended_at, one.active, one.outcome = time.monotonic(), active, outcome
        self._write(one.line("end"))

    def refuse(self, one: Received, *, active: int, outcome: str) -> None:
        one.active, one.outcome = active, outcome
        self.refused.append(one)
        self._write(one.line("refused"))

    def directive(self, workspace: str, directive: Mapping[str, Any], result: str) -> None:
        said = {name: directive.get(name) for name in ("kind", "reason", "session_id", "deadline")}
        named = {"event": "directive", "at": _now(), "workspace": workspace, "directive": directive["id"]}
        self._write({**named, **said, "result": result})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, json.dumps(line).encode() + b"\n")
        self.on_news()
