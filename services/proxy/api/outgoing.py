"""What goes to an agent: its URL, our headers, the few headers of the caller that mean something to it, and the limits.

The caller's own Authorization never goes there; the agent knows us by the delivery token, which is computed and stored
nowhere, or by what its operator gave us for it.
"""

from __future__ import annotations

import hashlib
import hmac
from functools import lru_cache

from services.proxy.api.wire import Request
from services.proxy.copies import Copies
from services.proxy.copies.bounds import bounds_of
from services.proxy.decide import Workspace
from services.proxy.forward import Outgoing
from services.proxy.settings import Settings
from shared.agents import Limits, Until

_PASSED_ON = (b"accept", b"a2a-version", b"a2a-extensions", b"x-a2a-extensions", b"traceparent", b"tracestate")


@lru_cache(maxsize=8192)
def delivery_token(secret: str, workspace_id: str) -> str:
    """What an agent knows us by."""
    return hmac.new(secret.encode(), workspace_id.encode(), hashlib.sha256).hexdigest()


class Addresser:
    """Makes what is sent to agents."""

    def __init__(self, settings: Settings, copies: Copies) -> None:
        self._settings = settings
        self._copies = copies

    def outgoing(
        self,
        request: Request,
        workspace: Workspace,
        body: bytes,
        *,
        hops: int,
        queue_id: str | None,
        until: Until | None = None,
    ) -> Outgoing:
        """A request to the workspace's agent. `queue_id` is what it dedupes a message by; None: it is no message."""
        headers = [(b"content-type", request.headers.get(b"content-type", b"application/json"))]
        said = request.headers
        headers += [(name, said[name]) for name in _PASSED_ON if name in said]
        if queue_id is not None:
            told = queue_id.encode()
            headers += [(b"x-queue-id", told), (b"x-bide-delivery", b"0"), (b"x-bide-session", told)]
        headers.append((b"x-bide-hops", b"%d" % (hops + 1)))
        authorization = self.authorization(workspace)
        if authorization is not None:
            headers.append((b"authorization", authorization.encode()))
        use = self._copies.uses.of(workspace.workspace_id)
        return Outgoing(workspace.url, body, headers, self._limits(workspace), lambda: use.heard_at, until)

    def authorization(self, workspace: Workspace) -> str | None:
        """What this agent knows us by; None: nobody has given us anything."""
        if workspace.agent_authorization:
            return workspace.agent_authorization
        secret = self._settings.delivery_secret
        if secret is None:
            return None
        return f"Bearer {delivery_token(secret.get_secret_value(), workspace.workspace_id)}"

    def _limits(self, workspace: Workspace) -> Limits:
        settings = self._settings
        longest_s = bounds_of(workspace, settings).longest_s
        return _limits(settings.connect_timeout_s, settings.forward_idle_s, longest_s)


@lru_cache(maxsize=256)
def _limits(connect_timeout_s: float, idle_timeout_s: float, total_timeout_s: float) -> Limits:
    return Limits(connect_timeout_s, idle_timeout_s, total_timeout_s)
