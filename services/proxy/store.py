"""The only SQL of proxy: the registry, and who may call. One method per step; rows come out as frozen values.

Whatever changes a workspace writes the fact that says so in the same transaction (outbox).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from services.proxy.decide import Workspace
from shared import outbox
from shared.database import Connection, Pool, load_queries, transact
from shared.facts import WorkspaceChanged, WorkspaceRegistered, WorkspaceRemoved

SQL = load_queries(Path(__file__).parent / "queries.sql")
UPTIME_SLACK_S = 5.0
"""Uptimes are rounded and beats travel: an agent that seems to have started this much later is still the same."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What an agent says of itself when it registers, checked."""

    workspace_id: str
    owner_caller: str
    url: str
    token_hash: bytes | None
    """A new token; None: the one it has stays."""
    agent_card: str | None
    capabilities: tuple[str, ...]
    max_concurrent: int
    heartbeat_interval_s: float
    boot_id: str | None


@dataclass(frozen=True, slots=True)
class Key:
    """An API key's owner."""

    caller_id: str
    rights: frozenset[str]


@dataclass(frozen=True, slots=True)
class Audit:
    """Who does it and what, for the record."""

    caller_id: str
    action: str
    detail: Mapping[str, Any]


class Store:
    """The registry in Postgres."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def all(self) -> list[Workspace]:
        return [_workspace(row) for row in await self._pool.fetch(SQL["all_workspaces"])]

    async def some(self, workspace_ids: Iterable[str]) -> list[Workspace]:
        return [_workspace(row) for row in await self._pool.fetch(SQL["some_workspaces"], list(workspace_ids))]

    async def find_token(self, digest: bytes) -> Workspace | Key | None:
        """Whose token this is: a workspace's, or a caller's key."""
        row = await self._pool.fetchrow(SQL["find_token"], digest)
        if row is not None:
            return _workspace(row)
        found = await self._pool.fetchrow(SQL["find_caller"], digest)
        return Key(found["caller_id"], frozenset(found["rights"])) if found else None

    async def insert_caller(self, digest: bytes, caller_id: str, rights: Sequence[str]) -> None:
        await self._pool.execute(SQL["insert_caller"], digest, caller_id, list(rights))

    async def insert_task_owners(self, owners: Sequence[tuple[bytes, bytes]]) -> None:
        """Remember which Task was given to which caller; said twice it is once."""
        await self._pool.execute(
            SQL["insert_task_owners"], [task for task, _ in owners], [whose for _, whose in owners]
        )

    async def find_task_owners(self, task_hashes: Sequence[bytes]) -> dict[bytes, set[bytes]]:
        """Who was given each of these Tasks."""
        found: dict[bytes, set[bytes]] = {}
        for row in await self._pool.fetch(SQL["find_task_owners"], list(task_hashes)):
            found.setdefault(row["task_hash"], set()).add(row["caller_hash"])
        return found

    async def forget_task_owners(self, older_than_s: float) -> None:
        await self._pool.execute(SQL["forget_task_owners"], older_than_s)

    async def register(self, enrolment: Enrolment, audit: Audit | None) -> tuple[Workspace, bool] | None:
        """Enrol or renew: the row and whether it is new. None: removed, or a process of the past."""

        async def work(connection: Connection) -> tuple[Workspace, bool] | None:
            row = await connection.fetchrow(
                SQL["register_workspace"], enrolment.workspace_id, enrolment.owner_caller, enrolment.url,
                enrolment.token_hash, enrolment.agent_card, list(enrolment.capabilities), enrolment.max_concurrent,
                enrolment.heartbeat_interval_s, enrolment.boot_id,
            )  # fmt: skip
            if row is None:
                return None
            await _tell(connection, WorkspaceRegistered, _workspace(row))
            await _record(connection, enrolment.workspace_id, audit)
            return _workspace(row), row["is_new"]

        return await transact(self._pool, work)

    async def renew_boot(self, workspace_id: str, boot_id: str) -> Workspace | None:
        """Another process of the agent speaks. None: another replica wrote it, or the process is one of the past."""
        return await self._change("renew_boot", WorkspaceRegistered, workspace_id, boot_id)

    async def renew_uptime(self, workspace_id: str, booted_at: float) -> Workspace | None:
        """Remember when an agent without boot ids started, or that it started anew. None: nothing is new."""
        return await self._change("renew_uptime", WorkspaceRegistered, workspace_id, booted_at, UPTIME_SLACK_S)

    async def update_card(self, workspace_id: str, card: str) -> Workspace | None:
        return await self._change("update_card", WorkspaceChanged, workspace_id, card)

    async def remove(self, workspace_id: str, audit: Audit) -> Workspace | None:
        """Remove it for ever. None: it is not there, or was removed before."""
        return await self._change("remove_workspace", WorkspaceRemoved, workspace_id, audit=audit)

    async def patch(self, workspace_id: str, changes: Mapping[str, Any], audit: Audit) -> Workspace | None:
        """Write `changes`: columns by name; `settings` is merged, a None takes one back. None: it is not there."""

        async def work(connection: Connection) -> Workspace | None:
            locked = await connection.fetchrow(SQL["lock_workspace"], workspace_id)
            if locked is None or locked["removed_at"] is not None:
                return None
            merged = {**json.loads(locked["settings"]), **changes.get("settings", {})}
            settings = {name: value for name, value in merged.items() if value is not None}
            runtime = json.dumps(changes["runtime"]) if "runtime" in changes else locked["runtime"]
            plain = (changes.get(name, locked[name]) for name in ("paused", "pause_note", "desired"))
            authorization = changes.get("agent_authorization", locked["agent_authorization"])
            row = await connection.fetchrow(
                SQL["write_settings"], workspace_id, json.dumps(settings), *plain, runtime, authorization
            )
            assert row is not None, "it is locked"
            await _tell(connection, WorkspaceChanged, _workspace(row))
            await _record(connection, workspace_id, audit)
            return _workspace(row)

        return await transact(self._pool, work)

    async def record(self, workspace_id: str, audit: Audit) -> None:
        """For the record alone: what is done is done elsewhere."""
        await self._pool.execute(
            SQL["insert_audit"], audit.caller_id, audit.action, workspace_id, json.dumps(audit.detail)
        )

    async def _change(
        self,
        query: str,
        kind: type[WorkspaceRegistered | WorkspaceRemoved],
        *arguments: Any,
        audit: Audit | None = None,
    ) -> Workspace | None:
        async def work(connection: Connection) -> Workspace | None:
            row = await connection.fetchrow(SQL[query], *arguments)
            if row is None:
                return None
            await _tell(connection, kind, _workspace(row))
            await _record(connection, row["workspace_id"], audit)
            return _workspace(row)

        return await transact(self._pool, work)


async def _tell(
    connection: Connection, kind: type[WorkspaceRegistered | WorkspaceRemoved], workspace: Workspace
) -> None:
    if kind is WorkspaceRemoved:
        await outbox.add(connection, [WorkspaceRemoved(workspace_id=workspace.workspace_id, rev=workspace.rev)])
        return
    fact = kind.model_validate(
        {
            "workspace_id": workspace.workspace_id,
            "rev": workspace.rev,
            "incarnation": workspace.incarnation,
            "url": workspace.url,
            "max_concurrent_tasks": workspace.max_concurrent,
            "heartbeat_interval_s": workspace.heartbeat_interval_s,
            "capabilities": workspace.capabilities,
            "settings": workspace.settings,
            "agent_authorization": workspace.agent_authorization,
            "paused": workspace.paused,
            "desired": workspace.desired,
            "runtime": workspace.runtime,
        }
    )
    await outbox.add(connection, [fact])


async def _record(connection: Connection, workspace_id: str, audit: Audit | None) -> None:
    if audit is not None:
        await connection.execute(
            SQL["insert_audit"], audit.caller_id, audit.action, workspace_id, json.dumps(audit.detail)
        )


def _workspace(row: asyncpg.Record) -> Workspace:
    same = (
        "workspace_id", "owner_caller", "url", "token_hash", "incarnation", "rev", "agent_authorization", "agent_card",
        "max_concurrent", "heartbeat_interval_s", "desired", "paused", "pause_note", "boot_id",
        "registered_boot",
    )  # fmt: skip
    return Workspace(
        **{name: row[name] for name in same},
        runtime=json.loads(row["runtime"]),
        settings=json.loads(row["settings"]),
        capabilities=tuple(row["capabilities"]),
        boots_past=tuple(row["boots_past"]),
        booted_at=row["booted_epoch"],
        removed=row["removed_at"] is not None,
    )
