"""The third story: an agent is said to be dead and is not; another one dies in the middle of a message.

At 08:33:46 a healthy agent answered PONG, and one failed call and one flaky look later it was recycled. Here the flake
restarts nothing. Then an agent is killed -9: that is noticed, it is started again, and its message is delivered.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bide_agent import Options, running
from deploy.demo.operator import Operator
from deploy.demo.plane import Plane, plane
from shared.addresses import AddressRules
from shared.agents import Agents

TURN_S = 3.0
LIMIT_S = 30.0
_GLANCE_S = 0.25
_HEALTHY = "writer"
_MORTAL = "planner"


async def tell(proxy: str, admin_token: str, data_dir: Path) -> bool:
    """Tell the story; True when the flake restarted nothing and the message came through the death."""
    client = Agents(AddressRules(allow_loopback=True))
    bide = Operator(client, proxy, admin_token)
    try:
        spared = await _flake(bide, Options(workspace=_HEALTHY, bide=proxy, token=admin_token, heartbeat_s=1.0))
        delivered = await _death(bide, data_dir, _line(proxy, admin_token, data_dir))
    finally:
        await client.close()
    return spared and delivered


async def _flake(bide: Operator, options: Options) -> bool:
    """One look at a healthy agent says that it has stopped."""
    print(f"\nA control plane runs the {_HEALTHY}, which beats every second. Once, it says that it has stopped.\n")
    with plane(lambda _name: "another one") as engine:
        engine.running[_HEALTHY] = "the first one"
        async with running(options) as agent:
            await agent.until(lambda: agent.beats > 1)
            await bide.call("PATCH", f"/workspaces/{_HEALTHY}", {"runtime": engine.runtime(_HEALTHY)})
            await _until(lambda: _is(engine.looks[_HEALTHY] > 1))
            engine.claims[_HEALTHY].append("stopped")
            await _watch(bide, _HEALTHY, lambda: _is_over(bide, engine))
            restarts = len(engine.starts(_HEALTHY))
        await bide.call("POST", f"/workspaces/{_HEALTHY}/remove")
    print(f"\n  The next look saw it run: {restarts} restarts.\n", flush=True)
    return restarts == 0


async def _is_over(bide: Operator, engine: Plane) -> bool:
    """The lie has been told, and what came of it is over."""
    if engine.claims[_HEALTHY]:
        return False
    verdicts = [each["verdict"] for each in (await bide.call("GET", f"/workspaces/{_HEALTHY}/life"))["evidence"]]
    return "suspect" in verdicts and verdicts[0] != "suspect"


async def _death(bide: Operator, data_dir: Path, command: list[str]) -> bool:
    """An agent of the operator's file is killed while it works on a message that Bide delivered."""
    print(f"The {_MORTAL} stands in the operator's file, so liveness starts it. It gets a message, needs {TURN_S:g} s "
          "for it, and is killed -9 meanwhile.\n")  # fmt: skip
    entry = f"[agents.{_MORTAL}]\ncommand = {json.dumps(command)}\ncwd = {json.dumps(str(Path.cwd()))}\n"
    (data_dir / "agents.toml").write_text(entry, encoding="utf-8")
    await bide.call("POST", "/registry/register", {"id": _MORTAL, "url": ""})
    settings = {"runtime": {"driver": "process"}, "admission": "queue_first"}
    await bide.call("PATCH", f"/workspaces/{_MORTAL}", settings)
    await _until(lambda: _is_up(bide))
    promise = await bide.send(_MORTAL, "the-plan", "make a plan")
    record = _record(data_dir)
    await _until(lambda: _is(_turns(record, "begin") == 1))
    killed_at = time.monotonic()
    os.killpg(json.loads((data_dir / "agents" / f"{_MORTAL}.json").read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
    noted: dict[str, float] = {}

    async def is_delivered() -> bool:
        restart = (await bide.call("GET", f"/workspaces/{_MORTAL}/life"))["restarts"][0]
        if restart["reason"] == "exited":
            noted.setdefault("noticed", time.monotonic() - killed_at)
            if restart["result"] == "started":
                noted.setdefault("restarted", time.monotonic() - killed_at)
        if _turns(record, "end"):
            noted.setdefault("delivered", time.monotonic() - killed_at)
        return "delivered" in noted

    await _watch(bide, _MORTAL, is_delivered)
    item = await _ended(bide, promise["queue_id"])
    await bide.call("POST", f"/workspaces/{_MORTAL}/remove")
    said = ", ".join(f"{what} after {at:.1f} s" for what, at in noted.items())
    print(f"\n  Killed -9; {said}. The message: {item['status']}, {item['attempts']} attempt lost.\n", flush=True)
    return set(noted) == {"noticed", "restarted", "delivered"} and item["status"] == "completed"


def _line(proxy: str, admin_token: str, data_dir: Path) -> list[str]:
    return [
        sys.executable, "-m", "bide_agent", "--workspace", _MORTAL, "--bide", proxy, "--token", admin_token,
        "--heartbeat-s", "1", "--work-s", f"{TURN_S:g}", "--record", str(_record(data_dir)),
        "--state-dir", str(data_dir),
    ]  # fmt: skip


def _record(data_dir: Path) -> Path:
    return data_dir / f"{_MORTAL}.jsonl"


def _turns(record: Path, event: str) -> int:
    """How many turns have begun, or ended, in all lives."""
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    return sum(json.loads(line)["event"] == event for line in text.splitlines())


async def _watch(bide: Operator, name: str, is_over: Callable[[], Awaitable[bool]]) -> None:
    """Print what an operator sees whenever it changes, until it is over."""
    print(f"  seconds  what GET /workspaces/{name} says")
    begun, last = time.monotonic(), ""
    while time.monotonic() - begun < LIMIT_S:
        over = await is_over()
        shown = await bide.call("GET", f"/workspaces/{name}")
        words = f"{shown['status']}: {shown['status_reason']}"
        if words != last:
            print(f"  {time.monotonic() - begun:7.1f}  {words}", flush=True)
            last = words
        if over:
            return
        await asyncio.sleep(_GLANCE_S)  # the table's pace


async def _ended(bide: Operator, queue_id: str) -> dict[str, Any]:
    item: dict[str, Any] = {}

    async def is_ended() -> bool:
        item.update(await bide.call("GET", f"/queue/{queue_id}"))
        return item["status"] not in {"queued", "dispatched"}

    await _until(is_ended)
    return item


async def _is_up(bide: Operator) -> bool:
    shown = await bide.call("GET", f"/workspaces/{_MORTAL}")
    return bool(shown["status"] == "online" and shown["url"])


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Come back when it holds, or when nobody would wait any longer: the accounts say what was missing."""
    ends_at = time.monotonic() + LIMIT_S
    while time.monotonic() < ends_at:
        if await holds():
            return
        await asyncio.sleep(0.1)  # how often it is looked at


async def _is(value: bool) -> bool:
    return value
