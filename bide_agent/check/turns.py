"""What is checked of its turns: answers, what it counts, busy, the same message again, streams, cancels."""

from __future__ import annotations

import asyncio
import json
import uuid

from bide_agent.calls import Dialect
from bide_agent.check.trial import LONG_ENOUGH_S, PROMPT_S, Finding, Trial, failed, passed, skipped, too_short


async def answers(trial: Trial) -> Finding:
    """It answers a message. How long that takes is what the other checks have to work with."""
    said = await trial.send(queue_id=str(uuid.uuid4()))
    trial.turn_s = said.took_s
    if not said.is_answer:
        return failed(f"{said}: neither a message nor a task that has ended")
    return passed(str(said))


async def counts(trial: Trial) -> Finding:
    """Beats say that a turn runs, and then that it does not."""
    registry = trial.registry
    within_s = registry.cadence_s * 1.5 + PROMPT_S
    if trial.turn_s < min(within_s, LONG_ENOUGH_S):
        return too_short(trial)
    first = len(registry.beats)
    async with trial.turn(str(uuid.uuid4())) as sent:
        await registry.until(lambda: sent.done() or any(beat.active > 0 for beat in registry.beats[first:]), within_s)
        during = registry.beats[first:]
    if not any(beat.active > 0 for beat in during):
        if len(during) > 1:  # the first one may have left before the turn began
            return failed("active_tasks stays 0 during a turn: Bide may deliver more than it takes")
        return skipped(f"no beat came during a turn of {trial.turn_s:.1f} s")
    first = len(registry.beats)
    if not await registry.until(lambda: any(beat.active == 0 for beat in registry.beats[first:]), within_s):
        return failed(f"active_tasks is still {registry.beats[-1].active} after the answer: it would get nothing more")
    return passed("active_tasks above 0 during a turn, 0 after it")


async def refuses(trial: Trial) -> Finding:
    """At capacity it refuses at once, and says that it is busy."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    running = [
        asyncio.create_task(trial.send(queue_id=str(uuid.uuid4()))) for _ in range(trial.registry.max_concurrent)
    ]
    await asyncio.wait(running, timeout=min(0.5, trial.turn_s / 4))  # until they have surely arrived
    extra = asyncio.create_task(trial.send(queue_id=str(uuid.uuid4())))
    await asyncio.wait({extra}, timeout=PROMPT_S)
    hangs = not extra.done()
    await asyncio.wait([*running, extra])
    said = extra.result()
    if hangs:
        return failed(f"no refusal within {PROMPT_S:g} s: {said}; a request that hangs looks like a turn that runs")
    if said.reply is None or said.is_answer:
        return failed(f"one more than it takes got {said}")
    if said.mark == "busy":
        return passed(str(said))
    if said.reply.status in {429, 503} and "retry-after" in said.reply.headers:
        return passed(f"{said}, Retry-After {said.reply.headers['retry-after']}")
    return failed(f"{said}, with neither Retry-After nor data.code busy: it reads as a fault of the agent")


async def runs_once(trial: Trial) -> Finding:
    """A second delivery of what runs joins it, or is refused until its answer is there."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    queue_id, before = str(uuid.uuid4()), len(trial.registry.beats)
    async with trial.turn(queue_id) as sent:
        await asyncio.wait({sent}, timeout=trial.turn_s / 4)
        again = await trial.send(queue_id=queue_id, delivery=2)
        late_by_s = again.ended_at - (first := await sent).ended_at
    most = max((beat.active for beat in trial.registry.beats[before:]), default=0)
    if most > 1:
        return failed(f"{most} active tasks for one X-Queue-Id: it ran twice")
    if again.mark == "busy" or (again.reply is not None and again.reply.status == 503):  # noqa: PLR2004 - HTTP
        return passed("refused as busy while the first one runs: Bide comes again")
    if again.text != first.text:
        return failed(f"two answers to one X-Queue-Id: {first.text[:60]!r} and {again.text[:60]!r}")
    if late_by_s > trial.turn_s / 4:
        return failed(f"the second delivery was answered {late_by_s:.1f} s after the first one: it ran twice")
    return passed("attached to the turn that ran, one answer for both")


async def remembers(trial: Trial) -> Finding:
    """A delivery after the answer gets that answer: it was lost on the way."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    queue_id = str(uuid.uuid4())
    first = await trial.send(queue_id=queue_id)
    again = await trial.send(queue_id=queue_id, delivery=2)
    if again.text != first.text or not again.is_answer:
        return failed(f"another answer to the same X-Queue-Id: {again}")
    if again.took_s > trial.turn_s / 2:
        return failed(f"the same answer, but after {again.took_s:.1f} s of work: it ran again")
    return passed(f"the same answer in {again.took_s:.2f} s")


async def streams(trial: Trial) -> Finding:
    """Where its card says that it streams, a stream ends in a final state."""
    if not trial.card.get("capabilities", {}).get("streaming"):
        return skipped("its card does not say that it streams")
    said = await trial.send(trial.message("stream"), queue_id=str(uuid.uuid4()))
    if said.reply is None or "text/event-stream" not in said.reply.headers.get("content-type", ""):
        return failed(f"no event stream: {said}")
    lines = [line.partition(":")[2] for line in said.reply.body.decode().splitlines() if line.startswith("data:")]
    states = [state for line in lines for state in _states(line)]
    if not states or states[-1] in {"working", "submitted", ""}:
        return failed(f"{len(lines)} events, the last of them is no final state")
    return passed(f"{len(lines)} events, the last one is {states[-1]}")


def _states(line: str) -> list[str]:
    result = json.loads(line).get("result", {})
    inner = next((result[name] for name in ("task", "statusUpdate", "message") if name in result), result)
    if "parts" in inner:
        return ["a message"]
    state = str(inner.get("status", {}).get("state", ""))
    return [state.lower().removeprefix("task_state_")] if "status" in inner else []


async def cancels(trial: Trial) -> Finding:
    """A Task that runs can be canceled."""
    if trial.turn_s < LONG_ENOUGH_S:
        return too_short(trial)
    at_once = {"blocking": False} if trial.dialect is Dialect.V03 else {"returnImmediately": True}
    said = await trial.send(trial.message(configuration=at_once), queue_id=str(uuid.uuid4()))
    if said.state not in {"working", "submitted"}:
        return skipped(f"it answers whole what need not wait: {said}")
    canceled = await trial.send(trial.body("cancel", id=said.result.get("id")))
    return passed(str(canceled)) if canceled.state == "canceled" else failed(f"tasks/cancel got {canceled}")
