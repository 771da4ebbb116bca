"""A2A's task methods. A task whose id is ours is answered from its item; every other belongs to the agent.

Each is scoped to its caller: what is another's does not exist (-32001).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from uuid import UUID

from services.proxy.api.answers import result_body, task_of_item
from services.proxy.api.asking import Found
from services.proxy.api.identity import Caller
from services.proxy.api.message import Message
from services.proxy.api.outgoing import Addresser
from services.proxy.api.owning import UNREADABLE, Owning
from services.proxy.api.questions import AWAY, NOBODYS, NOT_YET, Questions, scope
from services.proxy.api.rendering import EVENT_STREAM, CallerSink, agents_task_id, broken, refuse_call
from services.proxy.api.wire import Refused, Request, Response, own_id, rpc_error
from services.proxy.decide import Refuse, Workspace
from services.proxy.forward import RECORDED_BYTES_MAX, Broken, Passed, forward
from services.proxy.settings import Settings
from shared.a2a import Envelope, Verb
from shared.agents import Agents
from shared.results import read_result

_OURS = (Verb.GET, Verb.CANCEL, Verb.SUBSCRIBE)
_NO_SUCH_TASK = -32001
NOT_CANCELABLE = Refuse(409, "not_cancelable", "The task has ended, and stays as it is.", -32002, is_reply=True)
NO_AGENT = Refuse(
    503, "no_agent", "Its agent is reachable nowhere now. Send messages: those are kept.", retry_after_s=30
)

Look = Callable[[bytes], Awaitable[bytes | Refuse]]
"""Looks at an answer before the caller does: what he gets in its place."""


class Tasks:
    """Everything on the A2A route that is no message, and what of a message names a task."""

    def __init__(
        self, questions: Questions, addresser: Addresser, agents: Agents, owning: Owning, settings: Settings
    ) -> None:
        self._questions = questions
        self._addresser = addresser
        self._agents = agents
        self._owning = owning
        self._settings = settings

    async def __call__(
        self, request: Request, caller: Caller, workspace: Workspace, envelope: Envelope, hops: int
    ) -> str:
        queue_id = own_id(envelope.task_id) if envelope.verb in _OURS else None
        item = await self._questions.item(queue_id, caller) if queue_id is not None else NOBODYS
        if isinstance(item, Found) and queue_id is not None:
            response = await self._ours(item, queue_id, caller, workspace, envelope)
            if isinstance(response, Refuse):
                return await refuse_call(request, response, envelope.request_id or "null")
            await response.send(request.send)
            return "answered"
        refuse = await self._owning.refuse(workspace.workspace_id, caller, envelope.task_ids)
        if refuse is not None:
            return await refuse_call(request, refuse, envelope.request_id or "null")
        look: Look | None = None
        if item is not NOBODYS and envelope.verb is not Verb.SUBSCRIBE:  # a subscription may last: it is not held back
            look = _if_not_yet
        elif envelope.verb is Verb.LIST and not caller.is_operator:
            look = partial(self._owning.only_own, workspace.workspace_id, caller)
        return await self._agents_own(request, workspace, envelope, hops, look)

    async def resolve(self, message: Message) -> Message:
        """The message as the agent can read it: a Task of ours is named by the agent's own id for it.

        Raises:
            Refused: it names another's task.
        """
        strange = message.envelope.task_ids
        if not strange:
            return message
        ours = own_id(message.envelope.task_id)
        item = await self._questions.item(ours, message.caller) if ours is not None else NOBODYS
        agents_id = None if isinstance(item, Refuse) else agents_task_id(item)
        if agents_id:
            message = message.about_task(agents_id)
            strange -= {str(message.envelope.task_id)}
        refuse = await self._owning.refuse(message.workspace_id, message.caller, strange)
        if refuse is not None:
            raise Refused(refuse)
        return message

    async def _ours(
        self, item: Found, queue_id: UUID, caller: Caller, workspace: Workspace, envelope: Envelope
    ) -> Response | Refuse:
        request_id = envelope.request_id or "null"
        modern = "/" not in envelope.method
        said = await self._whole(item, caller)
        if said.get("workspace_id") != workspace.workspace_id:
            return NOBODYS
        if envelope.verb is Verb.CANCEL:
            # The first one's item, where this turned out to be a repeat.
            canceled = await self._cancel(own_id(said.get("queue_id")) or queue_id, caller)
            if isinstance(canceled, Refuse):
                return canceled
            said = canceled
        found = {**task_of_item(said, modern=modern), "id": str(queue_id)}
        if envelope.verb is Verb.SUBSCRIBE:
            body = result_body({"task": found} if modern else found, request_id)
            return Response(200, b"data: " + body + b"\n\n", EVENT_STREAM, [(b"cache-control", b"no-cache")])
        return Response(200, result_body(found, request_id))

    async def _whole(self, item: Found, caller: Caller) -> dict[str, object]:
        """The item with its answer, also where that is too large to ride along."""
        said = item.read()
        item_id = own_id(said.get("queue_id"))
        if said.get("answer") is None and said.get("answer_url") is not None and item_id is not None:
            answer = await self._questions.answer(item_id, caller)
            if isinstance(answer, bytes):
                with contextlib.suppress(ValueError):
                    said["answer"] = json.loads(answer)
        return said

    async def _cancel(self, queue_id: UUID, caller: Caller) -> dict[str, object] | Refuse:
        """The item after the cancel. One that its agent has is asked to end, and says so when it has."""
        done = await self._questions.ask("cancel", queue_id=queue_id, caller_hash=scope(caller))
        match done and done.status:
            case None:
                return AWAY
            case 200 | 202:
                return done.read() if done else {}
            case 404:  # promised here, and not read by the queue yet
                return NOT_YET
            case _:
                return NOT_CANCELABLE

    async def _agents_own(
        self, request: Request, workspace: Workspace, envelope: Envelope, hops: int, look: Look | None
    ) -> str:
        """Pass it on. `look` is given the answer before the caller is: it says what the caller gets in its place."""
        request_id = envelope.request_id or "null"
        if not workspace.url:
            await rpc_error(NO_AGENT, request_id).send(request.send)
            return "failed"
        added = {} if envelope.says_version else {"jsonrpc": "2.0"}
        outgoing = self._addresser.outgoing(request, workspace, envelope.with_values(added), hops=hops, queue_id=None)
        caller_sink = CallerSink(request.send, self._settings.caller_stall_s)
        sink = _Held(caller_sink, may_pass=look is _if_not_yet) if look is not None else None
        ending = await forward(self._agents, outgoing, sink or caller_sink, keepable=False)
        if isinstance(ending, Broken):
            await broken(ending.verdict, request_id, workspace.workspace_id).send(request.send)
            return "failed"
        if look is not None and sink is not None and isinstance(ending, Passed) and not sink.is_open:
            shown = await look(ending.recorded) if ending.recorded is not None else UNREADABLE
            if isinstance(shown, Refuse):
                return await refuse_call(request, shown, request_id)
            await sink.release(shown)
        return "answered"


async def _if_not_yet(answer: bytes) -> bytes | Refuse:
    """The id may be one of ours that cannot be seen now: "no such task" is not the answer."""
    return NOT_YET if read_result(answer).error_code == _NO_SUCH_TASK else answer


class _Held:
    """Holds an answer back until it has been looked at. One that is too large for it passes, if it `may_pass`."""

    def __init__(self, sink: CallerSink, *, may_pass: bool) -> None:
        self._sink = sink
        self._may_pass = may_pass
        self._start: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self.is_open = False

    async def start(self, status: int, headers: object, length: int | None) -> None:  # noqa: ARG002 - it may change
        assert isinstance(headers, list)
        self._start = (status, headers)

    async def write(self, chunk: bytes, *, more: bool) -> None:
        if self.is_open:
            await self._sink.write(chunk, more=more)
            return
        self._size += len(chunk)
        self._pieces.append(chunk)
        if self._size > RECORDED_BYTES_MAX:
            held, self._pieces = b"".join(self._pieces), []
            if self._may_pass:
                await self._open(held, None, more=more)

    async def give(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        await self.start(status, headers, len(body))
        await self.write(body, more=False)

    def cut(self) -> None:
        self._sink.cut()

    async def release(self, shown: bytes) -> None:
        """Let `shown` pass in its place."""
        await self._open(shown, len(shown), more=False)

    async def _open(self, first: bytes, length: int | None, *, more: bool) -> None:
        assert self._start is not None
        self.is_open = True
        await self._sink.start(*self._start, length)
        await self._sink.write(first, more=more)
