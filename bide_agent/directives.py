"""The directives that an agent was given, in replies to its beats or over its control face, and what came of each.

An id is acted on once, whichever way and however often it comes. Each time it comes it is acknowledged again, with the
same word: the last acknowledgement may have been lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any

from bide_agent.decide import Result, decide
from bide_agent.state import State

REMEMBERED = 1000
ACKNOWLEDGED_MAX = 256
"""As many as Bide reads in one heartbeat; the others wait for the next."""


class Directives:
    """Hears them, acts on them, and remembers the newest thousand."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._results: dict[str, Result] = {}
        self._unsaid: dict[str, Result] = {}
        self.heard: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        """Each once, as it came, in the order in which they came."""

    def hear(self, directive: Any) -> Result | None:
        """Act on a directive, unless that was done; return the word for it. None: it has no id, and is none."""
        directive_id = directive.get("id") if isinstance(directive, dict) else None
        if not isinstance(directive_id, str):
            return None
        known = self._results.get(directive_id)
        # "Ended" was no act: the message of a session that just began may still be under way.
        result = self._act(directive) if known is None or known is Result.ENDED else known
        _keep(self._unsaid, directive_id, result)
        if result is not known:
            _keep(self._results, directive_id, result)
            if known is None:
                self.heard.append(directive)
            self._state.record.directive(self._state.options.workspace, directive, result.value)
            # Only for news: a reply that still repeats an old one would make beat follow beat.
            self._state.wake.set()
        return result

    def unsaid(self) -> dict[str, Result]:
        """What the next beat acknowledges, by id."""
        return dict(islice(self._unsaid.items(), ACKNOWLEDGED_MAX))

    def said(self, acknowledged: Mapping[str, Result]) -> None:
        """Bide has taken these acknowledgements. One that became another word meanwhile is still unsaid."""
        for directive_id, result in acknowledged.items():
            if self._unsaid.get(directive_id) is result:
                del self._unsaid[directive_id]

    def _act(self, directive: Mapping[str, Any]) -> Result:
        behaviour = self._state.behaviour
        reason, session_id = _word(directive, "reason"), _word(directive, "session_id")
        turns = self._state.turns.of(session_id) if session_id else []
        result = decide(
            _word(directive, "kind"), reason, checkpoint=behaviour.checkpoint, stop=behaviour.stop,
            runs=bool(turns), hears=any(turn.advances for turn in turns),
        )  # fmt: skip
        for turn in turns:
            if result is Result.SAVING and reason:
                turn.save(reason, behaviour.save_s)
            elif result is Result.STOPPING:
                turn.cancel()
        return result


def _keep(results: dict[str, Result], directive_id: str, result: Result) -> None:
    results[directive_id] = result
    while len(results) > REMEMBERED:
        del results[next(iter(results))]


def _word(directive: Mapping[str, Any], name: str) -> str | None:
    value = directive.get(name)
    return value if isinstance(value, str) else None
