"""An agent without any library: A2A 0.3 on the standard library's HTTP server, one turn at a time.

    export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
    python examples/agents/plain.py <workspace> [seconds per turn]

What Bide asks of an agent stands here: register, beat, let in nobody but Bide, refuse when busy with a 503 that says
so, and know a message that is delivered a second time.
"""

from __future__ import annotations

import hmac
import json
import os
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

BIDE, TOKEN = os.environ["BIDE"], os.environ["TOKEN"]
HEARTBEAT_S = 5.0
REMEMBERED = 1000


class Agent:
    """What it is, and what it does."""

    def __init__(self, workspace: str, url: str, work_s: float) -> None:
        self.workspace = workspace
        self.url = url
        self.work_s = work_s
        self.boot_id = str(uuid.uuid4())  # another one each time: Bide sees that the process is new
        self.slot = threading.Lock()
        self.changed = threading.Event()
        self.delivery_token: str | None = ""  # not told yet; None: this Bide shows nothing
        self.answers: dict[str, dict[str, Any]] = {}

    def answer(self, text: str) -> dict[str, Any]:
        """The turn: here is where a real agent thinks."""
        time.sleep(self.work_s)
        return {
            "kind": "message",
            "role": "agent",
            "messageId": str(uuid.uuid4()),
            "parts": [{"kind": "text", "text": f"you said: {text}"}],
        }

    def beat(self) -> None:
        """Register, then beat; at once where a turn begins or ends. What fails is tried again with the next beat."""
        own_token = None
        while True:
            self.changed.clear()
            try:
                own_token = own_token or self.register()
                alive = {
                    "workspace_id": self.workspace,
                    "active_tasks": int(self.slot.locked()),
                    "boot_id": self.boot_id,
                }
                post("/registry/heartbeat", alive, own_token)
            except HTTPError as error:
                with error:
                    log(f"bide says {error.code}: {error.read().decode()}")
                if error.code in (401, 404):
                    own_token = None  # Bide does not know this token, or this workspace, any more
            except OSError as error:
                log(f"bide cannot be reached: {error}")
            self.changed.wait(HEARTBEAT_S)

    def register(self) -> str:
        """Enrol, and return the token for the beats. What Bide will show when it calls is told here too."""
        card = {
            "name": self.workspace,
            "description": "Says what you said.",
            "version": "1",
            "protocolVersion": "0.3.0",
            "url": self.url,
            "preferredTransport": "JSONRPC",
            "capabilities": {"streaming": False},
            "defaultInputModes": ["text/plain"],
            "defaultOutputModes": ["text/plain"],
            "skills": [{"id": "echo", "name": "Echo", "description": "Says what you said.", "tags": ["echo"]}],
        }
        about = {
            "id": self.workspace,
            "url": self.url,
            "agent_card": card,
            "boot_id": self.boot_id,
            "max_concurrent_tasks": 1,
            "heartbeat_interval_s": HEARTBEAT_S,
            "capabilities": ["refuses_when_busy"],
        }
        told = post("/registry/register", about, TOKEN)
        self.delivery_token = told["delivery_token"]
        log(f"registered {self.workspace} at {self.url}")
        return str(told["auth_token"])


class Door(BaseHTTPRequestHandler):
    """The agent's one route: POST / takes JSON-RPC."""

    protocol_version = "HTTP/1.1"
    agent: Agent

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        shown, token = self.headers.get("Authorization", ""), self.agent.delivery_token
        if token == "":
            self.reply(
                503, {"detail": "This agent has not registered yet, and cannot know who calls."}, {"Retry-After": "1"}
            )
            return
        if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            self.reply(401, {"detail": "Only Bide may call this agent."})
            return
        request = json.loads(body)
        if request["method"] != "message/send":
            self.fail(request, 200, {"code": -32601, "message": "This agent knows message/send."})
            return
        self.message(request, self.headers.get("X-Queue-Id", ""))

    def message(self, request: dict[str, Any], queue_id: str) -> None:
        agent = self.agent
        if not agent.slot.acquire(blocking=False):
            log(f"refused {queue_id}: busy")
            busy = {"code": -32603, "message": "busy: come again later", "data": {"code": "busy"}}
            self.fail(request, 503, busy, {"Retry-After": "1"})
            return
        try:
            result = agent.answers.get(queue_id)
            if result is None:  # else its answer was lost on the way, and it is delivered again
                agent.changed.set()
                text = " ".join(part.get("text", "") for part in request["params"]["message"]["parts"])
                log(f"working on {queue_id}: {text}")
                result = agent.answers[queue_id] = agent.answer(text)
                while len(agent.answers) > REMEMBERED:
                    del agent.answers[next(iter(agent.answers))]
        finally:
            agent.slot.release()  # before the answer leaves: its reader may send the next message at once
            agent.changed.set()
        self.reply(200, {"jsonrpc": "2.0", "id": request["id"], "result": result})

    def fail(
        self, request: dict[str, Any], status: int, error: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        self.reply(status, {"jsonrpc": "2.0", "id": request["id"], "error": error}, headers)

    def reply(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(raw), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Say nothing per request: the agent says what it does."""


def post(path: str, body: dict[str, Any], token: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    with urlopen(Request(BIDE + path, json.dumps(body).encode(), headers), timeout=10) as reply:
        said: dict[str, Any] = json.load(reply)
        return said


def log(line: str) -> None:
    print(line, flush=True)


def main(workspace: str, work_s: str = "0.3") -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        Door.agent = agent = Agent(workspace, f"http://127.0.0.1:{server.server_port}", float(work_s))
        threading.Thread(target=agent.beat, daemon=True).start()
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
