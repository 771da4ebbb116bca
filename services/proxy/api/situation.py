"""What the policy of §1 is asked: everything this replica knows about a message's workspace at this moment."""

from __future__ import annotations

import time

from services.proxy.api.finding import presence
from services.proxy.api.identity import Caller
from services.proxy.api.message import Message, Wish
from services.proxy.api.wire import Request
from services.proxy.copies import Copies
from services.proxy.copies.limits import Limit
from services.proxy.decide import (
    Arrival,
    Head,
    InFlight,
    Share,
    Standing,
    Verdict,
    Workspace,
    is_stale,
    takes_place,
)
from services.proxy.settings import Settings
from shared.facts import Priority


class Situation:
    """Reads the copies, and counts what each caller does."""

    def __init__(self, settings: Settings, copies: Copies) -> None:
        self._settings = settings
        self._copies = copies
        self._rate = Limit(settings.caller_rate_per_s, settings.caller_burst)
        self._critical = Limit(settings.critical_per_minute / 60, settings.critical_per_minute)

    def head(
        self, request: Request, workspace: Workspace | None, standing: Standing, caller: Caller | None = None
    ) -> Head:
        """Read the head of a call, and count it as one of its caller's."""
        said = request.headers.get(b"x-bide-hops", b"0").strip()
        hops = int(said) if said.isdigit() and len(said) < 10 else None  # noqa: PLR2004 - no number of hops
        rate_wait_s = 0.0
        if caller is not None and not caller.is_operator:
            rate_wait_s = self._rate.take(caller.caller_hash, time.monotonic())
        return Head(
            presence=presence(workspace),
            standing=standing,
            hops=hops,
            hops_max=self._settings.hops_max,
            rate_wait_s=rate_wait_s,
        )

    def count(self, message: Message, arrival: Arrival, verdict: Verdict) -> bool:
        """Count a message that was decided on against its caller's quota; whether it was."""
        counts = message.priority is Priority.CRITICAL and takes_place(arrival, verdict)
        if counts:
            self._critical.spend(message.caller.caller_hash, time.monotonic())
        return counts

    def uncount(self, message: Message) -> None:
        """It took no place after all: the queue knew it, or it was never kept."""
        self._critical.give_back(message.caller.caller_hash)

    def arrival(self, head: Head, message: Message, workspace: Workspace) -> Arrival:
        now = time.time()
        copies, workspace_id = self._copies, workspace.workspace_id
        view, use = copies.backlogs.view(workspace_id), copies.uses.of(workspace_id)
        pending = copies.keeps.pending(workspace_id)
        key = (workspace_id, message.caller.caller_hash, message.key_hash)
        in_flight = InFlight.NO
        if message.has_key:
            in_flight = copies.flights.look(key, message.envelope.method, message.body_hash)
        status = copies.registry.status(workspace)
        copied_at = copies.backlogs.copied_at(workspace_id)
        copy_is_stale = is_stale(copied_at, now, self._settings.copy_stale_s)
        critical_wait_s = 0.0
        if message.priority is Priority.CRITICAL:
            critical_wait_s = self._critical.wait_s(message.caller.caller_hash, time.monotonic())
        own_not_before = message.not_before.timestamp() if message.not_before else None
        return Arrival(
            head=head,
            priority=message.priority,
            may_critical="critical" in message.caller.rights,
            critical_wait_s=critical_wait_s,
            in_flight=in_flight,
            keyed=message.explicit_key,
            repeated=message.repeated,
            known=self._known(message, workspace_id),
            key_running=use.runs_key(message.key_hash, now),
            limited_wait=message.wish is Wish.LIMITED,
            to_itself=message.caller.caller_id == workspace_id,
            queue_first=workspace.settings.get("admission") == "queue_first",
            share=self._share(message, workspace, view.waiting + pending, view.turn_s),
            backlog=view.waiting + pending,
            copied_at=copied_at,
            copy_stale_s=self._settings.copy_stale_s,
            paused=workspace.paused or workspace.desired == "stopped",
            status=status.status if status else None,
            gate_closed=view.is_shut(now),
            has_url=bool(workspace.url),
            not_before=_later(view.not_before, own_not_before),
            in_use=use.in_use(now, copy_is_stale=copy_is_stale),
            in_use_max=use.max_concurrent or workspace.max_concurrent,
            now=now,
        )

    def _known(self, message: Message, workspace_id: str) -> bool | None:
        if not (message.explicit_key or message.repeated):
            return None
        has, whose = self._copies.keeps.has, message.caller.caller_hash
        return has(workspace_id, whose, queue_id=message.queue_id, key_hash=message.key_hash) or None

    def _share(self, message: Message, workspace: Workspace, depth: int, turn_s: float | None) -> Share:
        if not depth:
            return Share(depth_max=self._depth_max(workspace))
        own, others = self._copies.keeps.share(workspace.workspace_id, message.caller.caller_hash)
        own = min(own, depth)
        # What waits and was not kept here is somebody's, and most likely not this caller's alone.
        return Share(
            depth=depth,
            depth_max=self._depth_max(workspace),
            callers=own,
            others=max(others, depth - own),
            turn_s=turn_s,
        )

    def _depth_max(self, workspace: Workspace) -> int:
        said = workspace.settings.get("queue_depth_max")
        return int(said) if said is not None else self._settings.queue_depth_max


def _later(one: float | None, other: float | None) -> float | None:
    return max(one, other) if one is not None and other is not None else one or other
