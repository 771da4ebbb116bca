"""Workspaces for their owners and operators: what is known of them now, their settings, their end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from services.proxy.api.finding import Finding, gone
from services.proxy.api.forms import Note, Patch
from services.proxy.api.identity import Identity, display
from services.proxy.api.lives import Lives
from services.proxy.api.sessions import NOT_KNOWN, Sessions, Shown, among
from services.proxy.api.wire import Refused, Request, Response, answer, validated
from services.proxy.copies import Copies
from services.proxy.copies.backlogs import View
from services.proxy.copies.keeps import Keep
from services.proxy.decide import Refuse, Workspace
from services.proxy.settings import Settings
from services.proxy.store import Audit, Store
from shared.facts import Priority
from shared.telemetry import log

PAGE_MAX = 500


COLUMNS = frozenset({"paused", "pause_note", "desired", "runtime", "agent_authorization"})
_OPERATORS = frozenset({"runtime", "agent_authorization"})
"""An agent's owner never chooses what liveness runs, nor as whom we speak to it."""
_ALIVE = frozenset({"online", "busy"})
"""Liveness says that it lives; how much it has in hand, and when it last beat, this replica knows better."""


class Workspaces:
    """The routes, bound to what they touch."""

    def __init__(
        self,
        settings: Settings,
        copies: Copies,
        *,
        identity: Identity,
        finding: Finding,
        store: Store,
        told: Callable[[], None],
        sessions: Sessions,
        lives: Lives,
    ) -> None:
        self._settings = settings
        self._copies = copies
        self._identity = identity
        self._finding = finding
        self._store = store
        self._told = told
        self._sessions = sessions
        self._lives = lives

    async def list(self, request: Request) -> Response:
        """Every workspace, by id; `cursor` is the last id of the page before."""
        await self._identity.require_operator(request)
        query = request.query()
        limit = _limit(query.get("limit"))
        after = query.get("cursor", "")
        rows = [row for row in self._copies.registry.all() if row.workspace_id > after and not row.removed]
        page = rows[:limit]
        more = len(rows) > limit
        named = await self._sessions.of_all([row.workspace_id for row in page]) if page else {}
        return answer(
            200,
            {
                "items": [self._show(row, among(named, row.workspace_id)) for row in page],
                "next_cursor": page[-1].workspace_id if more else None,
            },
        )

    async def show(self, request: Request, workspace_id: str) -> Response:
        caller = await self._identity.require(request)
        workspace = await self._finding.owned(caller, workspace_id)
        return answer(200, self._show(workspace, await self._sessions.of(workspace_id)))

    async def patch(self, request: Request, workspace_id: str) -> Response:
        """Change what is named; the answer is the workspace as it is now."""
        caller = await self._identity.require(request)
        await self._finding.owned(caller, workspace_id)
        patch = validated(Patch, await self._body(request))
        named = patch.model_fields_set
        if named & _OPERATORS and not caller.is_operator:
            sentence = f"Only an operator may set {', '.join(sorted(named & _OPERATORS))}."
            raise Refused(Refuse(403, "operator_only", sentence))
        changes = _changes(patch)
        return await self._write(workspace_id, changes, Audit(caller.caller_id, "patch", _shown(changes)))

    async def pause(self, request: Request, workspace_id: str) -> Response:
        """Let what comes wait. Said again without a note, the note of the first time stays."""
        caller = await self._identity.require(request)
        workspace = await self._finding.owned(caller, workspace_id)
        note = noted(await self._body(request))
        named = {"pause_note": note} if note is not None or not workspace.paused else {}
        audit = Audit(caller.caller_id, "pause", {"note": note})
        return await self._write(workspace_id, {"paused": True, **named}, audit)

    async def resume(self, request: Request, workspace_id: str) -> Response:
        """Let what waits go on, whatever liveness does; where an operator says it, also what was given up."""
        caller = await self._identity.require(request)
        await self._finding.owned(caller, workspace_id)
        note = noted(await self._body(request))
        audit = Audit(caller.caller_id, "resume", {"note": note})
        workspace = await self._patched(workspace_id, {"paused": False, "pause_note": None}, audit)
        told = await self._lives.resume(workspace_id, caller, note) if caller.is_operator else None
        return answer(200, {**self._show(workspace, NOT_KNOWN), "liveness": told})

    async def _body(self, request: Request) -> bytes:
        return await request.body(self._settings.body_bytes_max, self._settings.body_read_s)

    async def _write(self, workspace_id: str, changes: Mapping[str, Any], audit: Audit) -> Response:
        """Write what changes, tell everybody, and answer with the workspace as it is now."""
        # Whoever changes a setting does not ask for its sessions.
        return answer(200, self._show(await self._patched(workspace_id, changes, audit), NOT_KNOWN))

    async def _patched(self, workspace_id: str, changes: Mapping[str, Any], audit: Audit) -> Workspace:
        workspace = await self._store.patch(workspace_id, changes, audit)
        if workspace is None:
            raise Refused(gone(self._copies.registry.find(workspace_id)))
        self._copies.registry.put(workspace)
        self._told()
        names = sorted({*changes, *changes.get("settings", {})} - {"settings"})
        log.info("workspace_changed", workspace_id=workspace_id, changed=names, rev=workspace.rev)
        return workspace

    async def remove(self, request: Request, workspace_id: str) -> Response:
        """Remove it for ever; twice is once."""
        caller = await self._identity.require_operator(request)
        if await self._finding.find(workspace_id) is None:
            raise Refused(gone(None))
        workspace = await self._store.remove(workspace_id, Audit(caller.caller_id, "remove", {}))
        if workspace is not None:
            self._copies.registry.put(workspace)
            self._told()
            log.info("workspace_removed", workspace_id=workspace_id, rev=workspace.rev)
        return answer(200, {"workspace_id": workspace_id, "status": "removed"})

    def _show(self, workspace: Workspace, sessions: Shown) -> dict[str, Any]:
        now = time.time()
        use = self._copies.uses.of(workspace.workspace_id)
        view = self._copies.backlogs.view(workspace.workspace_id)
        in_use = use.in_use(now)
        in_use_max = use.max_concurrent or workspace.max_concurrent
        status, reason = self._status(workspace, in_use >= in_use_max, now)
        return {
            "workspace_id": workspace.workspace_id,
            "status": status,
            "status_reason": reason,
            "url": workspace.url or None,
            "owner": workspace.owner_caller,
            "max_concurrent_tasks": in_use_max,
            "in_use": in_use,
            "heartbeat_age_s": round(now - use.beat.at, 3) if use.beat else None,
            "incarnation": workspace.incarnation,
            "rev": workspace.rev,
            "settings": dict(workspace.settings),
            "capabilities": list(workspace.capabilities),
            "paused": workspace.paused,
            "pause_note": workspace.pause_note,
            "desired": workspace.desired,
            "has_agent_authorization": workspace.agent_authorization is not None,
            "gate_until": _moment(view.gate_until) if view.is_shut(now) else None,
            **sessions,
            "queue": _line(view, self._copies.keeps.promises(workspace.workspace_id), now),
        }

    def _status(self, workspace: Workspace, is_full: bool, now: float) -> tuple[str, str]:
        """Liveness' word where there is one; else what the beats say."""
        use = self._copies.uses.of(workspace.workspace_id)
        said = self._copies.registry.status(workspace)
        if workspace.paused:
            return "paused", workspace.pause_note or "it was paused"
        if said is not None and said.status not in _ALIVE:
            return said.status, said.reason
        if workspace.settings.get("heartbeat") != "none":
            if use.beat is None:
                return "offline", "it has not sent a heartbeat that this replica knows of"
            if not use.beat.is_fresh(now):
                return "offline", f"its last heartbeat came {now - use.beat.at:.0f} s ago"
        if workspace.is_unregistered:
            return "busy" if is_full else "online", _UNREGISTERED
        return ("busy", "everything it can do at once is in use") if is_full else ("online", "it can take a message")


