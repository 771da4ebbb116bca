"""How much of each agent is in use: its own count, our live forwards, those of other proxies, and deliveries.

Counted as things happen, so that asking costs nothing per forward that ended long ago. The rule itself is
`shared/capacity.py`. It also holds what this replica tells the others (ProxyBeat).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from services.proxy.copies.backlogs import View
from services.proxy.copies.bounds import Bounds
from shared.capacity import FORWARDS_FRESH_S, Beat, counts_as_ended, in_use
from shared.facts import FLEET, Ended, ProxyBeat, Running, WorkspaceHeartbeat
from shared.settings import STOP_HEARD_S, TURN_SLACK_S

ENDED_KEEP_S = 60.0
_PEER_KEEP_S = 4 * FORWARDS_FRESH_S
"""How long another proxy's last beat is remembered."""
_IN_FLIGHT_S = 10.0
"""No beat is on its way for longer: an uptime that goes back later than this is the agent's own clock."""
_ENDED_MAX = 256
"""Ended forwards that are remembered per workspace. Beyond it a beat may count a little too much."""
_NOT_BEGUN = frozenset({"busy", "not_delivered"})
_MAY_GO_ON = frozenset({"unknown", "accepted"})
"""Begun, and not known to have ended: the agent's next beat will tell."""


@dataclass(slots=True)
class LiveForward:
    """One message on its way through this replica."""

    workspace_id: str
    session_id: str
    """What its agent got as X-Bide-Session, and what beats name it by."""
    key_hash: bytes
    started_at: float
    method: str = ""
    """As its caller wrote it: the dialect in which its agent is asked to cancel it."""
    task_id: str | None = None
    """The agent's own Task for it, once it has named one."""
    stop_reason: str | None = None
    """Why it was told to stop; None: it was not."""
    is_canceled: bool = False
    """Its agent was asked to cancel it, or is being asked."""
    incarnation: int = 0
    """The life of the agent that it went to."""
    hang_up: asyncio.Timeout | None = None
    """Ends it at once."""
    bounds: Bounds | None = None
    """What bounds it; None: nothing."""
    begun: float = field(default_factory=time.monotonic)
    until: float = float("inf")
    """When it is let go, in `time.monotonic()` seconds."""

    def __post_init__(self) -> None:
        if self.bounds is not None:
            self.until = self.begun + self.bounds.longest_s

    def bound(self, bounds: Bounds) -> None:
        """Take over its ceiling as it is now; a lowered one leaves the time in which a session is ended (C-K9)."""
        if bounds == self.bounds:
            return
        self.bounds = bounds
        self.until = max(self.begun + bounds.longest_s, time.monotonic() + bounds.grace_s + TURN_SLACK_S)

    def hear_stop(self, reason: str) -> None:
        """It is said to end, perhaps again.

        While it is being said the longest turn does not count: what ends the session knows better (policies §2).
        """
        self.stop_reason = self.stop_reason or reason
        self.until = max(self.until, time.monotonic() + STOP_HEARD_S)


@dataclass(slots=True)
class _Ended:
    session_id: str
    outcome: str
    started_at: float
    ended_at: float


@dataclass(slots=True)
class _Peer:
    """Another proxy's forwards, and how they count against the beat that is known."""

    rev: int
    at: float
    beat: ProxyBeat
    started: int = 0
    ended: int = 0


