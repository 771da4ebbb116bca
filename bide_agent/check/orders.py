"""What is checked of directives: that they are heard, acknowledged, and that the turn ends."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

from bide_agent.check.trial import LONG_ENOUGH_S, PROMPT_S, Finding, Said, Trial, failed, passed, skipped, too_short

END_S = 30.0
"""What an agent gets to end after a stop: the default of `stop_grace_s`."""
UNSHORTENED = 0.9
"""A turn that took this share of its usual time was not cut short."""


async def checkpoints(trial: Trial) -> Finding:
    """A checkpoint is acknowledged, and a turn at its ceiling ends with what there is."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    queue_id = str(uuid.uuid4())
    async with trial.turn(queue_id) as sent:
        word, trouble = await _told(trial, "checkpoint", queue_id)
        said = await sent
    if word is None:
        return trouble
    ours = said.result.get("metadata", {}).get("urn:bide:queue:1", {})
    marked = ", marked checkpointed" if isinstance(ours, dict) and ours.get("checkpointed") else ""
    if not (said.is_answer or said.mark == "preempted"):
        return failed(f"acknowledged as {word!r}, and then {said}")
    if not (marked or said.gave_up) and _ran_to_its_end(trial, said):
        return skipped(f"acknowledged as {word!r}, and the turn went on to its end; a ceiling would come to a stop")
    return passed(f"acknowledged as {word!r}, then {said}{marked}")


async def stops(trial: Trial) -> Finding:
    """A stop is acknowledged and ends the turn; its slot is free afterwards."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    queue_id = str(uuid.uuid4())
    async with trial.turn(queue_id) as sent:
        word, trouble = await _told(trial, "stop", queue_id)
        await asyncio.wait({sent}, timeout=END_S)
        if not sent.done():
            return failed(f"the turn still runs {END_S:g} s after a stop: its container would be ended now")
    if word is None:
        return trouble
    said = await sent
    if not said.gave_up and _ran_to_its_end(trial, said):
        verdict = failed if trial.has_control else skipped  # it may have been told too late to show anything
        return verdict(f"acknowledged as {word!r}, and the turn went on to its end: {said}")
    registry, first = trial.registry, len(trial.registry.beats)
    within_s = registry.cadence_s * 1.5 + PROMPT_S
    if not await registry.until(lambda: any(beat.active == 0 for beat in registry.beats[first:]), within_s):
        return failed(f"acknowledged as {word!r}, but active_tasks stays above 0: the gate would stay closed")
    return passed(f"acknowledged as {word!r}, then {said}")


def _ran_to_its_end(trial: Trial, said: Said) -> bool:
    return said.took_s >= trial.turn_s * UNSHORTENED


async def _told(trial: Trial, kind: str, queue_id: str) -> tuple[str | None, Finding]:
    """Give a directive; return the word for it, or the finding that there is none."""
    deadline = (datetime.now(UTC) + timedelta(seconds=END_S)).isoformat()
    directive, called = await trial.direct(kind, f"{queue_id}:1", deadline)
    registry = trial.registry

    def words() -> list[str]:
        return [beat.acknowledged[directive["id"]] for beat in registry.beats if directive["id"] in beat.acknowledged]

    seen = await registry.until(lambda: bool(words()), registry.cadence_s * 3 + PROMPT_S)
    registry.directives = []
    if called is not None and (called.reply is None or called.reply.status not in {200, 409}):
        return None, failed(f"it declares control, and POST /control/{kind} got {called}")
    if seen:
        return words()[0], skipped("")
    if called is not None:
        return None, failed("taken over /control, but no beat acknowledges it: Bide repeats it every 10 s")
    return None, skipped(f"no beat acknowledges a {kind}: at its ceiling such an agent is stopped, or its container is")
