"""One agent on trial: sends it what Bide would send, and reads what comes back as Bide would."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from bide_agent.calls import Dialect
from bide_agent.check.registry import Registry
from bide_agent.client import Reply, UnreachableError, request

TURN_MAX_S = 300.0
LONG_ENOUGH_S = 1.0
"""A turn shorter than this shows nothing of what happens during one."""
PROMPT_S = 2.0
"""Within this a refusal comes, and a beat after what it tells of."""
FINAL = {"completed", "failed", "canceled", "rejected", "input-required", "auth-required"}
METHODS = {
    (Dialect.V03, "send"): "message/send",
    (Dialect.V03, "stream"): "message/stream",
    (Dialect.V03, "cancel"): "tasks/cancel",
    (Dialect.V10, "send"): "SendMessage",
    (Dialect.V10, "stream"): "SendStreamingMessage",
    (Dialect.V10, "cancel"): "CancelTask",
}


class Verdict(Enum):
    """What a check comes to."""

    PASS = "pass"  # noqa: S105 - a word of the report
    FAIL = "fail"
    SKIP = "skip"
    """It could not be seen, or is something that an agent may leave out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    reason: str
    name: str = ""


def passed(reason: str) -> Finding:
    return Finding(Verdict.PASS, reason)


def failed(reason: str) -> Finding:
    return Finding(Verdict.FAIL, reason)


def skipped(reason: str) -> Finding:
    return Finding(Verdict.SKIP, reason)


@dataclass(frozen=True, slots=True)
class Said:
    """What came back from a message. `took_s` is from the first byte sent to the last one read."""

    reply: Reply | None
    took_s: float
    trouble: str = ""
    ended_at: float = field(default_factory=time.monotonic)

    @property
    def result(self) -> dict[str, Any]:
        found = self.reply.json().get("result") if self.reply else None
        found = found if isinstance(found, dict) else {}
        inner = found.get("task", found.get("message"))
        return inner if isinstance(inner, dict) else found

    @property
    def error(self) -> dict[str, Any]:
        found = self.reply.json().get("error") if self.reply else None
        return found if isinstance(found, dict) else {}

    @property
    def mark(self) -> str | None:
        """`data.code` of an error: busy or preempted."""
        data = self.error.get("data")
        return data.get("code") if isinstance(data, dict) else None

    @property
    def state(self) -> str:
        status = self.result.get("status")
        said = str(status.get("state", "")) if isinstance(status, dict) else ""
        return said.lower().removeprefix("task_state_").replace("_", "-")

    @property
    def text(self) -> str:
        holders = [self.result, *self.result.get("artifacts", [])]
        parts = [part for holder in holders if isinstance(holder, dict) for part in holder.get("parts", [])]
        return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))

    @property
    def is_answer(self) -> bool:
        """A Message, or a Task that has ended."""
        return "parts" in self.result or self.state in FINAL

    @property
    def gave_up(self) -> bool:
        return self.state == "canceled" or self.mark == "preempted"

    def __str__(self) -> str:
        if self.reply is None:
            return self.trouble
        what = f"error {self.error.get('code')} {self.mark or ''}".strip() if self.error else self.state or "an answer"
        return f"{self.reply.status} with {what if self.reply.body else 'nothing'} after {self.took_s:.2f} s"


@dataclass(slots=True)
class Trial:
    """An agent, the registry that it sits behind, and how long its turns take."""

    url: str
    registry: Registry
    text: str
    dialect: Dialect = Dialect.V03
    card: dict[str, Any] = field(default_factory=dict)
    turn_s: float = 0.0

    @property
    def has_control(self) -> bool:
        return "control" in self.registry.registration.get("capabilities", ())

    def body(self, verb: str, **params: Any) -> bytes:
        method = METHODS[self.dialect, verb]
        return json.dumps({"jsonrpc": "2.0", "id": str(uuid.uuid4()), "method": method, "params": params}).encode()

    def message(self, verb: str = "send", **more: Any) -> bytes:
        is_03 = self.dialect is Dialect.V03
        part = {"kind": "text", "text": self.text} if is_03 else {"text": self.text}
        said = {"messageId": str(uuid.uuid4()), "parts": [part], "role": "user" if is_03 else "ROLE_USER"}
        return self.body(verb, message=said, **more)

    async def send(
        self, body: bytes | None = None, *, queue_id: str = "", delivery: int = 1, token: str | None = None
    ) -> Said:
        """Deliver a message, or call something else; come back with whatever came."""
        headers = {"content-type": "application/json", "x-bide-hops": "1"}
        if queue_id:
            session = f"{queue_id}:{delivery}"
            headers |= {"x-queue-id": queue_id, "x-bide-delivery": str(delivery), "x-bide-session": session}
        shown = self.registry.delivery if token is None else token
        if shown:
            headers["authorization"] = f"Bearer {shown}"
        began_at = time.monotonic()
        try:
            reply = await request(
                "POST", self.url, self.message() if body is None else body, headers=headers, timeout_s=TURN_MAX_S
            )
        except UnreachableError as error:
            return Said(None, time.monotonic() - began_at, str(error))
        return Said(reply, time.monotonic() - began_at)

    @asynccontextmanager
    async def turn(self, queue_id: str) -> AsyncIterator[asyncio.Task[Said]]:
        """A message that is being worked on; at the end of the block its answer has been waited for."""
        sent = asyncio.create_task(self.send(queue_id=queue_id))
        await asyncio.wait({sent}, timeout=min(0.5, self.turn_s / 4))  # until it has surely arrived
        try:
            yield sent
        finally:
            await asyncio.wait({sent}, timeout=TURN_MAX_S)

    async def direct(self, kind: str, session_id: str, deadline: str) -> tuple[dict[str, Any], Said | None]:
        """Give a directive as Bide would: in replies to beats, and by a call where it declares `control`."""
        one = {"id": str(uuid.uuid4()), "kind": kind, "reason": "ceiling", "session_id": session_id}
        directive = {**one, "deadline": deadline}
        self.registry.directives = [directive]
        if not self.has_control:
            return directive, None
        called = Trial(f"{self.url.rstrip('/')}/control/{kind}", self.registry, self.text)
        return directive, await called.send(json.dumps(directive).encode())


def too_short(trial: Trial) -> Finding:
    return skipped(f"a turn takes {trial.turn_s:.2f} s; to see this, let it take some seconds (--text)")
