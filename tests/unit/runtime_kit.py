"""A handler behind the runtime, a Bide that is only an edge, and a caller: for tests without the stack."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bide_agent import Host, hosted
from bide_agent.client import Reply, request
from bide_agent.runtime.words import Handler
from tests.unit.test_bide_agent_heart import FakeBide, serving

URI = "urn:bide:queue:1"
SESSION = "q-1:1"
TICK = {"kind": "tick", "schedule_id": "s-1", "fire_at": "2026-11-29T12:00:00Z", "merged_count": 1}


async def send(
    host: Host, text: str = "hello", *, queue_id: str | None = None, method: str = "message/send", **more: Any
) -> Reply:
    """A message as Bide would deliver it; header names with `_` for `-`, `params`, and the message's `metadata`."""
    params, context_id, metadata = more.pop("params", {}), more.pop("context_id", None), more.pop("metadata", None)
    message: dict[str, Any] = {"role": "user", "messageId": "m-1", "parts": [{"kind": "text", "text": text}]}
    if context_id:
        message["contextId"] = context_id
    if metadata:
        message["metadata"] = metadata
    body = {"jsonrpc": "2.0", "id": "r-1", "method": method, "params": {"message": message, **params}}
    headers = {"authorization": "Bearer delivery", **{name.replace("_", "-"): said for name, said in more.items()}}
    if queue_id:
        headers |= {"x-queue-id": queue_id, "x-bide-session": headers.get("x-bide-session", SESSION)}
    return await request("POST", host.url, json.dumps(body).encode(), headers=headers, timeout_s=60)


async def ask(host: Host, method: str, task_id: str) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"id": task_id}}
    reply = await request(
        "POST", host.url, json.dumps(body).encode(), headers={"authorization": "Bearer delivery"}, timeout_s=60
    )
    return reply.json()


async def direct(host: Host, kind: str, reason: str = "ceiling", **more: Any) -> tuple[int, Any]:
    given = {"id": f"{kind}-{reason}", "kind": kind, "reason": reason, "session_id": SESSION, **more}
    headers = {"authorization": "Bearer delivery"}
    reply = await request("POST", f"{host.url}/control/{kind}", json.dumps(given).encode(), headers=headers)
    return reply.status, reply.json().get("result")


def task_of(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = reply.json()["result"]
    return found


def text_of(reply: Reply) -> str:
    return text_in(task_of(reply))


def text_in(task: dict[str, Any]) -> str:
    return "".join(part["text"] for artifact in task.get("artifacts", []) for part in artifact["parts"])


def events(reply: Reply) -> list[dict[str, Any]]:
    lines = [line for line in reply.body.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: "))["result"] for line in lines]


@asynccontextmanager
async def behind(bide: FakeBide, handle: Handler, folder: Path, **options: Any) -> AsyncIterator[Host]:
    """An agent that has registered at a fake Bide."""
    given: dict[str, Any] = {
        "workspace": "w1", "bide": bide.url, "token": "enrol", "state_dir": folder, "heartbeat_s": 600.0,
        "grace_s": 0.0, "stop_grace_s": 2.0, **options,
    }  # fmt: skip
    async with hosted(handle, **given) as host:
        await host.until(lambda: host.beats >= 1)
        yield host


@asynccontextmanager
async def alone(handle: Handler, folder: Path, **options: Any) -> AsyncIterator[Host]:
    """An agent that belongs to nobody."""
    given: dict[str, Any] = {"workspace": "w1", "state_dir": folder, "grace_s": 0.0, "stop_grace_s": 2.0, **options}
    async with hosted(handle, **given) as host:
        yield host


@asynccontextmanager
async def fake_bide(**facts: Any) -> AsyncIterator[FakeBide]:
    async with serving(FakeBide(**facts)) as bide:
        yield bide


class Steps:
    """A handler that works in steps, each of which a test lets through."""

    def __init__(self) -> None:
        self.runs = 0
        self.active_max = 0
        self._active = 0
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        self.runs += 1
        self._active += 1
        self.active_max = max(self.active_max, self._active)
        self.began.set()
        try:
            yield
        finally:
            self._active -= 1
