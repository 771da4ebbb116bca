"""Run by a Python that has an a2a-sdk, 0.3 or 1.x: executors behind the runtime, and what their callers read.

Prints one JSON line: what came of each text. No stack is needed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from a2a import types
from a2a.server.agent_execution import AgentExecutor
from a2a.server.tasks import TaskUpdater

from bide_agent import hosted
from bide_agent.client import request

TEXTS = ("message", "fail", "raise", "exit", "ask", "work")
IS_10 = not hasattr(types, "MessageSendParams")


def part(text: str) -> Any:
    return types.Part(text=text) if IS_10 else types.Part(root=types.TextPart(text=text))


class Executor(AgentExecutor):
    """Does what its text says."""

    def __init__(self) -> None:
        self.canceled = asyncio.Event()

    async def execute(self, context: Any, event_queue: Any) -> None:
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        text = context.get_user_input()
        await updater.start_work()
        if text == "message":
            await event_queue.enqueue_event(updater.new_agent_message([part("a message")]))
            return
        if text == "fail":
            await updater.failed(updater.new_agent_message([part("no such file")]))
            return
        if text == "raise":
            raise ValueError(text)
        if text == "exit":
            sys.exit(3)
        if text == "ask":
            await updater.requires_input(updater.new_agent_message([part("which one?")]))
            return
        await updater.add_artifact([part("one ")])
        if text == "stay":
            await asyncio.sleep(600)
        session = context.call_context.state["bide_session"]
        session.save([text])
        await session.checkpoint()
        await updater.add_artifact([part("two")])
        await updater.complete()

    async def cancel(self, context: Any, event_queue: Any) -> None:  # noqa: ARG002 - as the SDK calls it
        self.canceled.set()


async def main() -> None:
    executor = Executor()
    with tempfile.TemporaryDirectory() as folder:
        async with hosted(executor, workspace="w1", state_dir=Path(folder), grace_s=0.0) as host:
            said = {text: await send(host.url, text) for text in TEXTS}
            staying = asyncio.create_task(send(host.url, "stay"))
            await host.until(lambda: host.active == 1)
            stop = {"id": "d", "kind": "stop", "reason": "ceiling", "session_id": "stay"}
            await request("POST", f"{host.url}/control/stop", json.dumps(stop).encode())
            said["stay"] = await staying
            said["canceled"] = [executor.canceled.is_set(), host.active]
    sys.stdout.write(json.dumps(said) + "\n")


async def send(url: str, text: str) -> list[Any]:
    """The state, or the code of the error, and the text of an answer."""
    message = {"role": "user", "messageId": "m", "parts": [{"kind": "text", "text": text}]}
    body = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
    headers = {"x-queue-id": text, "x-bide-session": text}
    reply = (await request("POST", url, json.dumps(body).encode(), headers=headers, timeout_s=30)).json()
    if "error" in reply:
        return [reply["error"]["code"], reply["error"]["message"]]
    task = reply["result"]
    parts = [one["text"] for artifact in task.get("artifacts", []) for one in artifact["parts"]]
    note = task["status"].get("message", {}).get("parts", [])
    return [task["status"]["state"], "".join(parts) + "".join(one["text"] for one in note)]


asyncio.run(main())