@dataclass(slots=True)
class Use:
    """One agent."""

    incarnation: int = 0
    beat: Beat | None = None
    beat_rev: int = 0
    heard_at: float = 0.0
    """`time.monotonic()` of the last beat: a silent turn of an agent that beats is not cut."""
    uptime_s: float | None = None
    """What its last beat said: the agent's own clock at the moment of its sample."""
    max_concurrent: int | None = None
    """What its last beat said, if it said something."""
    own: dict[str, LiveForward] = field(default_factory=dict)
    ended: deque[_Ended] = field(default_factory=lambda: deque(maxlen=_ENDED_MAX))
    peers: dict[str, _Peer] = field(default_factory=dict)
    deliveries: tuple[Running, ...] = ()
    delivered: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_ENDED_MAX))
    """(started, ended) of deliveries that a newer backlog no longer shows."""
    started_since: int = 0
    ended_since: int = 0
    delivering_since: int = 0

    def in_use(self, now: float, *, copy_is_stale: bool = False) -> int:
        """Tasks that the agent has in hand, as far as this replica knows.

        `copy_is_stale`: the queue service has long said nothing. Its last word that a delivery runs would hold an agent
        busy until it is back; whether that one is idle its own beats say.
        """
        running = len(self.own) + (0 if copy_is_stale else len(self.deliveries))
        started = self.started_since + self.delivering_since
        ended = self.ended_since
        for peer in self.peers.values():
            if now - peer.at < FORWARDS_FRESH_S:
                running += len(peer.beat.forwards)
                started += peer.started
                ended += peer.ended
        return in_use(now=now, beat=self.beat, running=running, started_since=started, ended_since=ended)

    def runs_key(self, key_hash: bytes, now: float) -> bool:
        """Whether a delivery, or a live forward of another proxy, has this key."""
        if self.deliveries and any(delivery.key_hash == key_hash for delivery in self.deliveries):
            return True
        return bool(self.peers) and any(
            forward.key_hash == key_hash
            for peer in self.peers.values()
            if now - peer.at < FORWARDS_FRESH_S
            for forward in peer.beat.forwards
        )

    def renew(self, incarnation: int) -> None:
        """Another life: what the last one said of itself is void."""
        if incarnation > self.incarnation:
            self.incarnation, self.beat, self.max_concurrent, self.uptime_s = incarnation, None, None, None
            self.beat_rev = 0

    def was_overtaken(self, incarnation: int, uptime_s: float | None) -> bool:
        """Whether a beat of the same process that was sampled later has come in a moment ago."""
        if uptime_s is None or self.uptime_s is None or incarnation != self.incarnation:
            return False
        return uptime_s < self.uptime_s and time.monotonic() - self.heard_at < _IN_FLIGHT_S

    def hear_heartbeat(self, fact: WorkspaceHeartbeat) -> None:
        # Within one life: a restarted agent may beat through a proxy whose clock is behind the last one's.
        if fact.incarnation < self.incarnation or (fact.incarnation == self.incarnation and fact.rev <= self.beat_rev):
            return
        self.incarnation = fact.incarnation
        self.beat_rev = fact.rev
        self.beat = Beat(fact.active_tasks, fact.rev / 1e6, fact.cadence_s)
        self.heard_at = time.monotonic()
        self.uptime_s = fact.uptime_s
        self.max_concurrent = fact.max_concurrent_tasks
        self.recount()

    def hear_peer(self, fact: ProxyBeat) -> None:
        known = self.peers.get(fact.proxy_id)
        if known is not None and fact.rev <= known.rev:
            return
        # An empty one is kept too, for its rev: an older beat that comes late must not revive what has ended.
        peer = _Peer(fact.rev, fact.occurred_at.timestamp(), fact)
        forgotten = peer.at - _PEER_KEEP_S
        self.peers = {name: each for name, each in self.peers.items() if each.at > forgotten}
        self.peers[fact.proxy_id] = peer
        self._recount_peer(peer)

    def hear_backlog(self, view: View) -> None:
        """Deliveries that are no longer named have ended; one that came back busy counts so too, as begun and ended."""
        named = {delivery.session_id for delivery in view.running}
        gone = [delivery for delivery in self.deliveries if delivery.session_id not in named]
        self.delivered.extend((delivery.started_at.timestamp(), view.at) for delivery in gone)
        self.deliveries = view.running
        self.recount()

    def recount(self) -> None:
        """Count anew against the beat: at every new beat and backlog, never per forward."""
        if self.beat is None:
            return
        if not (
            self.own or self.ended or self.delivered or self.deliveries or self.peers
        ):  # most agents, at most beats
            self.started_since = self.ended_since = self.delivering_since = 0
            return
        at = self.beat.at
        begun = [forward.started_at for forward in self.own.values()]
        begun += [each.started_at for each in self.ended if each.outcome not in _NOT_BEGUN]
        self.started_since = sum(started > at for started in begun) + sum(started > at for started, _ in self.delivered)
        self.ended_since = sum(
            counts_as_ended(each.ended_at, at)
            for each in self.ended
            if each.outcome not in _NOT_BEGUN and each.outcome not in _MAY_GO_ON
        ) + sum(counts_as_ended(ended, at) for _, ended in self.delivered)
        self.delivering_since = sum(delivery.started_at.timestamp() > at for delivery in self.deliveries)
        for peer in self.peers.values():
            self._recount_peer(peer)

    def _recount_peer(self, peer: _Peer) -> None:
        if self.beat is None:
            return
        at = self.beat.at
        begun = [each for each in peer.beat.ended if each.outcome not in _NOT_BEGUN]
        peer.started = sum(each.started_at.timestamp() > at for each in peer.beat.forwards)
        peer.started += sum(each.started_at.timestamp() > at for each in begun)
        peer.ended = sum(
            counts_as_ended(each.ended_at.timestamp(), at) for each in begun if each.outcome not in _MAY_GO_ON
        )


