"""Calls to agents that no caller asked for: a directive brought at once, a live forward's Task canceled.

Handlers only record what is to be done; the loop begins it, and each call is a task of its own, bounded in time and in
number, so that an agent that never answers holds up nobody (C-K11). Whatever comes of it is logged and counted, and
never raised: a directive is in the replies to heartbeats as well, and is said again every 10 s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from urllib.parse import urlsplit, urlunsplit

from services.proxy.copies import Copies
from services.proxy.copies.directives import shape
from services.proxy.copies.forwards import LiveForward
from services.proxy.decide import Workspace
from services.proxy.metrics import CONTROL_CALLS, SESSION_CANCELS
from services.proxy.settings import Settings
from shared.agents import AgentError, Agents, Limits, NotSent
from shared.facts import SessionDirective
from shared.loops import Loop
from shared.telemetry import log

CAPABILITY = "control"
"""What an agent declares that takes directives by a call."""
_IDLE_S = 60.0
_ANSWER_BYTES_MAX = 1 << 16
_RESULT_MAX = 100
_CLOSE_S = 1.0

Facts = dict[str, str | int]
"""What is logged beside the outcome."""

Authorize = Callable[[Workspace], str | None]
"""What we show to this agent as our Authorization."""


class Control:
    """Brings directives and cancels to agents."""

    def __init__(self, settings: Settings, copies: Copies, agents: Agents, authorize: Authorize) -> None:
        self._settings = settings
        self._copies = copies
        self._agents = agents
        self._authorize = authorize
        self._tasks: set[asyncio.Task[None]] = set()
        self._directing = 0
        self.loop = Loop("control", self.run_once)
        copies.uses.wake = self.loop.wake

    async def run_once(self) -> float:
        """Begin what may begin; the end of each call wakes the loop for the next."""
        uses = self._copies.uses
        while uses.to_cancel:
            self._begin(self._cancel(uses.to_cancel.pop(0)))
        free = self._settings.control_calls_max - self._directing
        for directive in self._copies.calls.take(free, time.time()):
            self._directing += 1
            self._begin(self._direct(directive))
        return _IDLE_S

    async def close(self) -> None:
        """Hang up: the directive is said again, and another replica reads it then."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)

    def _begin(self, call: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(call, name="control")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _direct(self, directive: SessionDirective) -> None:
        outcome, facts = "unreachable", Facts()
        try:
            outcome, facts = await self._bring(directive)
        except Exception as error:  # noqa: BLE001 - logged; one call's trouble is not the loop's
            facts = _trouble(error, directive.workspace_id)
        finally:
            self._directing -= 1
            self._copies.calls.done(directive.workspace_id)
            self.loop.wake()
        CONTROL_CALLS.labels(outcome).inc()
        if outcome != "skipped":
            log.info(
                "control_called",
                workspace_id=directive.workspace_id,
                session_id=directive.session_id,
                directive_id=str(directive.directive_id),
                kind=directive.kind.value,
                outcome=outcome,
                **facts,
            )

    async def _bring(self, directive: SessionDirective) -> tuple[str, Facts]:
        """Call the agent, if it takes calls and the directive is still worth one: what came of it."""
        workspace = self._copies.registry.find(directive.workspace_id)
        if workspace is None or not self._takes(workspace, directive):
            return "skipped", {}
        url = control_url(workspace.url, directive.kind.value)
        body = json.dumps(shape(directive)).encode()
        status, answer = await self._post(url, body, workspace, directive.session_id, self._settings.control_timeout_s)
        match status:
            case 200:
                self._copies.directives.acknowledge(directive.workspace_id, [directive.directive_id])
                return "taken", {"result": _result(answer)}
            case 409:
                return "not_now", {}
            case _:
                return "refused", {"status": status}

    def _takes(self, workspace: Workspace, directive: SessionDirective) -> bool:
        may = CAPABILITY in workspace.capabilities and bool(workspace.url) and not workspace.removed
        return may and self._copies.directives.wants(directive, workspace.incarnation, time.time())

    async def _cancel(self, forward: LiveForward) -> None:
        workspace = self._copies.registry.find(forward.workspace_id)
        if workspace is None or forward.task_id is None or not self._copies.uses.is_live(forward):
            return
        outcome, facts = "unreachable", Facts()
        try:
            body = cancel_body(forward.method, forward.task_id)
            modern = () if "/" in forward.method else ((b"a2a-version", b"1.0"),)
            status, _ = await self._post(
                workspace.url, body, workspace, forward.session_id, self._settings.cancel_timeout_s, *modern
            )
            outcome, facts = ("answered" if status == 200 else "refused"), {"status": status}  # noqa: PLR2004
        except Exception as error:  # noqa: BLE001 - as above
            forward.is_canceled = not isinstance(error, NotSent)  # said again, it is tried again
            facts = _trouble(error, forward.workspace_id)
        SESSION_CANCELS.labels(outcome).inc()
        log.info(
            "live_session_canceled",
            workspace_id=forward.workspace_id,
            session_id=forward.session_id,
            reason=forward.stop_reason,
            outcome=outcome,
            **facts,
        )

    async def _post(
        self,
        url: str,
        body: bytes,
        workspace: Workspace,
        session_id: str,
        timeout_s: float,
        *more: tuple[bytes, bytes],
    ) -> tuple[int, bytes]:
        headers = [(b"content-type", b"application/json"), (b"x-bide-session", session_id.encode()), *more]
        authorization = self._authorize(workspace)
        if authorization is not None:
            headers.append((b"authorization", authorization.encode()))
        async with asyncio.timeout(timeout_s):
            exchange = await self._agents.send(url, body, headers, limits=Limits(timeout_s, timeout_s, timeout_s))
            async with exchange:
                return exchange.status, await exchange.read(_ANSWER_BYTES_MAX)


def _trouble(error: Exception, workspace_id: str) -> Facts:
    if not isinstance(error, TimeoutError | AgentError):
        log.exception("control_failed", workspace_id=workspace_id)
    return {"error": f"{type(error).__name__}: {error}"[:200]}


def control_url(url: str, kind: str) -> str:
    """Where an agent with this URL takes directives."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/control/{kind}", "", ""))


def cancel_body(method: str, task_id: str) -> bytes:
    """The request to cancel a Task, in the dialect of the message that began it."""
    named = "tasks/cancel" if "/" in method else "CancelTask"
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": named, "params": {"id": task_id}}).encode()


def _result(answer: bytes) -> str:
    """The short word that the agent answered with."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    result = said.get("result") if isinstance(said, dict) else None
    return result[:_RESULT_MAX].encode("ascii", "replace").decode() if isinstance(result, str) else ""
