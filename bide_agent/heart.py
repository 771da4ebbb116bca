"""The heart of an agent: registers it, beats, and passes on the directives in the replies.

Nothing that Bide answers or fails to answer ends it: a beat that fails is tried again, later each time.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from typing import Any, Protocol

from bide_agent import client
from bide_agent.client import Reply, UnreachableError
from bide_agent.decide import Result
from bide_agent.directives import Directives
from bide_agent.tokens import Tokens

RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0

log = logging.getLogger("bide_agent")
_random = random.SystemRandom()


class Body(Protocol):
    """What a heart beats for."""

    url: str
    wake: asyncio.Event
    tokens: Tokens

    @property
    def workspace(self) -> str: ...
    @property
    def heartbeat_s(self) -> float: ...
    @property
    def is_deaf(self) -> bool:
        """It registers, and says no more."""

    def registration(self) -> dict[str, Any]:
        """What it registers with."""

    def alive(self) -> dict[str, Any]:
        """What a beat tells, all of it each time; what was acknowledged is added."""

    def news_of_heart(self) -> None:
        """It has registered, or Bide has taken a beat."""


class Heart:
    """Beats on the declared cadence, and at once when `body.wake` is set (a turn ended, a directive came)."""

    def __init__(self, body: Body, bide: str, directives: Directives) -> None:
        self._body = body
        self._directives = directives
        self._bide = bide.rstrip("/")
        self._failures = 0
        self.registered = asyncio.Event()
        self.incarnation: int | None = None
        self.beats = 0
        """Beats that Bide has taken."""

    async def run(self) -> None:
        """Register, then beat, until canceled."""
        while True:
            self._body.wake.clear()
            try:
                reached = await self._turn()
            except UnreachableError as error:
                self._say("bide_unreachable", reason=str(error))
                reached = False
            if reached:
                self._failures = 0
                await self._pause()
            else:
                self._failures += 1
                await asyncio.sleep(retry_s(self._failures, self._body.heartbeat_s))

    async def _turn(self) -> bool:
        if not self.registered.is_set() and not await self._register():
            return False
        return self._body.is_deaf or await self._beat()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._body.heartbeat_s):
                await self._body.wake.wait()

    async def _register(self) -> bool:
        body = self._body
        reply = await self._post("/registry/register", body.registration())
        told = reply.json()
        if reply.status != 200 or "delivery_token" not in told:  # noqa: PLR2004 - HTTP; a gateway may say 200 too
            self._say("registration_refused", status=reply.status, detail=told.get("detail"))
            return False
        if isinstance(told.get("auth_token"), str):  # told once; afterwards the kept one goes on
            body.tokens.keep(told["auth_token"])
        body.tokens.delivery = told["delivery_token"]
        if body.tokens.delivery is None:
            self._say("everybody_is_let_in", reason="this Bide has no BIDE_DELIVERY_SECRET to show itself by")
        self.incarnation = told.get("incarnation")
        self.registered.set()
        body.news_of_heart()
        log.info("registered workspace=%s incarnation=%s url=%s", body.workspace, self.incarnation, body.url)
        return True

    async def _beat(self) -> bool:
        acknowledged = self._directives.unsaid()
        reply = await self._post("/registry/heartbeat", self._facts(acknowledged))
        if reply.status in {401, 404}:
            self.registered.clear()
        if reply.status != 200:  # noqa: PLR2004 - HTTP
            self._say("heartbeat_refused", status=reply.status, detail=reply.json().get("detail"))
            return False
        self._directives.said(acknowledged)
        self.beats += 1
        directives = reply.json().get("directives")
        for directive in directives if isinstance(directives, list) else []:
            self._directives.hear(directive)
        self._body.news_of_heart()
        return True

    def _facts(self, acknowledged: dict[str, Result]) -> dict[str, Any]:
        said = [{"id": one, "result": result.value} for one, result in acknowledged.items()]
        return {**self._body.alive(), "acknowledged": said}

    async def _post(self, path: str, body: dict[str, Any]) -> Reply:
        """Post with the token of the day; where it is refused and the file holds another one, once more with that."""
        tokens = self._body.tokens
        shown = tokens.shown
        reply = await client.post(self._bide + path, body, token=shown)
        if reply.status == 401 and tokens.refused(shown):  # noqa: PLR2004 - HTTP
            reply = await client.post(self._bide + path, body, token=tokens.shown)
        return reply

    def _say(self, event: str, **facts: object) -> None:
        told = " ".join(f"{name}={value!r}" for name, value in facts.items())
        log.warning("%s workspace=%s %s", event, self._body.workspace, told)


def retry_s(failures: int, cadence_s: float) -> float:
    """How long to wait after so many failures in a row: doubling, with jitter, never longer than the cadence or 5 s."""
    longest = min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 10), RETRY_MAX_S, max(cadence_s, RETRY_FIRST_S))
    return longest * (0.5 + _random.random() / 2)
