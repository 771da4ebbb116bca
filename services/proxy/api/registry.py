"""The agents' own routes: register, heartbeat, update-card.

The heartbeat touches no database: it is checked against the copy, told to the bus, and answered. Only another life of
the agent is written, under its row's lock.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from services.proxy.api.finding import Finding, presence
from services.proxy.api.forms import Heartbeat, Register, UpdateCard
from services.proxy.api.identity import Caller, Identity, digest, display
from services.proxy.api.outgoing import delivery_token
from services.proxy.api.wire import ModelT, Refused, Request, Response, answer, validated
from services.proxy.copies import Copies
from services.proxy.copies.directives import shape, taken
from services.proxy.decide import Head, Presence, Refuse, Workspace, admit
from services.proxy.metrics import DIRECTIVES, HEARTBEATS, INCARNATIONS, UNREGISTERED
from services.proxy.settings import Settings
from services.proxy.store import UPTIME_SLACK_S, Audit, Enrolment, Store
from shared.addresses import AddressRefused, AddressRules, check_url
from shared.broker import Publisher
from shared.facts import Acknowledged, WorkspaceHeartbeat
from shared.telemetry import log

HEARTBEAT_BYTES_MAX = 1 << 16
_NO_DIRECTIVES = b'{"status": "ok", "directives": []}'
_TOKEN_BYTES = 32

Told = Callable[[], None]
"""Wakes the relay: the outbox has something."""


class Registrar:
    """The routes, bound to what they touch."""

    def __init__(
        self,
        settings: Settings,
        copies: Copies,
        *,
        identity: Identity,
        finding: Finding,
        store: Store,
        publisher: Publisher,
        told: Told,
        rules: AddressRules,
    ) -> None:
        self._settings = settings
        self._copies = copies
        self._identity = identity
        self._finding = finding
        self._store = store
        self._publisher = publisher
        self._told = told
        self._rules = rules

    async def register(self, request: Request) -> Response:
        """Enrol an agent, or another life of one."""
        caller = await self._identity.require(request)
        body = await self._read(request, Register, self._settings.body_bytes_max)
        enrols = caller.is_admin or caller.is_operator
        if not enrols and caller.workspace_id != body.id:
            sentence = f"This token is not {body.id}'s. Enrol with the admin token, or with a key of an operator."
            raise Refused(Refuse(403, "not_yours", sentence))
        if body.url:
            self._check(body.url)
        token = secrets.token_urlsafe(_TOKEN_BYTES) if enrols else None
        before = self._copies.registry.find(body.id)
        found = await self._store.register(
            _enrolment(body, caller, token), Audit(caller.caller_id, "register", {"url": body.url}) if enrols else None
        )
        if found is None:
            raise Refused(await self._why_not(body.id))
        workspace, is_new = found
        self._renewed(workspace, before, "register")
        log.info("workspace_registered", workspace_id=body.id, incarnation=workspace.incarnation, is_new=is_new)
        return answer(200, self._registered(workspace, token))

    async def heartbeat(self, request: Request) -> Response:
        """Take a beat; directives for the agent travel in the answer."""
        received_at = time.time()  # before anything is waited for: the sample is older, and grows older with every wait
        caller = await self._identity.require(request)
        beat = await self._read(request, Heartbeat, HEARTBEAT_BYTES_MAX)
        if caller.workspace_id != beat.workspace_id and not caller.is_admin:
            raise Refused(Refuse(403, "not_yours", "A heartbeat is sent with the agent's own token."))
        workspace = await self._known(beat.workspace_id)
        workspace = await self._same_life(workspace, beat, received_at)
        use = self._copies.uses.of(workspace.workspace_id)
        if beat.boot_id is not None and use.was_overtaken(workspace.incarnation, beat.uptime_seconds):
            raise Refused(_OVERTAKEN)
        fact = WorkspaceHeartbeat(
            workspace_id=workspace.workspace_id,
            rev=int(received_at * 1e6),
            incarnation=workspace.incarnation,
            active_tasks=beat.active_tasks,
            max_concurrent_tasks=beat.max_concurrent_tasks,
            cadence_s=workspace.heartbeat_interval_s,
            progress=beat.progress,
            uptime_s=beat.uptime_seconds,
            runtime_state=display(beat.runtime_state) if beat.runtime_state else None,
            acknowledged=[
                Acknowledged(directive_id=each.id, result=display(each.result)) for each in beat.acknowledged
            ],
        )
        use.hear_heartbeat(fact)
        if fact.acknowledged:
            self._acknowledge(fact)
        self._publisher.post(fact)
        HEARTBEATS.inc()
        if workspace.is_unregistered:
            UNREGISTERED.inc()
        directives = self._directives(workspace)
        return answer(200, {"status": "ok", "directives": directives}) if directives else Response(200, _NO_DIRECTIVES)

    def _acknowledge(self, fact: WorkspaceHeartbeat) -> None:
        results = taken(fact.acknowledged)
        for directive_id in self._copies.directives.acknowledge(fact.workspace_id, results):
            log.info(
                "directive_acknowledged",
                workspace_id=fact.workspace_id,
                directive_id=str(directive_id),
                result=results[directive_id][:100],
            )

    async def update_card(self, request: Request) -> Response:
        caller = await self._identity.require(request)
        body = await self._read(request, UpdateCard, self._settings.body_bytes_max)
        if caller.workspace_id != body.workspace_id and not caller.is_operator:
            raise Refused(Refuse(403, "not_yours", "A card is changed with the agent's own token."))
        await self._known(body.workspace_id)
        workspace = await self._store.update_card(body.workspace_id, json.dumps(body.agent_card))
        if workspace is None:
            raise Refused(await self._why_not(body.workspace_id))
        self._copies.registry.put(workspace)
        self._told()
        return answer(200, {"status": "ok", "rev": workspace.rev})

    def _directives(self, workspace: Workspace) -> list[dict[str, Any]]:
        """What is asked of this agent now: told with each beat until it has been acknowledged."""
        told = self._copies.directives.of(workspace.workspace_id, workspace.incarnation, time.time())
        for each in told:
            DIRECTIVES.labels(each.kind.value, "told").inc()
        return [shape(each) for each in told]

    async def _same_life(self, workspace: Workspace, beat: Heartbeat, received_at: float) -> Workspace:
        """The row at the incarnation that this beat belongs to: written only where it is another life."""
        boot_id = display(beat.boot_id) if beat.boot_id else None
        by, renewed = "heartbeat", None
        if boot_id is not None and boot_id != workspace.boot_id:
            renewed = await self._store.renew_boot(workspace.workspace_id, boot_id)
            if renewed is None:
                workspace = await self._reread(workspace.workspace_id)
                if boot_id != workspace.boot_id:
                    raise Refused(_REPLACED)
        elif boot_id is None and workspace.boot_id is None and beat.uptime_seconds is not None:
            booted_at = received_at - beat.uptime_seconds
            if workspace.booted_at is None or booted_at > workspace.booted_at + UPTIME_SLACK_S:
                by, renewed = "uptime", await self._store.renew_uptime(workspace.workspace_id, booted_at)
                if renewed is None:
                    workspace = await self._reread(workspace.workspace_id)
        if renewed is None:
            return workspace
        self._renewed(renewed, workspace, by)
        if renewed.is_unregistered:
            log.warning("life_not_registered", workspace_id=workspace.workspace_id, incarnation=renewed.incarnation)
        return renewed

    async def _reread(self, workspace_id: str) -> Workspace:
        self._copies.registry.put_all(await self._store.some([workspace_id]))
        return await self._known(workspace_id)

    def _renewed(self, workspace: Workspace, before: Workspace | None, by: str) -> None:
        if before is not None and workspace.incarnation > before.incarnation:
            INCARNATIONS.labels(by).inc()
        self._copies.registry.put(workspace)
        self._copies.uses.of(workspace.workspace_id).renew(workspace.incarnation)
        self._told()

    async def _known(self, workspace_id: str) -> Workspace:
        workspace = await self._finding.find(workspace_id)
        refuse = admit(Head(presence=presence(workspace)))
        if refuse is not None or workspace is None:
            raise Refused(refuse or _REPLACED)
        return workspace

    async def _why_not(self, workspace_id: str) -> Refuse:
        rows = await self._store.some([workspace_id])
        if rows and not rows[0].removed:
            return _REPLACED
        removed = admit(Head(presence=Presence.REMOVED))
        assert removed is not None, "a removed workspace is refused"
        return removed

    def _check(self, url: str) -> None:
        try:
            check_url(url, self._rules)
        except AddressRefused as error:
            raise Refused(Refuse(422, "url_refused", f"The agent's url cannot be used. {error}")) from None

    def _registered(self, workspace: Workspace, token: str | None) -> dict[str, Any]:
        secret = self._settings.delivery_secret
        return {
            "status": "registered",
            "workspace_id": workspace.workspace_id,
            "incarnation": workspace.incarnation,
            "rev": workspace.rev,
            "max_concurrent_tasks": workspace.max_concurrent,
            "heartbeat_interval_s": workspace.heartbeat_interval_s,
            **({"auth_token": token} if token else {}),
            "delivery_token": delivery_token(secret.get_secret_value(), workspace.workspace_id) if secret else None,
        }

    async def _read(self, request: Request, kind: type[ModelT], bytes_max: int) -> ModelT:
        return validated(kind, await request.body(bytes_max, self._settings.body_read_s))


_REPLACED = Refuse(
    409, "process_replaced", "Another process of this agent has registered since. End this one, or start it anew."
)
_OVERTAKEN = Refuse(
    503, "beat_overtaken", "A beat that was sampled later came in before this one. Send the next one.", retry_after_s=1
)


def _enrolment(body: Register, caller: Caller, token: str | None) -> Enrolment:
    return Enrolment(
        workspace_id=body.id,
        owner_caller=caller.caller_id,
        url=body.url,
        token_hash=digest(token) if token else None,
        agent_card=json.dumps(body.agent_card) if body.agent_card is not None else None,
        capabilities=body.capabilities,
        max_concurrent=body.max_concurrent_tasks,
        heartbeat_interval_s=body.heartbeat_interval_s,
        boot_id=display(body.boot_id) if body.boot_id else None,
    )
