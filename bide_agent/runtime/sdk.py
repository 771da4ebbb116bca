"""An a2a-sdk `AgentExecutor` as a handler: of 0.3 (pydantic) and of 1.x (protobuf), whichever is installed.

What the executor enqueues is told as it comes: the parts of its artifacts and of its last message are the answer, its
last state is the Task's. Its `RequestContext` carries our `Session`, for `checkpoint` and `save`:

    session = context.call_context.state["bide_session"]

The SDK is imported when an executor is given and not before: nothing else of the runtime needs it.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from bide_agent.calls import Dialect
from bide_agent.runtime import parts
from bide_agent.runtime.session import Session
from bide_agent.runtime.words import ANSWERING, Answer, Failed, Handler, Message

SESSION = "bide_session"
CANCEL_S = 5.0
"""How long the executor's `cancel` may take."""


class Executor(Protocol):
    """As a2a-sdk has it."""

    async def execute(self, context: Any, event_queue: Any) -> None: ...
    async def cancel(self, context: Any, event_queue: Any) -> None: ...


def adapted(given: Handler | Executor) -> Handler:
    """A handler as it is; an executor as one.

    Raises:
        ImportError: it is an executor, and there is no a2a-sdk.
    """
    if not (hasattr(given, "execute") and hasattr(given, "cancel")):
        return given
    dialect = Dialect.V03 if hasattr(importlib.import_module("a2a.types"), "MessageSendParams") else Dialect.V10
    sdk = _Sdk(dialect)
    executor = given

    async def handle(message: Message, session: Session) -> AsyncIterator[Any]:
        context, events = sdk.context(message, session), _Events()
        running = asyncio.create_task(_execute(executor, context, events))
        running.add_done_callback(lambda _: events.queue.put_nowait(None))
        told = _Told()
        try:
            while (event := await events.queue.get()) is not None:
                session.progress()
                for chunk in told.hear(type(event).__name__, sdk.as_json(event)):
                    yield chunk
        except asyncio.CancelledError:
            with suppress(Exception):
                async with asyncio.timeout(CANCEL_S):
                    await executor.cancel(context, events)
            raise
        finally:
            running.cancel()
            await asyncio.wait({running})
        running.result()
        yield told.answer()

    return handle


async def _execute(executor: Executor, context: Any, events: _Events) -> None:
    try:
        await executor.execute(context, events)
    except SystemExit as error:  # asyncio would let it end the agent
        raise RuntimeError("the executor asked its process to exit") from error


class _Events:
    """What an executor enqueues to; the rest of an event queue is the SDK's server's."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    async def enqueue_event(self, event: Any) -> None:
        self.queue.put_nowait(event)

    async def close(self) -> None: ...

    def is_closed(self) -> bool:
        return False


class _Told:
    """The events so far."""

    def __init__(self) -> None:
        self._state = "completed"
        self._note = ""
        self._has_artifacts = False

    def hear(self, kind: str, event: Mapping[str, Any]) -> list[list[parts.Part]]:
        """Return what of an event belongs to the answer."""
        match kind:
            case "Message":
                return [_parts(event)]
            case "TaskArtifactUpdateEvent":
                self._has_artifacts = True
                return [_parts(event.get("artifact"))]
            case _:
                artifacts = [_parts(one) for one in event.get("artifacts", ())]
                self._has_artifacts = self._has_artifacts or bool(artifacts)
                return [*artifacts, *self._status(event.get("status", {}))]

    def _status(self, status: Mapping[str, Any]) -> list[list[parts.Part]]:
        state = str(status.get("state", "")).lower().removeprefix("task_state_").replace("_", "-")
        if state in {"submitted", "working", "unknown", ""}:
            return []
        self._state, said = state, _parts(status.get("message"))
        self._note = parts.text_of(said)
        return [said] if state in ANSWERING and not self._has_artifacts else []

    def answer(self) -> Answer:
        if self._state in ANSWERING:
            return Answer(None, self._state)
        raise Failed(self._note or f"The agent ended its task as {self._state}.")


class _Sdk:
    """The two versions of the SDK, where they differ."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._context = importlib.import_module("a2a.server.agent_execution").RequestContext
        self._call_context = importlib.import_module("a2a.server.context").ServerCallContext
        self._types = importlib.import_module("a2a.types")

    def context(self, message: Message, session: Session) -> Any:
        is_10 = self._dialect is Dialect.V10
        said = {
            "message": {
                "messageId": message.message_id,
                "contextId": session.id,
                "role": "ROLE_USER" if is_10 else "user",
                "parts": [parts.said(self._dialect, part) for part in message.parts],
                "metadata": dict(message.metadata),
            }
        }
        if is_10:
            json_format = importlib.import_module("google.protobuf.json_format")
            request = json_format.ParseDict(said, self._types.SendMessageRequest())
        else:
            request = self._types.MessageSendParams.model_validate(said)
        return self._context(
            request=request,
            task_id=session.task_id,
            context_id=session.id,
            call_context=self._call_context(state={SESSION: session}),
        )

    def as_json(self, event: Any) -> Mapping[str, Any]:
        if self._dialect is Dialect.V10:
            said: Mapping[str, Any] = importlib.import_module("google.protobuf.json_format").MessageToDict(event)
            return said
        dumped: Mapping[str, Any] = event.model_dump(mode="json", by_alias=True, exclude_none=True)
        return dumped


def _parts(holder: Any) -> list[parts.Part]:
    said = holder.get("parts", ()) if isinstance(holder, Mapping) else ()
    return [part for part in map(parts.heard, said) if part]
