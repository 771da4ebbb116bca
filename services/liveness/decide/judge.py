"""The table of policies §6: what one look at an agent means. First that is true; each verdict with a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from services.liveness.decide.life import DOWN, Life, Status, believed, unsuspected
from services.liveness.decide.seen import Observation, Seen

AGAIN_S = 9.0
"""After the first that speaks of death it is looked at again: most flakes are over by then."""
SPREAD_S = 15.0
"""Between two observations that count as two. A flake lasts 2 to 15 s, and is seen twice at any distance below that: at
9 s the simulated fleet lost 0.4 healthy agents per agent-day to such (`make bench-fleet`)."""
MEMORY_S = 30.0
"""Within which the second must come."""
BLIND_S = 120.0


class Verdict(StrEnum):
    LEFT_ALONE = "left_alone"
    """Whatever it is, nobody restarts it."""
    BLIND = "blind"
    """Alive: the driver could not look. A wrong restart loses work, a late one only time."""
    ALIVE = "alive"
    WAIT = "wait"
    SUSPECT = "suspect"
    DEAD = "dead"
    WEDGED = "wedged"


class Reason(StrEnum):
    """Why. The last eight are also the reasons of restarts."""

    PAUSED = "paused"
    CORDONED = "cordoned"
    EXTERNAL = "external"
    REMOVED = "removed"
    DESIRED_STOPPED = "desired_stopped"
    DECLARED = "declared"
    PROBE_FAILED = "probe_failed"
    PROBE_BLIND = "probe_blind"
    RUNNING = "running"
    TRANSITION = "transition"
    BOOTING = "booting"
    SUSPECTED = "suspected"
    HELD = "held"
    FIRST_START = "first_start"
    STOPPED = "stopped"
    NOT_FOUND = "not_found"
    EXITED = "exited"
    UNHEARD = "unheard"
    WEDGED = "wedged"
    OPERATOR = "operator"
    CEILING = "ceiling"


@dataclass(frozen=True, slots=True)
class Doubt:
    """What speaks against our own eyes (policies §6, self-distrust)."""

    fleet: bool = False
    """A third of the engine's agents turned suspect within 30 s, or no heartbeat comes while proxies are heard."""
    deaf: bool = False
    """No proxy is heard: silence counts for nobody."""
    self_slow: bool = False
    """This replica has just started, or its own loop lags."""
    listening_since: datetime | None = None
    """Since when proxies are heard without a break: nobody's silence is older."""
    wedged_after_s: float = 240.0

    @property
    def any(self) -> bool:
        return self.fleet or self.deaf or self.self_slow


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    reason: Reason
    sentence: str
    life: Life


def judge(life: Life, seen: Observation, now: datetime, doubt: Doubt, *, exited: bool = False) -> Decision:
    """Judge one look. `exited`: it is no look, but the engine's word that this very container has ended."""
    if (alone := _left_alone(life)) is not None:
        if alone[0] is Reason.DESIRED_STOPPED and seen.speaks_of_death:
            life = believed(unsuspected(life), Status.OFFLINE, alone[1])
        return Decision(Verdict.LEFT_ALONE, *alone, life)
    if seen.seen is Seen.UNKNOWN:
        return _blind(life, seen, now)
    if life.blind_since is not None or (not life.known and seen.container_id is not None):
        life = replace(life, blind_since=None, known=life.known or seen.container_id is not None)
    if (wait := _waits(life, seen, now)) is not None:
        return Decision(Verdict.WAIT, *wait, life)
    if seen.seen is Seen.RUNNING:
        return _running(life, seen, now, doubt)
    return _stopped(life, seen, now, doubt, exited=exited)


def _waits(life: Life, seen: Observation, now: datetime) -> tuple[Reason, str] | None:
    """What is under way already (A-L-05, D-S9), or was given up."""
    if life.status in DOWN and life.boot_until is None:
        words = f"The driver says {seen.seen}; it was declared dead before, and its restart is on its way."
        return Reason.DECLARED, words
    if life.status is Status.GAVE_UP and not _is_anothers(life, seen):
        return Reason.DECLARED, f"The driver says {seen.seen}; it was given up ({life.reason})."
    if seen.seen is Seen.RUNNING:
        return None
    if seen.seen is Seen.TRANSITION:
        return Reason.TRANSITION, f"Somebody is at it: {seen.why or 'in transition'}."
    if life.boot_until is not None and now < life.boot_until:
        return Reason.BOOTING, f"It is booting: waiting until {_clock(life.boot_until)}, whatever is seen."
    return None


