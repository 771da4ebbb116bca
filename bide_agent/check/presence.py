"""What is checked of an agent that does nothing: its card, its registration, its beats, whom it lets in."""

from __future__ import annotations

import itertools

from bide_agent.calls import Dialect
from bide_agent.check.trial import Finding, Trial, failed, passed, skipped
from bide_agent.client import UnreachableError, request

BEATS = 3


async def card(trial: Trial) -> Finding:
    """It shows its agent card, which says what it speaks."""
    try:
        reply = await request("GET", f"{trial.url.rstrip('/')}/.well-known/agent-card.json")
    except UnreachableError as error:
        return failed(str(error))
    trial.card = reply.json()
    if reply.status != 200 or not trial.card.get("name"):  # noqa: PLR2004 - HTTP
        return skipped(f"{reply.status} at /.well-known/agent-card.json; the card that it registers has to do")
    return passed(f"its name is {trial.card['name']}")


async def registers(trial: Trial) -> Finding:
    """Its registration says all that Bide must know."""
    said = trial.registry.registration
    trial.card = trial.card or said.get("agent_card") or {}
    if not str(trial.card.get("protocolVersion", "0.3")).startswith("0."):
        trial.dialect = Dialect.V10
    missing = [name for name in ("id", "url", "agent_card") if not said.get(name)]
    if missing:
        return failed(f"{', '.join(missing)} left out")
    if not said.get("boot_id"):
        return failed("no boot_id: Bide cannot tell a new process from the old one")
    told = f"{trial.registry.max_concurrent} at a time, a beat every {trial.registry.cadence_s:g} s"
    return passed(f"{said['id']}, {told}, {', '.join(said.get('capabilities', ())) or 'no capabilities'}")


async def beats(trial: Trial) -> Finding:
    """It beats on the cadence that it declared, with its own token, and tells its active tasks."""
    registry, cadence_s = trial.registry, trial.registry.cadence_s
    first = len(registry.beats)
    longest_s = cadence_s * 1.5 + 1
    if not await registry.until(lambda: len(registry.beats) >= first + BEATS, BEATS * longest_s):
        return failed(f"{len(registry.beats) - first} beats in {BEATS * longest_s:.1f} s, it declared {cadence_s:g} s")
    seen = registry.beats[first : first + BEATS]
    gap_s = max(after.at - before.at for before, after in itertools.pairwise(seen))
    if gap_s > longest_s:
        return failed(f"{gap_s:.1f} s between two beats, it declared {cadence_s:g} s")
    if not all(beat.had_own_token for beat in seen):
        return failed("beats with the enrolment token: the one that register returned is the agent's own")
    if any(beat.active != 0 for beat in seen):
        return failed(f"active_tasks is {seen[-1].body.get('active_tasks')!r} while nothing was sent")
    return passed(f"at most {gap_s:.1f} s between two, active_tasks 0")


async def knows_bide(trial: Trial) -> Finding:
    """It lets in who shows the delivery token, and nobody else."""
    for token in ("", "guessed"):
        said = await trial.send(token=token)
        if said.reply is None or said.reply.status not in {401, 403}:
            return failed(f"a caller {'with a wrong' if token else 'without a'} token got {said}")
    return passed("401 for strangers")


async def comes_back(trial: Trial) -> Finding:
    """A token that is void is replaced: read again, or asked for by registering."""
    registry = trial.registry
    before, refused = len(registry.registrations), registry.refused
    registry.revoke()
    within_s = registry.cadence_s * 3 + 10
    if not await registry.until(lambda: len(registry.registrations) > before, within_s):
        times = registry.refused - refused
        return failed(f"{times} beats were refused with 401 in {within_s:.0f} s and it did not register again")
    count = len(registry.beats)
    if not await registry.until(lambda: len(registry.beats) > count, within_s):
        return failed("it registered again and sent no beat")
    return passed(f"registered again after {registry.refused - refused} refused requests")
