"""The Tasks that an agent has told of. The newest thousand are remembered."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from bide_agent.turns import Ending, Turn

REMEMBERED = 1000


class TaskState(Enum):
    """The values are 0.3's words; 1.0's are the names behind TASK_STATE_."""

    WORKING = "working"
    COMPLETED = "completed"
    CANCELED = "canceled"
    FAILED = "failed"
    INPUT_REQUIRED = "input-required"
    AUTH_REQUIRED = "auth-required"


@dataclass(slots=True, kw_only=True)
class Task:
    """One A2A Task and the turn that works on it."""

    context_id: str
    text: str
    metadata: Mapping[str, Any]
    turn: Turn
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: TaskState = TaskState.WORKING
    changed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    began_at: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Say what became of it. The turn's slot is to be freed in the same step, with no await in between."""
        gave_up = self.turn.ending in {Ending.CANCELED, Ending.GIVEN_BACK}
        self.state = TaskState.CANCELED if gave_up else TaskState.COMPLETED
        self.changed_at = datetime.now(UTC)
        self.ended.set()


class Tasks:
    """By id, oldest first."""

    def __init__(self) -> None:
        self._by_id: dict[str, Task] = {}

    def add(self, task: Task) -> Task:
        self._by_id[task.task_id] = task
        while len(self._by_id) > REMEMBERED:
            del self._by_id[next(iter(self._by_id))]
        return task

    def get(self, task_id: str) -> Task | None:
        return self._by_id.get(task_id)