class Uses:
    """All agents, and what of them is to be told."""

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._uses: dict[str, Use] = {}
        self._rev = 0
        self.changed: set[str] = set()
        """Workspaces whose forwards have changed since they were told."""
        self.lively: dict[str, float] = {}
        """Workspaces of which beats are sent, changed or not → when the last one left: those with live forwards, or
        with ones that ended lately, or with a closed gate."""
        self.to_cancel: list[LiveForward] = []
        """Stopped, and of a Task that is known: their agents are to be asked."""
        self.wake: Callable[[], None] = lambda: None
        """Called when there is something to cancel."""

    def of(self, workspace_id: str) -> Use:
        found = self._uses.get(workspace_id)
        if found is None:
            found = self._uses[workspace_id] = Use()
        return found

    def begin(self, forward: LiveForward) -> None:
        use = self.of(forward.workspace_id)
        use.own[forward.session_id] = forward
        use.started_since += 1
        self.changed.add(forward.workspace_id)

    def end(self, forward: LiveForward, outcome: str, ended_at: float) -> None:
        use = self.of(forward.workspace_id)
        del use.own[forward.session_id]
        use.ended.append(_Ended(forward.session_id, outcome, forward.started_at, ended_at))
        if outcome in _NOT_BEGUN:
            after_beat = use.beat is None or forward.started_at > use.beat.at
            use.started_since -= after_beat
        elif outcome not in _MAY_GO_ON:
            use.ended_since += 1
        self.changed.add(forward.workspace_id)

    def stop(self, workspace_id: str, session_id: str, reason: str) -> LiveForward | None:
        """Mark a live forward as one that is to end; None: it is none of ours, or was marked before.

        It goes on to its natural end. Said again, its agent is asked again only where nothing reached it before.
        """
        use = self._uses.get(workspace_id)
        forward = use.own.get(session_id) if use is not None else None
        if forward is None:
            return None
        first = forward.stop_reason is None
        forward.hear_stop(reason)
        self._cancel(forward)
        return forward if first else None

    def name_task(self, forward: LiveForward, task_id: str) -> None:
        """Its agent has named its Task."""
        forward.task_id = task_id
        if forward.stop_reason is not None:
            self._cancel(forward)

    def _cancel(self, forward: LiveForward) -> None:
        if forward.task_id is None or forward.is_canceled:
            return
        forward.is_canceled = True
        self.to_cancel.append(forward)
        self.wake()

    def hang_up(self, forward: LiveForward) -> bool:
        """Let go of its agent. False: that was done before, or it is just ending."""
        if forward.hang_up is None or forward.hang_up.expired():
            return False
        forward.hang_up.reschedule(asyncio.get_running_loop().time())
        return True

    def live(self) -> list[tuple[str, list[LiveForward]]]:
        """All that run here, by workspace."""
        names = self.lively.keys() | self.changed
        return [(name, list(own.values())) for name in names if (own := self._uses[name].own)]

    def is_live(self, forward: LiveForward) -> bool:
        return self.of(forward.workspace_id).own.get(forward.session_id) is forward

    def running(self) -> int:
        return sum(len(self._uses[name].own) for name in self.lively.keys() | self.changed)

    def forget_ended(self, workspace_id: str, now: float) -> None:
        ended = self.of(workspace_id).ended
        while ended and ended[0].ended_at < now - ENDED_KEEP_S:
            ended.popleft()

    def fleet_beat(self) -> ProxyBeat:
        """Say that this replica lives."""
        self._rev += 1
        return ProxyBeat(workspace_id=FLEET, rev=self._rev, proxy_id=self._replica_id)

    def beat(self, workspace_id: str, view: View, now: float) -> ProxyBeat:
        """This replica's part of the beat for one workspace, under the next number."""
        self.forget_ended(workspace_id, now)
        use = self.of(workspace_id)
        self._rev += 1
        return ProxyBeat(
            workspace_id=workspace_id,
            rev=self._rev,
            proxy_id=self._replica_id,
            forwards=_running(use.own.values()),
            ended=[
                Ended(
                    session_id=each.session_id,
                    outcome=each.outcome,
                    started_at=_moment(each.started_at),
                    ended_at=_moment(each.ended_at),
                )
                for each in use.ended
            ],
            gate_generation=view.gate_generation,
            gate_until=_moment(view.gate_until) if view.gate_until is not None and view.is_shut(now) else None,
        )


def _running(forwards: Iterable[LiveForward]) -> Sequence[Running]:
    return [
        Running(session_id=each.session_id, key_hash=each.key_hash, started_at=_moment(each.started_at))
        for each in forwards
    ]


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
