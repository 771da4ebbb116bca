"""An agent of the official a2a-sdk 1.x: its `AgentExecutor` as it is, with our runtime in place of the SDK's server.

python -m venv /tmp/sdk && /tmp/sdk/bin/pip install --no-deps --require-hashes \
        -r examples/callers/sdk-1.0.lock -r examples/agents/runtime.lock
export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
PYTHONPATH=. /tmp/sdk/bin/python examples/agents/executor.py <workspace> [seconds per word]
"""

from __future__ import annotations

import asyncio
import os
import sys

from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.tasks import TaskUpdater
from a2a.types import Part

from bide_agent import serve


class Shouter(AgentExecutor):
    """Says each word again, louder, as soon as it is done."""

    def __init__(self, work_s: float) -> None:
        self.work_s = work_s

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        session = context.call_context.state["bide_session"]
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.start_work()
        for word in context.get_user_input().split():
            await asyncio.sleep(self.work_s)  # the tool call
            await updater.add_artifact([Part(text=f"{word.upper()} ")])
            await session.checkpoint()  # ends the turn here, if Bide asks for that
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Nothing is left to tidy up: `execute` has been canceled."""


def main(workspace: str, work_s: str = "0.3") -> None:
    options = {"workspace": workspace, "bide": os.environ["BIDE"], "token": os.environ["TOKEN"], "heartbeat_s": 2.0}
    serve(Shouter(float(work_s)), **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
