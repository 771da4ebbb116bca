"""That a gate is closed everywhere: the fact that allows a kill, told only when each proxy that lives has said so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.queue import decide, store
from services.queue.backlogs import delivery, forwards, moment
from services.queue.decide import Workspace
from shared.database import Connection
from shared.facts import GateClosed


async def closed_gates(
    connection: Connection,
    workspaces: Mapping[str, Workspace],
    now: float,
    *,
    silent_s: float,
    unless: Mapping[str, Workspace] | None = None,
) -> list[GateClosed]:
    """Say of each session in a gate of these workspaces that it is closed, where it is; not if it was in `unless`.

    Nor of one that its owner is about to let go, for which nothing is to be killed.

    In the transaction that holds them, so that no delivery begins between the look and the word.
    """
    shut = {name: each for name, each in workspaces.items() if decide.gate_until(each, now) is not None}
    if not shut:
        return []
    heard = await store.living_proxies(connection, silent_s, moment(now))
    told: list[GateClosed] = []
    for name, workspace in shut.items():
        proxies = decide.living(workspace, heard, silent_s, now)
        until = decide.closed_until(workspace, proxies, now)
        known = unless is not None and decide.closed_until(unless[name], proxies, now) is not None
        if until is not None and not known:
            told += await _closed(connection, workspace, proxies, until, now)
    return told


async def _closed(
    connection: Connection, workspace: Workspace, proxies: Iterable[str], until: float, now: float
) -> list[GateClosed]:
    said = [workspace.forwards[proxy_id] for proxy_id in sorted(proxies)]
    rows = await store.running(connection, [workspace])
    in_flight = [delivery(row) for row in rows] + forwards(said)
    let_go = {
        each.session_id
        for each, row in zip(in_flight, rows, strict=False)
        if decide.is_being_let_go(workspace, row["stop_epoch"], now)
    }
    return [
        GateClosed(
            workspace_id=workspace.workspace_id,
            rev=workspace.rev,
            occurred_at=moment(now),
            session_id=session_id,
            incarnation=workspace.incarnation,
            generation=workspace.gate_generation,
            until=moment(until),
            in_flight=in_flight,
            foreign=decide.foreign(workspace, now),
            beat_at=moment(workspace.beat_at) if workspace.beat_at is not None else None,
            cadence_s=workspace.beat_cadence_s,
        )
        for session_id in decide.in_gate(workspace, now)
        if session_id not in let_go
    ]
