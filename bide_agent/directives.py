"""The directives that an agent was given, in replies to its beats or over its control face, and what came of each.

An id is acted on once, whichever way and however often it comes. Each time it comes it is acknowledged again, with the
same word: the last acknowledgement may have been lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import islice
from threading import Lock
from typing import Any, Protocol

from bide_agent.decide import Result

REMEMBERED = 1000
ACKNOWLEDGED_MAX = 256
"""As many as Bide reads in one heartbeat; the others wait for the next."""


class Worker(Protocol):
    """Whose work the directives are about."""

    def act(self, directive: Mapping[str, Any]) -> Result:
        """Do what is asked, and say what came of it."""

    def told(self, directive: Mapping[str, Any], result: Result) -> None:
        """A directive came for the first time, or came to another word than before."""


class Directives:
    """Hears them, has them acted on, and remembers the newest thousand. Heart and door may be of different threads."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = Lock()
        self._results: dict[str, Result] = {}
        self._unsaid: dict[str, Result] = {}
        self.heard: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        """Each once, as it came, in the order in which they came."""

    def hear(self, directive: Any) -> Result | None:
        """Act on a directive, unless that was done; return the word for it. None: it has no id, and is none."""
        directive_id = directive.get("id") if isinstance(directive, dict) else None
        if not isinstance(directive_id, str):
            return None
        with self._lock:
            known = self._results.get(directive_id)
            # "Ended" was no act: the message of a session that just began may still be under way.
            result = self._worker.act(directive) if known is None or known is Result.ENDED else known
            _keep(self._unsaid, directive_id, result)
            if result is not known:
                _keep(self._results, directive_id, result)
                if known is None:
                    self.heard.append(directive)
                # Only for news: a reply that still repeats an old one would make beat follow beat.
                self._worker.told(directive, result)
        return result

    def unsaid(self) -> dict[str, Result]:
        """What the next beat acknowledges, by id."""
        with self._lock:
            return dict(islice(self._unsaid.items(), ACKNOWLEDGED_MAX))

    def said(self, acknowledged: Mapping[str, Result]) -> None:
        """Bide has taken these acknowledgements. One that became another word meanwhile is still unsaid."""
        with self._lock:
            for directive_id, result in acknowledged.items():
                if self._unsaid.get(directive_id) is result:
                    del self._unsaid[directive_id]


def _keep(results: dict[str, Result], directive_id: str, result: Result) -> None:
    results[directive_id] = result
    while len(results) > REMEMBERED:
        del results[next(iter(results))]


def word(directive: Mapping[str, Any], name: str) -> str | None:
    """A member that is a string; None: it is none, or is not there."""
    value = directive.get(name)
    return value if isinstance(value, str) else None