def _is_anothers(life: Life, seen: Observation) -> bool:
    """Whether it runs, and not as the start of ours that was given up because it never spoke."""
    same = seen.container_id == life.container_id and seen.started_at in (None, life.started_at)
    return seen.seen is Seen.RUNNING and not (life.unheard > 0 and same)


def _left_alone(life: Life) -> tuple[Reason, str] | None:
    """What is never restarted (A-L-18, D-S17)."""
    if life.removed:
        return Reason.REMOVED, "It was removed."
    if life.driver is None:
        return Reason.EXTERNAL, "No driver runs it: it is somebody else's to restart."
    if life.paused:
        return Reason.PAUSED, "It is paused: never restarted."
    if life.cordoned:
        return Reason.CORDONED, "It is cordoned: never restarted."
    if life.desired == "stopped":
        return Reason.DESIRED_STOPPED, "It is meant to be stopped."
    return None


def _blind(life: Life, seen: Observation, now: datetime) -> Decision:
    """An error is no death (A-L-01): it counts as alive, and forgets no suspicion."""
    since = life.blind_since or now
    life = replace(life, blind_since=since)
    blind_s = (now - since).total_seconds()
    if blind_s >= BLIND_S:
        words = f"The driver has not been able to look for {blind_s:.0f} s ({seen.why}): taken for alive."
        return Decision(Verdict.BLIND, Reason.PROBE_BLIND, words, life)
    words = f"The driver could not look ({seen.why}): taken for alive."
    return Decision(Verdict.BLIND, Reason.PROBE_FAILED, words, life)


def _running(life: Life, seen: Observation, now: datetime, doubt: Doubt) -> Decision:
    life = unsuspected(life)
    runs = (seen.container_id, seen.started_at or life.started_at)
    if (life.container_id, life.started_at) != runs:  # most looks find what was known: those copy nothing
        life = replace(life, container_id=runs[0], started_at=runs[1])
    if life.status is Status.GAVE_UP:
        # Somebody else has started it.
        life = believed(life, Status.ONLINE, "")
    if life.status is Status.RESTARTING and not life.expects_beats:
        life = believed(replace(life, boot_until=None, unheard=0), Status.ONLINE, "")
    if (unheard_s := _unheard_s(life, now, doubt)) is not None:
        words = f"It runs as {seen.container_id}, and in {unheard_s:.0f} s since its start it was never heard: dead."
        return Decision(Verdict.DEAD, Reason.UNHEARD, words, life)
    if _is_wedged(life, now, doubt):
        silent_s = (now - _last_sign(life, doubt)).total_seconds()
        words = f"It runs with {life.active} in hand, and for {silent_s:.0f} s it was neither heard nor got on."
        return Decision(Verdict.WEDGED, Reason.WEDGED, words, _as_wedged(life, words))
    return Decision(Verdict.ALIVE, Reason.RUNNING, f"It runs as {seen.container_id}.", life)


def _unheard_s(life: Life, now: datetime, doubt: Doubt) -> float | None:
    """How long we have listened in vain to what we started, once that is longer than its boot may take."""
    if life.status is not Status.RESTARTING or life.boot_until is None or life.restarted_at is None or doubt.any:
        return None
    boot_s = (life.boot_until - life.restarted_at).total_seconds()
    unheard_s = (now - max(life.restarted_at, doubt.listening_since or life.restarted_at)).total_seconds()
    return unheard_s if unheard_s >= boot_s else None


def _as_wedged(life: Life, words: str) -> Life:
    return life if life.status is Status.WEDGED else believed(life, Status.WEDGED, words)


