"""An original caller: standard library, no `jsonrpc`, no A2A-Version header, no `blocking`.

    export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
    python examples/callers/seed.py <workspace> <text>

An idle agent answers in the same call (200). For a busy one Bide keeps the message (202 with `queued` and `queue_id`);
then the caller asks /queue/<queue_id> at the pace of Retry-After until the message has ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from email.message import Message
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

BIDE, TOKEN = os.environ["BIDE"], os.environ["TOKEN"]
CALLER = "lead"
COME_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def main(workspace: str, text: str) -> None:
    status, headers, said = send(workspace, text)
    if said.get("queued"):
        print(f"kept: {said['queue_id']}, {said['queue_depth']} waiting")
        item = ended(said["queue_id"], pace_s(headers))
        print(f"{item['status']}: {text_of(item['answer'])}")
    elif status == HTTPStatus.OK and "result" in said:
        print(f"answered: {text_of(said)}")
    else:
        sys.exit(f"refused: {status} {said}")


def send(workspace: str, text: str) -> tuple[int, Message, dict[str, Any]]:
    """Send until Bide has it. The same messageId is the same message, so sending again is safe."""
    message = {"role": "user", "messageId": str(uuid.uuid4()), "parts": [{"type": "text", "text": text}]}
    request = {"method": "message/send", "params": {"message": message}}
    told: dict[str, str] = {}
    while True:
        status, headers, said = call("POST", f"/workspaces/{workspace}/a2a", request, told)
        if status not in COME_AGAIN:
            return status, headers, said
        if "X-Queue-Id" in headers:  # Bide cannot say whether it has the message: its id back says which one it is
            told["X-Queue-Id"] = headers["X-Queue-Id"]
        time.sleep(pace_s(headers))


def ended(queue_id: str, wait_s: float) -> dict[str, Any]:
    """Poll until the message is neither waiting nor with its agent."""
    while True:
        time.sleep(wait_s)
        status, headers, item = call("GET", f"/queue/{queue_id}")
        wait_s = pace_s(headers)
        if status == HTTPStatus.OK and item["status"] not in ("queued", "dispatched"):
            return item
        if status != HTTPStatus.OK and status not in COME_AGAIN:
            sys.exit(f"refused: {status} {item}")
        print(f"{item.get('status', status)}: {item.get('why') or item.get('detail') or 'its agent has it'}")


def pace_s(headers: Message) -> float:
    return float(headers.get("Retry-After", "2"))


def text_of(answer: dict[str, Any] | None) -> str:
    """The text of a JSON-RPC answer: a Message's parts, or those of a Task's artifacts."""
    result = (answer or {}).get("result", {})
    holders = [result, *result.get("artifacts", [])]
    return " ".join(part.get("text", "") for holder in holders for part in holder.get("parts", [])) or str(answer)


def call(
    method: str, path: str, body: dict[str, Any] | None = None, more: dict[str, str] | None = None
) -> tuple[int, Message, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Workspace-ID": CALLER, "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    request = Request(BIDE + path, data, headers | (more or {}), method=method)
    try:
        with urlopen(request, timeout=330) as reply:
            return reply.status, reply.headers, json.load(reply)
    except HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