_UNREGISTERED = "it beats, but this process of it has not registered: its url may be that of the last one"


def _line(view: View, promises: Collection[Keep], now: float) -> dict[str, Any]:
    """What waits, as the queue last said, and what this replica has promised since."""
    promised = Counter(keep.priority for keep in promises)
    since = [keep.promised_at for keep in promises] + ([view.oldest_at] if view.oldest_at is not None else [])
    return {
        "depth": view.waiting + len(promises),
        "by_priority": {each.value: view.by_priority.get(each, 0) + promised[each] for each in Priority},
        "oldest_age_s": round(max(0.0, now - min(since)), 3) if since else None,
        "turn_s": view.turn_s,
    }


def _moment(at: float | None) -> str | None:
    return datetime.fromtimestamp(at, UTC).isoformat() if at is not None else None


def _limit(said: str | None) -> int:
    if said is None:
        return 100
    if not said.isdigit() or not 1 <= int(said[:9]) <= PAGE_MAX:
        raise Refused(Refuse(400, "bad_value", f"limit is a number from 1 to {PAGE_MAX}."))
    return int(said)


def noted(body: bytes) -> str | None:
    """Why somebody does it: the note of a body that may also be left out."""
    note = validated(Note, body).note if body.strip() else None
    return display(note) if note else None


def _changes(patch: Patch) -> dict[str, Any]:
    said = {name: getattr(patch, name) for name in patch.model_fields_set}
    changes: dict[str, Any] = {name: value for name, value in said.items() if name in COLUMNS}
    if changes.get("pause_note"):
        changes["pause_note"] = display(changes["pause_note"])
    changes["settings"] = {name: value for name, value in said.items() if name not in COLUMNS}
    return changes


def _shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    """For the record: what changed, but not what nobody may read."""
    return {name: "…" if name == "agent_authorization" else value for name, value in changes.items()}
