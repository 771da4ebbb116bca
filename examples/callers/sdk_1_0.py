"""A caller with the official a2a-sdk 1.x, which speaks A2A 1.0.

    python -m venv /tmp/sdk && /tmp/sdk/bin/pip install --require-hashes -r examples/callers/sdk-1.0.lock
    export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
    /tmp/sdk/bin/python examples/callers/sdk_1_0.py <workspace> <text>

Nothing in it is Bide's but the address: the card is found under the workspace, and a busy agent looks like a slow one,
whose Task is `submitted` at first. `polling` says that the caller would rather ask than hold the line.
"""

import asyncio
import os
import sys

import httpx
from a2a.client import ClientConfig, create_client
from a2a.helpers import get_artifact_text, get_message_text, new_text_message
from a2a.types import GetTaskRequest, Role, SendMessageRequest, Task, TaskState

BIDE, TOKEN = os.environ["BIDE"], os.environ["TOKEN"]
POLL_S = 1.0
UNDER_WAY = (TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_WORKING)


async def main(workspace: str, text: str) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        config = ClientConfig(httpx_client=http, streaming=False, polling=True)
        client = await create_client(f"{BIDE}/workspaces/{workspace}", config)
        request = SendMessageRequest(message=new_text_message(text, role=Role.ROLE_USER))
        async for answer in client.send_message(request):
            if answer.HasField("message"):
                print(f"answered: {get_message_text(answer.message)}")
                continue
            task = answer.task
            show(task)
            while task.status.state in UNDER_WAY:
                await asyncio.sleep(POLL_S)
                task = await client.get_task(GetTaskRequest(id=task.id))
                show(task)


def show(task: Task) -> None:
    text = " ".join(get_artifact_text(artifact) for artifact in task.artifacts)
    print(f"{TaskState.Name(task.status.state)}: {task.id} {text}".rstrip())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
