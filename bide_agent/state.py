"""What the parts of one agent share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bide_agent import shapes
from bide_agent.behaviour import Behaviour, BehaviourError, Fate, changed, spend
from bide_agent.decide import Result, decide
from bide_agent.directives import word
from bide_agent.news import News
from bide_agent.options import Options
from bide_agent.record import Record
from bide_agent.tasks import Tasks
from bide_agent.tokens import Tokens
from bide_agent.turns import Turns


@dataclass(slots=True)
class State:
    """One agent from inside. `wake` makes the heart beat at once: when less is active, not when more is."""

    options: Options
    url: str
    boot_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_at: float = field(default_factory=time.monotonic)
    news: News = field(default_factory=News)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: Tasks = field(default_factory=Tasks)
    behaviour: Behaviour = field(init=False)
    turns: Turns = field(init=False)
    record: Record = field(init=False)
    tokens: Tokens = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.behaviour = Behaviour(work_s=options.work_s)
        self.turns = Turns(options.max_concurrent, self._fell)
        self.record = Record(options.record, self.news.tell)
        self.tokens = Tokens(options.workspace, options.token, options.state_dir)
        self.behave(options.behaviour)

    def behave(self, changes: Mapping[str, Any]) -> None:
        """Change the behaviour; `busy_s` begins foreign work on all slots (0 ends it). All of it or nothing.

        Raises:
            BehaviourError: no such name, a value that does not fit, or `dies` where it would end more than this agent.
        """
        settings = dict(changes)
        busy_s = settings.pop("busy_s", None)
        if busy_s is not None and (isinstance(busy_s, bool) or not isinstance(busy_s, int | float) or busy_s < 0):
            raise BehaviourError(f"busy_s cannot be {busy_s!r}: it is a number of seconds, as in busy_s=5")
        behaviour = changed(self.behaviour, settings)
        if behaviour.dies and not self.options.may_die:
            raise BehaviourError("dies would end the process that this agent is a guest of; start it as its own")
        self.behaviour = behaviour
        if busy_s is not None:
            self.turns.busy_for(busy_s)
        if settings.keys() & {"deaf", "always_zero"}:
            self.wake.set()
        self.news.tell()

    @property
    def workspace(self) -> str:
        return self.options.workspace

    @property
    def heartbeat_s(self) -> float:
        return self.options.heartbeat_s

    @property
    def is_deaf(self) -> bool:
        return self.behaviour.deaf

    def registration(self) -> dict[str, Any]:
        return {
            "id": self.workspace,
            "url": self.url,
            "agent_card": shapes.card(self.workspace, self.url),
            "boot_id": self.boot_id,
            "max_concurrent_tasks": self.turns.max_concurrent,
            "heartbeat_interval_s": self.heartbeat_s,
            "capabilities": [*(["control"] if self.behaviour.control else []), "refuses_when_busy"],
        }

    def alive(self) -> dict[str, Any]:
        return {
            "workspace_id": self.workspace,
            "active_tasks": 0 if self.behaviour.always_zero else self.turns.active,
            "boot_id": self.boot_id,
            "max_concurrent_tasks": self.turns.max_concurrent,
            "uptime_seconds": round(time.monotonic() - self.started_at, 3),
            "progress": self.turns.progress,
        }

    def news_of_heart(self) -> None:
        self.news.tell()

    def act(self, directive: Mapping[str, Any]) -> Result:
        """Do to the turns of a directive's session what it asks, as far as the behaviour obeys it."""
        behaviour = self.behaviour
        reason, session_id = word(directive, "reason"), word(directive, "session_id")
        turns = self.turns.of(session_id) if session_id else []
        result = decide(
            word(directive, "kind"), reason, checkpoint=behaviour.checkpoint, stop=behaviour.stop,
            runs=bool(turns), hears=any(turn.advances for turn in turns),
        )  # fmt: skip
        for turn in turns:
            if result is Result.SAVING and reason:
                turn.save(reason, behaviour.save_s)
            elif result is Result.STOPPING:
                turn.cancel()
        return result

    def told(self, directive: Mapping[str, Any], result: Result) -> None:
        self.record.directive(self.workspace, directive, result.value)
        self.wake.set()

    def _fell(self) -> None:
        self.wake.set()
        self.news.tell()

    def spend(self, fates: Iterable[Fate]) -> Fate | None:
        fate, self.behaviour = spend(self.behaviour, fates)
        return fate
