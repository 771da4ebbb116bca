"""A message that goes straight to its agent: counted as in use from before its first byte until its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.proxy.api.evidence import Evidence
from services.proxy.api.message import Message
from services.proxy.api.outgoing import Addresser
from services.proxy.api.rendering import CallerSink
from services.proxy.api.wire import Request, own_id
from services.proxy.copies import Copies
from services.proxy.copies.bounds import bounds_of
from services.proxy.copies.forwards import LiveForward
from services.proxy.decide import Workspace
from services.proxy.forward import Ending, TaskKnown, as_stopped, forward_within
from services.proxy.metrics import FORWARDED, FORWARDS_RUNNING
from services.proxy.settings import Settings
from shared.agents import Agents
from shared.outcomes import Outcome

Changed = Callable[[str], None]
"""Told the workspace whose live forwards have changed."""

_COUNTED = {
    Outcome.BUSY: "busy",
    Outcome.NOT_DELIVERED: "not_delivered",
    Outcome.UNKNOWN: "unknown",
    Outcome.ACCEPTED: "accepted",
}
"""How a forward's end counts against capacity; everything else was answered."""


class Forwarding:
    """Sends live, bound to what that touches."""

    def __init__(
        self,
        settings: Settings,
        copies: Copies,
        *,
        agents: Agents,
        addresser: Addresser,
        changed: Changed,
        evidence: Evidence,
    ) -> None:
        self._settings = settings
        self._copies = copies
        self._agents = agents
        self._addresser = addresser
        self._changed = changed
        self._evidence = evidence

    async def forward(self, request: Request, message: Message, workspace: Workspace) -> Ending:
        hang_up = asyncio.timeout(None)
        live = LiveForward(
            message.workspace_id,
            message.queue_word,  # as the agent gets it: X-Bide-Session
            message.key_hash,
            time.time(),
            method=message.envelope.method,
            task_id=_agents_task(message),
            incarnation=workspace.incarnation,
            hang_up=hang_up,
            bounds=bounds_of(workspace, self._settings),
        )
        outgoing = self._addresser.outgoing(
            request, workspace, message.body, hops=message.hops, queue_id=message.queue_word, until=lambda: live.until
        )
        sink = CallerSink(request.send, self._settings.caller_stall_s)
        counted = "unknown"
        self._copies.uses.begin(live)
        FORWARDS_RUNNING.inc()
        self._changed(message.workspace_id)
        try:
            named = self._named(message, live)
            ending = await forward_within(hang_up, self._agents, outgoing, sink, task_known=named)
            counted = _COUNTED.get(ending.verdict.outcome, "answered")
        finally:
            FORWARDS_RUNNING.dec()
            self._copies.uses.end(live, counted, time.time())
            self._changed(message.workspace_id)
        FORWARDED[ending.verdict.outcome].inc()
        if ending.verdict.evidence is not None:
            self._evidence.tell(workspace, ending.verdict.evidence)
        return as_stopped(ending, live.stop_reason)

    def _named(self, message: Message, live: LiveForward) -> TaskKnown:
        """A Task that the agent begins for this message is its caller's. One that the message named is whose it was."""
        copies = self._copies
        begins = message.envelope.task_id is None

        def named(task_id: str) -> None:
            copies.uses.name_task(live, task_id)
            if begins:
                copies.owners.tell(message.workspace_id, task_id, message.caller.caller_hash)

        return named


def _agents_task(message: Message) -> str | None:
    """The agent's own Task that the message goes on with, if it names one by the agent's own id."""
    task_id = message.envelope.task_id
    return task_id if task_id is not None and own_id(task_id) is None else None
