"""What a handler is given and what it may say: the public words of the runtime, besides `Session`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bide_agent.calls import Call
from bide_agent.decide import gives_back
from bide_agent.runtime import parts as parts_
from bide_agent.runtime.parts import Part
from bide_agent.shapes import EXTENSION
from bide_agent.tasks import TaskState

if TYPE_CHECKING:
    from bide_agent.runtime.session import Session

Handler = Callable[["Message", "Session"], Awaitable[Any] | AsyncIterator[Any]]
"""`async def handle(message, session)`: returns text, parts or an `Answer`, or yields chunks of text or parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What the agent is told. `text` joins the text parts; `raw` is the message as it came."""

    text: str
    parts: list[Part]
    message_id: str
    context_id: str | None
    metadata: Mapping[str, Any]
    raw: Mapping[str, Any]

    @property
    def tick(self) -> Mapping[str, Any] | None:
        """Of a fire of a schedule: schedule_id, fire_at, merged_count, first_missed_at, rev. None: it is no fire."""
        ours = self.metadata.get(EXTENSION)
        return ours if isinstance(ours, Mapping) and ours.get("kind") == "tick" else None


def message_of(call: Call) -> Message:
    raw = call.message
    heard = [part for part in map(parts_.heard, raw.get("parts", ())) if part]
    metadata = raw.get("metadata")
    return Message(
        text=call.text,
        parts=heard,
        message_id=call.message_id or "",
        context_id=call.context_id,
        metadata=metadata if isinstance(metadata, Mapping) else {},
        raw=raw,
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """What Bide asks of a turn: to end, with what there is of it, or (`ends` is false) only to know that it might."""

    reason: str
    deadline: datetime | None = None
    ends: bool = True

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline, by this machine's clock; None: there is none."""
        return None if self.deadline is None else (self.deadline - datetime.now(UTC)).total_seconds()

    @property
    def is_given_back(self) -> bool:
        """The message will be delivered again, so nothing needs to be answered; what was saved is found then."""
        return gives_back(self.reason) or self.reason == SHUTDOWN


SHUTDOWN = "shutdown"
"""The reason of a checkpoint that the agent's own end asks for."""


class Checkpoint(Exception):  # noqa: N818 - it is no error: a turn ends as it was asked to
    """The turn ends early because Bide asked for that; `partial` is what there is of the answer.

    Catch it to tidy up, and raise it again. Who returns an answer instead has finished.
    """

    def __init__(self, asked: Asked, partial: Any = None) -> None:
        super().__init__(asked.reason)
        self.asked = asked
        self.partial = partial


class Failed(Exception):  # noqa: N818 - what the handler says, not what went wrong in it
    """Raise it to end the Task as `failed`: the sentence is for the caller, and nobody tries the message again.

    Any other exception is an error of the agent's, of which the caller is told the type; Bide delivers the message
    again, five times in all. `partial` is what there is of an answer.
    """

    def __init__(self, sentence: str, partial: Any = None) -> None:
        super().__init__(sentence)
        self.partial = partial


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with a state: `input-required` and `auth-required` ask the caller back, on the same contextId."""

    content: Any
    state: str = "completed"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in ANSWERING:
            raise ValueError(f"an answer's state is one of {', '.join(ANSWERING)}, not {self.state!r}")
        parts_.jsonable(dict(self.metadata))


ANSWERING = tuple(state.value for state in (TaskState.COMPLETED, TaskState.INPUT_REQUIRED, TaskState.AUTH_REQUIRED))
