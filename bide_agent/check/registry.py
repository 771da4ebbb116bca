"""A Bide that is only a registry: takes registrations and beats, gives out tokens and directives, and remembers all."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bide_agent.news import News
from bide_agent.server import Exchange, listen, serving, told

WAIT_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: when it came, and what it said."""

    at: float
    body: dict[str, Any]
    had_own_token: bool

    @property
    def active(self) -> int:
        said = self.body.get("active_tasks")
        return said if isinstance(said, int) else -1

    @property
    def acknowledged(self) -> dict[str, str]:
        said = self.body.get("acknowledged")
        given = said if isinstance(said, list) else []
        return {str(one.get("id")): str(one.get("result", "")) for one in given if isinstance(one, dict)}


@dataclass(slots=True)
class Registry:
    """What an agent told, and what it will be told."""

    enrolment: str
    """The token that it registers with at first."""
    url: str = ""
    own: str = ""
    delivery: str = field(default_factory=secrets.token_hex)
    registrations: list[dict[str, Any]] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)
    refused: int = 0
    """Requests with no token of ours, or an old one."""
    directives: list[dict[str, Any]] = field(default_factory=list)
    news: News = field(default_factory=News)

    @property
    def registration(self) -> dict[str, Any]:
        """The last one; empty: there was none."""
        return self.registrations[-1] if self.registrations else {}

    @property
    def cadence_s(self) -> float:
        said = self.registration.get("heartbeat_interval_s", 30.0)
        return float(said) if isinstance(said, int | float) else 30.0

    @property
    def max_concurrent(self) -> int:
        said = self.registration.get("max_concurrent_tasks", 1)
        return said if isinstance(said, int) and said > 0 else 1

    def revoke(self) -> None:
        """Forget the agent's own token, as a rotation elsewhere would."""
        self.own = secrets.token_hex()

    async def until(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Whether it came to hold in time; asked at every request."""
        try:
            await self.news.until(holds, min(within_s, WAIT_MAX_S))
        except TimeoutError:
            return holds()
        return True

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        shown = exchange.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            body = dict(told(await exchange.body()))
        except (ValueError, RecursionError):
            await exchange.problem(422, "Unreadable", "The body is no JSON object.")
            return
        is_own = bool(self.own) and secrets.compare_digest(shown.encode(), self.own.encode())
        match exchange.path:
            case _ if shown != self.enrolment and not is_own:
                self.refused += 1
                await exchange.problem(
                    401, "Unauthorized", "Nobody has this token. Use the one that register returned."
                )
            case "/registry/register":
                await self._register(exchange, body, is_own=is_own)
            case "/registry/heartbeat" if not self.registrations:
                await exchange.problem(404, "Not found", "There is no such workspace. Register it.")
            case "/registry/heartbeat":
                self.beats.append(Beat(time.monotonic(), body, is_own))
                await _say(exchange, {"status": "ok", "directives": self.directives})
            case path:
                await exchange.problem(404, "Not found", f"There is no {path} here: this is a registry for a trial.")
        self.news.tell()

    async def _register(self, exchange: Exchange, body: dict[str, Any], *, is_own: bool) -> None:
        self.registrations.append(body)
        fresh = {} if is_own else {"auth_token": secrets.token_urlsafe()}
        self.own = fresh.get("auth_token", self.own)
        await _say(exchange, {**fresh, "delivery_token": self.delivery, "incarnation": len(self.registrations)})


async def _say(exchange: Exchange, body: dict[str, Any]) -> None:
    await exchange.respond(200, json.dumps(body).encode())


@asynccontextmanager
async def registry(port: int, enrolment: str) -> AsyncIterator[Registry]:
    """Serve one for the length of the block. Raises `OSError`: the port is taken."""
    one = Registry(enrolment)
    with listen(port) as listener:
        one.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with serving(one, listener):
            yield one
            await asyncio.sleep(0)
