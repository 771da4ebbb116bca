"""The door: one ASGI app for everything that proxy serves on its port, and the table of its routes.

The two hot routes are looked for first. Health answers from the first moment; the rest is 503 until the service has its
servers, and again once it is told to stop: then nothing new is taken, and what was begun is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.proxy.api.a2a import A2A
from services.proxy.api.card import Cards
from services.proxy.api.lives import Lives
from services.proxy.api.openapi import DOCS, OPENAPI
from services.proxy.api.queue import Queue
from services.proxy.api.registry import Registrar
from services.proxy.api.schedules import Schedules
from services.proxy.api.sessions import Sessions
from services.proxy.api.verbs import Verbs
from services.proxy.api.wire import Refused, Request, Response, problem, rpc_error
from services.proxy.api.workspaces import Workspaces
from services.proxy.decide import Refuse
from services.proxy.metrics import ANSWERED, TAKEN
from shared.database import Trouble, classify
from shared.http import App, Receive, Scope, Send, health_app
from shared.telemetry import Health, log

STARTING = Refuse(503, "starting", "The proxy is starting. Send the request again.", retry_after_s=1)
STOPPING = Refuse(
    503, "stopping", "This proxy is being stopped. Send the request again; another one answers.", retry_after_s=1
)
DATABASE_AWAY = Refuse(
    503, "registry_away", "The registry does not answer now. Send the request again.", retry_after_s=2
)
BUG = Refuse(
    500, "internal_error", "Something broke inside the proxy; its log says what. Send the request again later."
)

Route = Callable[..., Awaitable[Response]]
_ID = r"(?P<workspace_id>[^/]+)"
_ITEM = r"(?P<queue_id>[^/]+)"
_ALL = f"/workspaces/{_ID}/schedules"
_ONE = rf"{_ALL}/(?P<schedule_id>[^/]+)"


@dataclass(frozen=True, slots=True)
class Api:
    """All routes, made once the servers are there."""

    a2a: A2A
    registrar: Registrar
    workspaces: Workspaces
    queue: Queue
    verbs: Verbs
    schedules: Schedules
    sessions: Sessions
    lives: Lives
    cards: Cards

    def table(self) -> Sequence[tuple[str, str, str, Route]]:
        """Method, path, name in metrics, route."""
        return (
            ("POST", "/registry/register", "register", self.registrar.register),
            ("POST", "/registry/update-card", "update_card", self.registrar.update_card),
            ("GET", f"/workspaces/{_ID}/.well-known/agent(-card)?\\.json", "card", self.cards.show),
            ("GET", f"/queue/{_ITEM}", "item", self.queue.show),
            ("GET", f"/queue/{_ITEM}/answer", "item", self.queue.answer),
            ("DELETE", f"/queue/{_ITEM}", "cancel_item", self.verbs.cancel),
            ("POST", f"/queue/{_ITEM}/retry", "retry_item", self.verbs.retry),
            ("POST", f"/queue/{_ITEM}/promote", "promote_item", self.verbs.promote),
            ("GET", f"/workspaces/{_ID}/queue", "queue", self.queue.list),
            ("POST", f"/workspaces/{_ID}/queue/cancel", "cancel_many", self.verbs.cancel_many),
            ("GET", "/dead-letters", "dead_letters", self.verbs.dead_letters),
            ("POST", "/dead-letters/(?P<letter>[^/]+)/replay", "replay", self.verbs.replay),
            ("GET", "/workspaces", "workspaces", self.workspaces.list),
            ("GET", f"/workspaces/{_ID}", "workspace", self.workspaces.show),
            ("PATCH", f"/workspaces/{_ID}", "patch", self.workspaces.patch),
            ("POST", f"/workspaces/{_ID}/pause", "pause", self.workspaces.pause),
            ("POST", f"/workspaces/{_ID}/resume", "resume", self.workspaces.resume),
            ("POST", f"/workspaces/{_ID}/remove", "remove", self.workspaces.remove),
            ("POST", f"/workspaces/{_ID}/stop", "stop", self.sessions.stop),
            ("POST", f"/workspaces/{_ID}/checkpoint", "checkpoint", self.sessions.checkpoint),
            ("POST", f"/workspaces/{_ID}/restart", "restart", self.lives.restart),
            ("GET", f"/workspaces/{_ID}/life", "life", self.lives.history),
            ("GET", _ALL, "schedules", self.schedules.list),
            ("POST", _ALL, "schedules", self.schedules.create),
            ("GET", _ONE, "schedule", self.schedules.show),
            ("PATCH", _ONE, "schedule", self.schedules.patch),
            ("DELETE", _ONE, "schedule", self.schedules.delete),
            ("POST", f"{_ONE}/run", "schedule", self.schedules.run),
            ("POST", f"{_ONE}/pause", "schedule", self.schedules.pause),
            ("POST", f"{_ONE}/resume", "schedule", self.schedules.resume),
            ("GET", f"{_ONE}/fires", "schedule", self.schedules.fires),
            ("GET", f"{_ONE}/preview", "schedule", self.schedules.preview),
            ("GET", "/openapi.json", "openapi", _openapi),
            ("GET", "/docs", "docs", _docs),
        )


async def _openapi(_request: Request) -> Response:
    return Response(200, OPENAPI)


async def _docs(_request: Request) -> Response:
    return Response(200, DOCS, b"text/html; charset=utf-8")


@dataclass(slots=True)
class Door:
    """Opened when the service can serve, closed when it is told to stop."""

    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _api: Api | None = None
    _routes: list[tuple[re.Pattern[str], str, str, Route]] = field(default_factory=list)
    _busy: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self, health: Health) -> App:
        """The ASGI app; `health` is asked for /livez and /readyz, and told that a closed door is not ready."""
        healthy = health_app(health)
        health.add("door", self._probe)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            if scope["path"] in ("/livez", "/readyz", "/metrics"):
                await healthy(scope, receive, send)
                return
            self._busy += 1
            try:
                await self._serve(Request(scope, receive, send))
            finally:
                self._busy -= 1
                if not self._busy:
                    self._idle.set()

        return app

    def open(self, api: Api) -> None:
        self._routes = [(re.compile(path), method, name, route) for method, path, name, route in api.table()]
        self._api = api

    async def close(self, drain_s: float) -> None:
        """Take nothing new; wait for what was begun, at most `drain_s`."""
        self.stopping.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._busy:
                    self._idle.clear()
                    await self._idle.wait()
        if self._busy:
            log.warning("drain_ended_early", requests=self._busy)

    async def _probe(self) -> None:
        if self.stopping.is_set():
            raise ConnectionRefusedError("it is stopping")

    async def _serve(self, request: Request) -> None:
        started = time.perf_counter()
        path = request.path
        if path.endswith("/a2a") and request.method == "POST" and path.startswith("/workspaces/"):
            name, word = "a2a", await self._a2a(request, path[12:-4])
        elif path == "/registry/heartbeat" and request.method == "POST" and self._api is not None:
            name, word = "heartbeat", await self._plain(request, self._api.registrar.heartbeat, {})
        else:
            name, word = await self._look_up(request)
        ANSWERED[name][word].inc()
        TAKEN[name].observe(time.perf_counter() - started)

    async def _a2a(self, request: Request, workspace_id: str) -> str:
        refuse = self._closed()
        if refuse is None and self._api is not None:
            try:
                return await self._api.a2a(request, workspace_id)
            except Exception as error:  # noqa: BLE001 - one request's trouble, told to its caller and logged
                refuse = _trouble(error, "a2a")
        response = rpc_error(refuse or STARTING, "null")
        with contextlib.suppress(RuntimeError):  # the answer had begun: the server cuts the connection
            await response.send(request.send)
        return "failed"

    async def _look_up(self, request: Request) -> tuple[str, str]:
        others: set[str] = set()
        for pattern, method, name, route in self._routes:
            match = pattern.fullmatch(request.path)
            if match is not None and method == request.method:
                return name, await self._plain(request, route, match.groupdict())
            if match is not None:
                others.add(method)
        if self._api is None:
            refuse = STARTING
        elif others or request.path == "/registry/heartbeat" or request.path.endswith("/a2a"):
            allowed = ", ".join(sorted(others or {"POST"}))
            refuse = Refuse(405, "method_not_allowed", f"This path takes {allowed}.")
        else:
            refuse = Refuse(
                404, "no_such_path", f"There is no {request.path[:200]!r} here. /openapi.json lists what is."
            )
        await problem(refuse).send(request.send)
        return "none", "refused"

    async def _plain(self, request: Request, route: Route, arguments: dict[str, str]) -> str:
        refuse, response = self._closed(), None
        if refuse is None:
            try:
                response = await route(request, **arguments)
            except Refused as error:
                refuse = error.refuse
            except Exception as error:  # noqa: BLE001 - as above
                refuse = _trouble(error, request.path)
        if refuse is not None or response is None:
            response = problem(refuse or STARTING)
        await response.send(request.send)
        if response.status < 400:  # noqa: PLR2004
            return "answered"
        return "refused" if response.status < 500 else "failed"  # noqa: PLR2004

    def _closed(self) -> Refuse | None:
        if self.stopping.is_set():
            return STOPPING
        return STARTING if self._api is None else None


def _trouble(error: Exception, where: str) -> Refuse:
    if classify(error) in (Trouble.INFRASTRUCTURE, Trouble.CONFLICT):
        log.warning("registry_away", error=f"{type(error).__name__}: {error}"[:200])
        return DATABASE_AWAY
    log.exception("request_failed", where=where[:200])
    return BUG
