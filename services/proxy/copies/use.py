"""How much of one agent is in use: its own count, our live forwards, those of other proxies, and deliveries.

Counted as things happen, so that asking costs nothing per forward that ended long ago. The rule itself is
`shared/capacity.py`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from services.proxy.copies.backlogs import View
from services.proxy.copies.forwards import LiveForward
from shared.capacity import FORWARDS_FRESH_S, Beat, counts_as_ended, in_use
from shared.facts import ProxyBeat, Running, WorkspaceHeartbeat

_PEER_KEEP_S = 4 * FORWARDS_FRESH_S
"""How long another proxy's last beat is remembered."""
_IN_FLIGHT_S = 10.0
"""No beat is on its way for longer: an uptime that goes back later than this is the agent's own clock."""
_ENDED_MAX = 256
"""Ended forwards that are remembered per workspace. Beyond it a beat may count a little too much."""
NOT_BEGUN = frozenset({"busy", "not_delivered"})
MAY_GO_ON = frozenset({"unknown", "accepted"})
"""Begun, and not known to have ended: the agent's next beat will tell."""


@dataclass(slots=True)
class EndedForward:
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
    ended: deque[EndedForward] = field(default_factory=lambda: deque(maxlen=_ENDED_MAX))
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
        begun += [each.started_at for each in self.ended if each.outcome not in NOT_BEGUN]
        self.started_since = sum(started > at for started in begun) + sum(started > at for started, _ in self.delivered)
        self.ended_since = sum(
            counts_as_ended(each.ended_at, at)
            for each in self.ended
            if each.outcome not in NOT_BEGUN and each.outcome not in MAY_GO_ON
        ) + sum(counts_as_ended(ended, at) for _, ended in self.delivered)
        self.delivering_since = sum(delivery.started_at.timestamp() > at for delivery in self.deliveries)
        for peer in self.peers.values():
            self._recount_peer(peer)

    def _recount_peer(self, peer: _Peer) -> None:
        if self.beat is None:
            return
        at = self.beat.at
        begun = [each for each in peer.beat.ended if each.outcome not in NOT_BEGUN]
        peer.started = sum(each.started_at.timestamp() > at for each in peer.beat.forwards)
        peer.started += sum(each.started_at.timestamp() > at for each in begun)
        peer.ended = sum(
            counts_as_ended(each.ended_at.timestamp(), at) for each in begun if each.outcome not in MAY_GO_ON
        )
