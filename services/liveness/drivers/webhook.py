"""Agents that a control plane runs: it is asked by signed requests, and does what they say once per Idempotency-Key.

`runtime` names its address (`url`), which only an operator may write. One POST per call, its body a JSON object
`{verb, workspace_id, expected, fence, targets}`; X-Bide-Signature is `sha256=` and the HMAC-SHA256 of timestamp, a dot
and the body under `BIDE_LIVENESS_WEBHOOK_SECRET`. The Idempotency-Key holds the fence. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from services.liveness.decide.seen import Observation, Seen
from services.liveness.drivers import CannotRunError, DriverError, Exit, FencedError, Killed, Target

_LOOK_S = 5.0
_CALL_S = 50.0
_ANSWER_MAX = 1 << 20
_PART = 1 << 16
_THREADS = 16
ModelT = TypeVar("ModelT", bound=BaseModel)


class Looked(BaseModel):
    """What a control plane says of one agent."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    seen: Seen
    container_id: str | None = None
    started_at: AwareDatetime | None = None
    why: str = ""


class Listed(BaseModel):
    """What it says of many."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    agents: dict[str, Looked] = {}


class Done(BaseModel):
    """What a kill met."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    result: Killed


class WebhookDriver:
    """Asks control planes; all of them know the one secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="webhook-driver")

    async def list(self, targets: Sequence[Target]) -> Mapping[str, Observation]:
        """One request to each control plane."""
        by_url: dict[str, list[str]] = defaultdict(list)
        for target in targets:
            by_url[target.runtime.get("url", "")].append(target.workspace_id)
        answers = await asyncio.gather(*(self._list(url, names) for url, names in by_url.items()))
        return {name: observation for answer in answers for name, observation in answer.items()}

    async def inspect(self, target: Target) -> Observation:
        unknown = Observation(Seen.UNKNOWN, why="it was not named in the answer")
        return (await self.list([target])).get(target.workspace_id, unknown)

    async def restart(self, target: Target, *, expected: str | None, fence: int) -> Observation:
        said = await self._order("restart", target, expected, fence)
        return _observation(_read(Looked, said))

    async def kill(self, target: Target, *, expected: str | None, fence: int) -> Killed:
        return _read(Done, await self._order("kill", target, expected, fence)).result

    async def exits(self) -> AsyncIterator[Exit]:
        """It does not tell of ends: they are found by looking."""
        await asyncio.Event().wait()
        yield Exit("", "")  # pragma: no cover - what makes it an iterator

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _list(self, url: str, names: Sequence[str]) -> Mapping[str, Observation]:
        try:
            status, said = await self._post(url, {"verb": "list", "targets": list(names)}, key=None, limit_s=_LOOK_S)
            agents = _read(Listed, said if status == HTTPStatus.OK else b"").agents
        except DriverError as error:
            return {name: Observation(Seen.UNKNOWN, why=str(error)) for name in names}
        return {name: _observation(agents[name]) for name in names if name in agents}

    async def _order(self, verb: str, target: Target, expected: str | None, fence: int) -> bytes:
        body = {"verb": verb, "workspace_id": target.workspace_id, "expected": expected, "fence": fence}
        key = f"{target.workspace_id}:{verb}:{fence}"
        status, said = await self._post(target.runtime.get("url", ""), body, key=key, limit_s=_CALL_S)
        match status:
            case HTTPStatus.OK:
                return said
            case HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
                raise CannotRunError(f"its control plane answered {status}: it does not know {target.workspace_id}")
            case HTTPStatus.CONFLICT | HTTPStatus.PRECONDITION_FAILED:
                raise FencedError(f"its control plane answered {status}: something else runs, or came later")
            case _:
                raise DriverError(f"its control plane answered {status}")

    async def _post(self, url: str, body: Mapping[str, Any], *, key: str | None, limit_s: float) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        said = json.dumps(body).encode()
        try:
            return await loop.run_in_executor(self._threads, self._exchange, url, said, key, limit_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DriverError(f"its control plane could not be asked: {type(error).__name__}: {error}") from error

    def _exchange(self, url: str, body: bytes, key: str | None, limit_s: float) -> tuple[int, bytes]:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise DriverError("`runtime` has no usable `url`")
        deadline = time.monotonic() + limit_s  # the timeout is only that of each byte
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=limit_s)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, self._headers(body, key))
            answer = connection.getresponse()
            said = b""
            while part := answer.read1(_PART):
                said += part
                if len(said) > _ANSWER_MAX:
                    raise DriverError("its answer is too long")
                if time.monotonic() > deadline:
                    raise DriverError("its answer does not come to an end")
            return answer.status, said
        finally:
            connection.close()

    def _headers(self, body: bytes, key: str | None) -> dict[str, str]:
        at = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "X-Bide-Timestamp": at,
            "X-Bide-Signature": f"sha256={sign(self._secret, at, body)}",
        }
        return headers | ({"Idempotency-Key": key} if key is not None else {})


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """What a control plane must find by itself before it believes a request."""
    return hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _read(kind: type[ModelT], said: bytes) -> ModelT:
    try:
        return kind.model_validate_json(said)
    except ValidationError as error:
        raise DriverError(f"its answer cannot be read: {error.errors()[0]['msg']}") from error


def _observation(looked: Looked) -> Observation:
    return Observation(looked.seen, looked.container_id, looked.started_at, looked.why)