def _is_wedged(life: Life, now: datetime, doubt: Doubt) -> bool:
    if doubt.any or life.active == 0 or not life.expects_beats or life.heard_at is None:
        return False
    if life.boot_until is not None and now < life.boot_until:
        return False  # what it had in hand was another life's, and so was the silence
    return (now - _last_sign(life, doubt)).total_seconds() >= doubt.wedged_after_s


def _last_sign(life: Life, doubt: Doubt) -> datetime:
    signs = (life.heard_at, life.progress_at, life.started_at, life.restarted_at, doubt.listening_since)
    return max(sign for sign in signs if sign is not None)


def _stopped(life: Life, seen: Observation, now: datetime, doubt: Doubt, *, exited: bool) -> Decision:
    reason = Reason.STOPPED if seen.seen is Seen.STOPPED else Reason.NOT_FOUND
    if exited:
        words = f"The engine says that {seen.container_id} has ended: dead at once."
        return Decision(Verdict.DEAD, Reason.EXITED, words, life)
    if not life.known and seen.seen is Seen.NOT_FOUND:
        return Decision(Verdict.DEAD, Reason.FIRST_START, "Its driver has never run it: it is started.", life)
    ago = _heard_ago(life, now, doubt)
    count, life = _counted(life, now)
    if count > 1:
        spread_s = (now - (life.suspected_at or now)).total_seconds()
        words = f"{count} of 2 within {MEMORY_S:.0f} s, {spread_s:.0f} s apart: dead, {_heard_words(life, ago)}."
        return Decision(Verdict.DEAD, reason, words, life)
    held = doubt.any and not _is_recent(life, ago)
    if not _is_recent(life, ago) and not held:
        return Decision(Verdict.DEAD, reason, f"The driver says {seen.seen}, {_heard_words(life, ago)}: dead.", life)
    since = life.suspected_at or now
    again = since + timedelta(seconds=AGAIN_S)
    at = again if now < again else since + timedelta(seconds=SPREAD_S)
    why = f", held ({_doubt_words(doubt)})" if held else ""
    words = f"{count} of 2 within {MEMORY_S:.0f} s, {_heard_words(life, ago)}{why}: waiting until {_clock(at)}."
    life = replace(life, next_check_at=at)
    life = believed(life, Status.SUSPECT, words) if life.status is not Status.SUSPECT else life
    return Decision(Verdict.SUSPECT, Reason.HELD if held else Reason.SUSPECTED, words, life)


def _counted(life: Life, now: datetime) -> tuple[int, Life]:
    """How many observations speak of death now: 2 where this one is far enough from the first, and not too far."""
    if life.suspected_at is not None:
        apart_s = (now - life.suspected_at).total_seconds()
        if SPREAD_S <= apart_s <= MEMORY_S:
            return 2, replace(life, suspected_last_at=now, suspicions=life.suspicions + 1)
        if 0 <= apart_s < SPREAD_S:
            last_at = max(now, life.suspected_last_at or now)
            return 1, replace(life, suspected_last_at=last_at, suspicions=life.suspicions + 1)
    return 1, replace(life, suspected_at=now, suspected_last_at=now, suspicions=1)


def _heard_ago(life: Life, now: datetime, doubt: Doubt) -> float | None:
    """Seconds since it was heard; after a time in which nobody was, since that ended. None: it never was."""
    if life.heard_at is None:
        return None
    since = life.heard_at if doubt.listening_since is None else max(life.heard_at, doubt.listening_since)
    return max(0.0, (now - since).total_seconds())


def _is_recent(life: Life, ago_s: float | None) -> bool:
    return ago_s is not None and ago_s <= life.window_s


def _heard_words(life: Life, ago_s: float | None) -> str:
    if ago_s is None:
        return "never heard"
    return f"heard {ago_s:.0f} s ago" + ("" if _is_recent(life, ago_s) else f" (its window is {life.window_s:.0f} s)")


def _doubt_words(doubt: Doubt) -> str:
    if doubt.deaf:
        return "no proxy is heard, so silence counts for nobody"
    return "many are suspect at once" if doubt.fleet else "this replica has just started or lags"


def _clock(moment: datetime) -> str:
    return moment.strftime("%H:%M:%S")
