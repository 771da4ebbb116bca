"""What the queue hears of workspaces: registrations, pauses, removals, heartbeats, and what proxies forward live."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from shared.facts import (
    Ended,
    ProxyBeat,
    Running,
    WorkspaceChanged,
    WorkspaceHeartbeat,
    WorkspaceRegistered,
    WorkspaceRemoved,
    WorkspaceStatus,
)
from tests.chaos.kit.model_base import Base, some
from tests.chaos.kit.model_clock import moment
from tests.chaos.kit.model_rig import Replica
from tests.chaos.kit.model_seat import Beat, Proxy, Seat

Said = tuple[list[float], list[tuple[float, str]]]
FORWARDS: st.SearchStrategy[Said] = st.just(([], [])) | st.tuples(
    st.lists(st.sampled_from([0.5, 4.0, 20.0]), max_size=2),
    st.lists(
        st.tuples(st.sampled_from([0.2, 3.0, 30.0]), st.sampled_from(["answered", "busy", "unknown"])), max_size=2
    ),
)


class Seats(Base):
    """Facts about workspaces, new and old."""

    @rule(
        by=some,
        index=some,
        maximum=st.integers(1, 3),
        paused=st.sampled_from([False, False, False, True]),
        once=st.sampled_from([False, False, True]),
        give_up_s=st.sampled_from([86_400.0, 120.0]),
        life=st.integers(0, 1),
        gone=st.sampled_from([False, False, False, True]),
        old=st.sampled_from([False, False, True]),
    )
    def register(self, by: int, index: int, *, gone: bool, **said: Any) -> None:
        """The registry says something new, or something old comes late; or that the workspace is gone."""
        replica, seat = self.pick(by), self.seat(index)
        self.run(self.removed(replica, seat) if gone else self.registered(replica, seat, **said))

    async def registered(
        self, replica: Replica, seat: Seat, *, maximum: int, paused: bool = False, once: bool = False,
        give_up_s: float = 86_400.0, life: int = 0, old: bool = False,
    ) -> None:  # fmt: skip
        self.revs[seat.name] += 1
        rev = max(0, seat.registry_rev - 1) if old else self.revs[seat.name]
        kind = WorkspaceChanged if rev % 2 else WorkspaceRegistered
        settings = {"delivery": "at_most_once" if once else "at_least_once", "give_up_after_s": give_up_s}
        fact = kind(
            workspace_id=seat.name, rev=rev, incarnation=max(1, seat.incarnation + life), url="http://agent.example",
            max_concurrent_tasks=maximum, settings=settings, paused=paused,
        )  # fmt: skip
        now = await self.rig.read(kind, replica.handlers.registered, [fact])
        if rev <= seat.registry_rev:
            return
        if seat.begin_life(fact.incarnation, now):
            seat.beat = None
            seat.open()
        self.model.pause(seat, now) if paused else self.model.go_on(seat, now)
        seat.registry_rev, seat.reachable, seat.removed = rev, True, False
        seat.maximum, seat.at_most_once, seat.give_up_after_s = maximum, once, give_up_s
        seat.least_maximum = min(seat.least_maximum, maximum)

    async def removed(self, replica: Replica, seat: Seat) -> None:
        self.revs[seat.name] += 1
        fact = WorkspaceRemoved(workspace_id=seat.name, rev=self.revs[seat.name])
        now = await self.rig.read(WorkspaceRemoved, replica.handlers.removed, [fact])
        self.model.go_on(seat, now)
        seat.registry_rev, seat.removed = fact.rev, True

    @rule(
        by=some, index=some,
        status=st.sampled_from(["offline", "offline", "restarting", "gave_up", "online", "suspect"]),
        life=st.sampled_from([-1, 0, 0, 0, 1]), old=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def declare(self, by: int, index: int, **said: Any) -> None:
        """Liveness says who is dead and who is not, about this life or another; or what it said before comes late."""
        self.run(self.declared(self.pick(by), self.seat(index), **said))

    async def declared(
        self, replica: Replica, seat: Seat, status: Any, *, life: int = 0, old: bool = False
    ) -> None:  # fmt: skip
        self.lives[seat.name] += 1
        rev = max(0, seat.word - 1) if old else self.lives[seat.name]
        fact = WorkspaceStatus(
            workspace_id=seat.name, rev=rev, incarnation=max(1, seat.incarnation + life), status=status, reason="",
        )  # fmt: skip
        now = await self.rig.read(WorkspaceStatus, replica.handlers.statuses, [fact])
        seat.hear_life(rev, fact.incarnation, down=status in {"offline", "restarting", "gave_up"}, now=now)
        self.seen["down" if seat.is_down else "up"] += 1

    @rule(
        by=some, index=some, active=st.sampled_from([0, 0, 0, 1, 1, 3]), life=st.sampled_from([-1, 0, 0, 0, 0, 1]),
        late_s=st.sampled_from([0.0, 0.0, 1.0, 4.0]), cadence_s=st.sampled_from([2.0, 30.0]),
    )  # fmt: skip
    def heartbeat(self, by: int, index: int, **said: Any) -> None:
        self.run(self.beaten(self.pick(by), self.seat(index), **said))

    async def beaten(
        self, replica: Replica, seat: Seat, *, active: int, life: int = 0, late_s: float = 0.0, cadence_s: float = 30.0
    ) -> None:
        at = self.clock.now() - late_s
        beat = Beat(max(0, seat.incarnation + life), round(at * 1e6), at, active, cadence_s, at + late_s)
        fact = WorkspaceHeartbeat(
            workspace_id=seat.name, rev=beat.rev, occurred_at=moment(at), incarnation=beat.incarnation,
            active_tasks=active, cadence_s=cadence_s,
        )  # fmt: skip
        await self.rig.read(WorkspaceHeartbeat, replica.handlers.heartbeats, [fact])
        seat.hear(beat)

    @rule(by=some, index=some, proxy=st.sampled_from("pq"), said=FORWARDS, old=st.sampled_from([None, None, 1, 2]))
    def forward(self, by: int, index: int, proxy: str, said: Said, old: int | None) -> None:
        """A proxy tells of its live forwards, or something that it told before comes late."""
        name = self.names[index % 2]
        known = self.beats.get((name, proxy), [])
        if old is not None and known:
            beat = known[-1 - old % len(known)]
        else:
            beat = self.proxy_beat(name, proxy, said, self.clock.now())

        async def hears() -> None:
            await self.rig.read(ProxyBeat, self.pick(by).handlers.proxy_beats, [beat])
            self.hear_proxy(beat)

        self.run(hears())

    def proxy_beat(self, name: str, proxy: str, said: Said, now: float) -> ProxyBeat:
        known = self.beats.setdefault((name, proxy), [])
        running = [Running(session_id=f"s{age}", started_at=moment(now - age)) for age in said[0]]
        ended = [
            Ended(session_id=f"e{age}", outcome=outcome, started_at=moment(now - age - 1), ended_at=moment(now - age))
            for age, outcome in said[1]
        ]
        beat = ProxyBeat(
            workspace_id=name,
            rev=len(known) + 1,
            proxy_id=proxy,
            occurred_at=moment(now),
            forwards=running,
            ended=ended,
        )
        known.append(beat)
        return beat

    def hear_proxy(self, beat: ProxyBeat) -> None:
        running = [each.started_at.timestamp() for each in beat.forwards]
        ended = [(each.started_at.timestamp(), each.ended_at.timestamp(), each.outcome) for each in beat.ended]
        proxy = Proxy(beat.rev, beat.occurred_at.timestamp(), running, ended)
        self.model.seat(beat.workspace_id).hear_proxy(beat.proxy_id, proxy)
