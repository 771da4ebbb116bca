"""The live forwards of this replica, by agent, and what of them is told to the others (ProxyBeat)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from services.proxy.copies.backlogs import View
from services.proxy.copies.forwards import LiveForward
from services.proxy.copies.use import MAY_GO_ON, NOT_BEGUN, EndedForward, Use
from shared.facts import FLEET, Ended, ProxyBeat, Running

ENDED_KEEP_S = 60.0


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
        use.ended.append(EndedForward(forward.session_id, outcome, forward.started_at, ended_at))
        if outcome in NOT_BEGUN:
            after_beat = use.beat is None or forward.started_at > use.beat.at
            use.started_since -= after_beat
        elif outcome not in MAY_GO_ON:
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
