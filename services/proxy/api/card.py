"""The agent card at our origin: the agent's own, with every address of it replaced by ours and both dialects' fields.

Bindings that we do not serve are dropped, and so are signatures (they would not hold) and the agent's own security
schemes (its callers now speak to us, with their token).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from services.proxy.api.finding import Finding, presence
from services.proxy.api.identity import Identity
from services.proxy.api.wire import Refused, Request, Response
from services.proxy.decide import Head, Refuse, admit
from services.proxy.settings import Settings

_DROPPED = (
    "signatures",
    "securitySchemes",
    "security",
    "securityRequirements",
    "security_schemes",
    "supported_interfaces",
)
_VERSIONS = ("1.0", "0.3")
_CACHE = b"private, max-age=60"


class Cards:
    """GET /workspaces/{id}/.well-known/agent-card.json."""

    def __init__(self, settings: Settings, finding: Finding, identity: Identity) -> None:
        self._settings = settings
        self._finding = finding
        self._identity = identity

    async def show(self, request: Request, workspace_id: str) -> Response:
        await self._identity.require(request)
        workspace = await self._finding.find(workspace_id)
        refuse = admit(Head(presence=presence(workspace)))
        if refuse is not None or workspace is None:
            raise Refused(refuse or NO_CARD)
        if workspace.agent_card is None:
            raise Refused(NO_CARD)
        origin = (self._settings.public_url or request.origin()).rstrip("/")
        body = json.dumps(
            rewritten(json.loads(workspace.agent_card), f"{origin}/workspaces/{workspace_id}/a2a")
        ).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()
        headers = [(b"etag", tag), (b"cache-control", _CACHE), (b"vary", b"authorization, host")]
        if tag in request.headers.get(b"if-none-match", b""):
            return Response(304, b"", headers=headers)
        return Response(200, body, headers=headers)


NO_CARD = Refuse(404, "no_card", "The agent has registered without a card. Send it messages all the same.")


def rewritten(card: dict[str, Any], url: str) -> dict[str, Any]:
    """The card as we serve it, in the fields of 0.3 and of 1.0 at once."""
    ours = {name: value for name, value in card.items() if name not in _DROPPED}
    said = card.get("capabilities")
    capabilities = dict(said) if isinstance(said, dict) else {}
    # What the agent can: until streams are bridged, an idle one that cannot would answer JSON to a caller who streams.
    capabilities["streaming"] = capabilities.get("streaming") is True
    return {
        **ours,
        "name": str(card.get("name") or "agent"),
        "description": str(card.get("description") or ""),
        "version": str(card.get("version") or "0"),
        "url": url,
        "preferredTransport": "JSONRPC",
        "protocolVersion": "0.3.0",
        "additionalInterfaces": [{"url": url, "transport": "JSONRPC"}],
        "supportedInterfaces": [
            {"url": url, "protocolBinding": "JSONRPC", "protocolVersion": version} for version in _versions(card)
        ],
        "capabilities": capabilities,
        "defaultInputModes": card.get("defaultInputModes") or ["text/plain"],
        "defaultOutputModes": card.get("defaultOutputModes") or ["text/plain"],
        "skills": card.get("skills") or [],
    }


def _versions(card: dict[str, Any]) -> Sequence[str]:
    """What to call it in. We translate nothing: 1.0 to an agent that names only 0.x is a method that it does not know.

    A card without interfaces is of 0.3, and so the SDK of 1.0 reads it, which then speaks 0.3.
    """
    interfaces = card.get("supportedInterfaces") or card.get("supported_interfaces")
    said = [each for each in interfaces if isinstance(each, dict)] if isinstance(interfaces, list) else []
    named = (str(each.get("protocolVersion") or each.get("protocol_version") or "1.0") for each in said)
    return _VERSIONS if any(not version.startswith("0.") for version in named) else _VERSIONS[1:]
