"""What queue does with the scheduler's words about sessions: it keeps the gate, stops deliveries, and hangs up.

A delivery is known by `queue_id:delivery_no`; a session of another kind is somebody else's. Every word is repeated
until the session has ended, so each of them may be lost, late or said twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from services.queue import decide, store
from services.queue.backlogs import read_backlogs
from services.queue.decide import Workspace
from services.queue.drain import Drain
from services.queue.gates import closed_gates
from services.queue.metrics import HANG_UPS, STOPS
from services.queue.settings import Settings
from services.queue.store import Locked, Stop, Stopped
from shared.broker import Publisher
from shared.database import Connection
from shared.facts import KillDone, SessionGate, SessionStop
from shared.intake import Tell
from shared.telemetry import log

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Sessions:
    """The handlers, bound to what they tell."""

    settings: Settings
    publisher: Publisher
    drain: Drain

    async def gate(self, connection: Connection, facts: Sequence[SessionGate]) -> Tell:
        """Close, renew or leave gates; say which are closed everywhere. It is said again with each renewal."""
        before = await store.lock(connection, {fact.workspace_id for fact in facts})
        after: dict[str, Workspace] = dict(before)
        renewed: set[str] = set()
        for fact in sorted(facts, key=lambda fact: fact.rev):
            name, until = fact.workspace_id, fact.gate_until.timestamp()
            after[name] = decide.hear_gate(
                after[name], fact.session_id, rev=fact.rev, closed=fact.closed, until=until, now=before.now
            )
            if fact.closed:
                renewed.add(name)
        await store.save(connection, before, after)
        moved = {name: workspace for name, workspace in after.items() if workspace != before[name]}
        backlogs = await read_backlogs(connection, moved, before.now)
        told = await closed_gates(
            connection, {name: after[name] for name in renewed}, before.now, silent_s=self.settings.proxy_silent_s
        )

        def tell() -> None:
            _log_gates(before, moved)
            for fact in (*backlogs, *told):
                self.publisher.post(fact)
            self.drain.wake(name for name, workspace in moved.items() if workspace.waiting)

        return tell

    async def stop(self, connection: Connection, facts: Sequence[SessionStop]) -> Tell:
        """Mark deliveries as to be stopped; whoever delivers them finds it at his next reread."""
        stopped = await _stop(connection, [(fact.workspace_id, fact.session_id, fact.reason, False) for fact in facts])

        def tell() -> None:
            for each in stopped:
                if each.first:
                    STOPS.labels(each.stop_reason if each.stop_reason in {"ceiling", "operator"} else "other").inc()
                    log.warning("session_stopped", **_about(each), reason=each.stop_reason)

        return tell

    async def kill_done(self, connection: Connection, facts: Sequence[KillDone]) -> Tell:
        """Hang up where nothing can be killed. A kill that was applied ends the connection by itself."""
        hopeless = [fact for fact in facts if fact.result == "not_killable"]
        stopped = await _stop(connection, [(fact.workspace_id, fact.session_id, "ceiling", True) for fact in hopeless])

        def tell() -> None:
            for each in stopped:
                HANG_UPS.inc()
                log.warning("session_hung_up", **_about(each), reason="not_killable")

        return tell


async def _stop(connection: Connection, wanted: Iterable[tuple[str, str, str, bool]]) -> list[Stopped]:
    """Under the lock of their workspaces, so that an ending that is being written sees it or comes after it."""
    deliveries: dict[tuple[UUID, int], Stop] = {}
    for name, session_id, reason, hangs_up in wanted:
        if (key := delivery_of(session_id)) is not None:
            known = deliveries.get(key, Stop(*key, name, reason, hangs_up=False))
            deliveries[key] = replace(known, hangs_up=known.hangs_up or hangs_up)
    if not deliveries:
        return []
    await store.lock(connection, {each.workspace_id for each in deliveries.values()})
    return await store.stop(connection, deliveries.values())


def delivery_of(session_id: str) -> tuple[UUID, int] | None:
    """The delivery that this session is; None: it is another kind of session."""
    queue_id, _, number = session_id.partition(":")
    if not _NUMBER.fullmatch(number):
        return None
    try:
        return UUID(queue_id), int(number)
    except ValueError:
        return None


def _about(stopped: Stopped) -> dict[str, object]:
    return {
        "queue_id": str(stopped.queue_id), "workspace_id": stopped.workspace_id, "delivery_no": stopped.delivery_no,
    }  # fmt: skip


def _log_gates(before: Locked, moved: Mapping[str, Workspace]) -> None:
    for name, workspace in moved.items():
        was, until = decide.gate_until(before[name], before.now), decide.gate_until(workspace, before.now)
        if was is None and until is not None:
            log.warning(
                "gate_closed", workspace_id=name, generation=workspace.gate_generation,
                sessions=decide.in_gate(workspace, before.now),
            )  # fmt: skip
        elif was is not None and until is None:
            log.info("gate_opened", workspace_id=name, generation=workspace.gate_generation)
