"""All checks, in the order in which they are made. Each says what it saw; none stops the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from bide_agent.check.orders import checkpoints, stops
from bide_agent.check.presence import beats, card, comes_back, knows_bide, registers
from bide_agent.check.trial import Finding, Trial
from bide_agent.check.turns import answers, cancels, counts, refuses, remembers, runs_once, streams

Check = Callable[[Trial], Awaitable[Finding]]

CHECKS: dict[str, Check] = {
    "card": card,
    "registration": registers,
    "heartbeat cadence": beats,
    "callers": knows_bide,
    "answer": answers,
    "active_tasks": counts,
    "busy answer": refuses,
    "dedupe, running": runs_once,
    "dedupe, answered": remembers,
    "stream": streams,
    "checkpoint": checkpoints,
    "stop": stops,
    "cancel": cancels,
    "void token": comes_back,
}
