"""Somebody who talks to the proxy, as the stories need it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.agents import Agents

_ANSWER_MAX = 1 << 20


class Operator:
    """An operator, by the admin token."""

    def __init__(self, client: Agents, proxy: str, admin_token: str) -> None:
        self._client = client
        self._proxy = proxy
        self._headers = [
            (b"authorization", f"Bearer {admin_token}".encode()),
            (b"x-workspace-id", b"operator"),
            (b"content-type", b"application/json"),
        ]

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        raw = json.dumps(body).encode() if body is not None else b""
        url = f"{self._proxy}{path}"
        async with await self._client.send(url, raw, self._headers, method=method) as exchange:
            found: dict[str, Any] = json.loads(await exchange.read(_ANSWER_MAX))
            return found

    async def send(self, workspace: str, message_id: str, text: str) -> dict[str, Any]:
        """Send an agent a message; the answer, or the promise."""
        message = {"role": "user", "messageId": message_id, "parts": [{"kind": "text", "text": text}]}
        request = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
        return await self.call("POST", f"/workspaces/{workspace}/a2a", request)
