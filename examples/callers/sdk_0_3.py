"""A caller with the official a2a-sdk 0.3.x, which speaks A2A 0.3.

    python -m venv /tmp/sdk && /tmp/sdk/bin/pip install --require-hashes -r examples/callers/sdk-0.3.lock
    export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
    /tmp/sdk/bin/python examples/callers/sdk_0_3.py <workspace> <text>

Nothing in it is Bide's but the address: the card is found under the workspace, and a busy agent looks like a slow one,
whose Task is `submitted` at first. `polling` says that the caller would rather ask than hold the line.
"""

import asyncio
import os
import sys

import httpx
from a2a.client import ClientConfig, ClientFactory, create_text_message_object
from a2a.types import Message, Task, TaskQueryParams, TaskState
from a2a.utils import get_artifact_text, get_message_text

BIDE, TOKEN = os.environ["BIDE"], os.environ["TOKEN"]
POLL_S = 1.0
UNDER_WAY = (TaskState.submitted, TaskState.working)


async def main(workspace: str, text: str) -> None:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        config = ClientConfig(httpx_client=http, streaming=False, polling=True)
        client = await ClientFactory.connect(f"{BIDE}/workspaces/{workspace}", config)
        async for answer in client.send_message(create_text_message_object(content=text)):
            if isinstance(answer, Message):
                print(f"answered: {get_message_text(answer)}")
                continue
            task, _update = answer
            show(task)
            while task.status.state in UNDER_WAY:
                await asyncio.sleep(POLL_S)
                task = await client.get_task(TaskQueryParams(id=task.id))
                show(task)


def show(task: Task) -> None:
    text = " ".join(get_artifact_text(artifact) for artifact in task.artifacts or [])
    print(f"{task.status.state.value}: {task.id} {text}".rstrip())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
