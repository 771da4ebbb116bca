"""The gate of a workspace: closed while a session there is being ended, so that nothing begins under the kill.

It is a set of sessions, each of them in it until a moment that is renewed. It opens when the last has left, and by
itself when nobody renews it. That it is closed everywhere is known only once each proxy that lives has said so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from services.queue.decide.workspace import Forwards, Gate, Workspace, gate_until, taken
from shared.capacity import FORWARDS_FRESH_S

_LET_GO_S = 3.0
"""How long an owner may take to see the beat by which he gives up what was told to stop."""
_LEFT_KEPT_S = 600.0
"""How long it is remembered that a session has left: longer than any word that would put it back can be on its way."""


def hear_gate(
    workspace: Workspace, session_id: str, *, rev: int, closed: bool, until: float, now: float
) -> Workspace:  # fmt: skip
    """Apply a word about one session in the gate; an older one, or one from before it left, changes nothing.

    While it is closed its moment only grows, and all in it share it: an order to kill was licensed by the latest that
    was told, and must not outlive the gate because another session left or was renewed less often.
    """
    known = workspace.gates.get(session_id)
    if known is not None and (rev, not closed) < (known.rev, known.left):
        return workspace
    was = gate_until(workspace, now)
    shared = max(until, was or until)
    word = Gate(rev, shared) if closed else Gate(rev, now + _LEFT_KEPT_S, left=True)
    if word == known:
        return workspace
    begins = closed and until > now and was is None
    others = current(workspace.gates, now)
    if closed and until > now:
        others = {name: gate if gate.left else replace(gate, until=shared) for name, gate in others.items()}
    return replace(
        workspace,
        gates={**others, session_id: word},
        gate_generation=workspace.gate_generation + begins,
        rev=workspace.rev + 1,
    )


def current(gates: Mapping[str, Gate], now: float) -> Mapping[str, Gate]:
    """Those of which something is still to be known."""
    return {name: gate for name, gate in gates.items() if gate.until > now}


def in_gate(workspace: Workspace, now: float) -> list[str]:
    """The sessions that keep it closed."""
    return sorted(name for name, gate in workspace.gates.items() if gate.until > now and not gate.left)


def closed_until(workspace: Workspace, proxies: Collection[str], now: float) -> float | None:
    """Until when nothing begins there, by the queue's word and each of these proxies'; None: one has not seen it.

    Where no proxy is known nobody can say it: their beats may only not have come through.
    """
    until = gate_until(workspace, now)
    if until is None or not proxies:
        return None
    for proxy_id in proxies:
        said = workspace.forwards.get(proxy_id)
        if said is None or said.generation < workspace.gate_generation:
            return None
        if said.gate_until is None or said.gate_until <= now:
            return None
        until = min(until, said.gate_until)
    return until


def living(workspace: Workspace, proxies: Collection[str], silent_s: float, now: float) -> set[str]:
    """Those that live, with who has spoken of this workspace itself."""
    return {*proxies, *(name for name, said in workspace.forwards.items() if now - said.at < silent_s)}


def live_forwards(workspace: Workspace, now: float) -> list[Forwards]:
    """Of the proxies whose beat is fresh."""
    return [each for each in workspace.forwards.values() if now - each.at < FORWARDS_FRESH_S]


def foreign(workspace: Workspace, now: float) -> int:
    """Tasks that the agent has in hand and that neither deliveries nor live forwards explain."""
    ours = workspace.running + sum(len(each.running) for each in live_forwards(workspace, now))
    return max(0, taken(workspace, now) - ours)


def is_named(workspace: Workspace, now: float) -> bool:
    """Whether a snapshot speaks of it: anything waits, runs, is forwarded, is foreign there, or its gate is closed."""
    return bool(
        workspace.waiting
        or workspace.running
        or gate_until(workspace, now) is not None
        or any(each.running for each in live_forwards(workspace, now))
        or foreign(workspace, now)
    )


def is_engaged(workspace: Workspace) -> bool:
    """Whether it may be named although nothing waits or runs: what its row says without a clock."""
    return bool(
        workspace.beat_active
        or any(each.running for each in workspace.forwards.values())
        or any(not gate.left for gate in workspace.gates.values())
    )


# ── a delivery that was told to stop ─────────────────────────────────────────────────────────────────────────────────


def is_abandoned(
    *, stop_age_s: float, beat_age_s: float | None, silent_s: float, active: int, ever_active: bool, grace_s: float
) -> bool:
    """Whether the agent no longer has what it was told to stop: its first beat after the grace shows nothing.

    From one that always says 0 it means nothing; nor where a byte has come since the stop (`silent_s` is how long none
    has).
    """
    if beat_age_s is None or not ever_active or active:
        return False
    return beat_age_s <= stop_age_s - grace_s and silent_s >= stop_age_s


def is_being_let_go(workspace: Workspace, stop_at: float | None, now: float) -> bool:
    """Whether its owner is about to give up a delivery that was told to stop at `stop_at`, as the beats show nothing.

    Until then nothing is to be killed for it. He does not where bytes still come, so it is so for a while only.
    """
    if stop_at is None or workspace.beat_at is None or not workspace.ever_active or workspace.beat_active:
        return False
    return now < stop_at + workspace.stop_grace_s + workspace.beat_cadence_s + _LET_GO_S
