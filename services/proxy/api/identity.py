"""Who calls: the token, what it is bound to, and whom it may speak for. No token is kept, only its sha256.

Known tokens cost no I/O. One that this replica's copy does not know is looked up in Postgres once, a few at a time;
that nobody has it is remembered for a moment, so that guessing is no load.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

from services.proxy.api.wire import Refused, Request
from services.proxy.copies import Copies
from services.proxy.decide import RESERVED_PREFIXES, Refuse, Standing, Workspace, refuse_standing
from services.proxy.metrics import TOKEN_LOOKUPS
from services.proxy.settings import Settings
from services.proxy.store import Key, Store
from shared.database import classify
from shared.telemetry import log

ADMIN = "admin"
"""The caller's name where the admin token claims none."""
ALL_RIGHTS = frozenset({"critical", "operator"})
_REMEMBERED_MAX = 10_000
_LOOKUPS_MAX = 4
_WAITING_MAX = 200
_LOOKUP_TIMEOUT_S = 2.0
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def display(text: str) -> str:
    """The text as it can be stored and shown: controls and lone surrogates as backslash escapes."""
    return _UNSHOWN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def digest(text: str) -> bytes:
    """The form in which a string that a caller chose is a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever calls, proven."""

    caller_id: str
    """As it is shown; `caller_hash` is of what was really said."""
    caller_hash: bytes
    rights: frozenset[str] = frozenset()
    is_admin: bool = False
    workspace_id: str | None = None
    """The workspace whose own token this is."""

    @property
    def is_operator(self) -> bool:
        return "operator" in self.rights


@lru_cache(maxsize=4096)
def _caller(name: str, rights: frozenset[str], is_admin: bool, workspace_id: str | None) -> Caller:
    return Caller(display(name), digest(name), rights, is_admin, workspace_id)


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: Key | None
    until: float


class Identity:
    """Tells callers by their tokens."""

    def __init__(self, settings: Settings, copies: Copies, store: Store) -> None:
        self._settings = settings
        self._copies = copies
        self._store = store
        token = settings.admin_token
        self._admin = hashlib.sha256(token.get_secret_value().encode()).digest() if token else None
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Task[Key | Workspace | None]] = {}
        self._slots = asyncio.Semaphore(_LOOKUPS_MAX)

    async def tell(self, request: Request) -> tuple[Standing, Caller | None]:
        """Say who calls, or why nobody knows."""
        token = _bearer(request.headers.get(b"authorization"))
        if token is None:
            return (Standing.FORGED if _is_reserved(_claimed(request)) else Standing.NONE), None
        hashed = hashlib.sha256(token).digest()
        claimed = _claimed(request)
        if self._admin is not None and hmac.compare_digest(hashed, self._admin):
            return _as_admin(claimed)
        found: Workspace | Key | None = self._copies.registry.find_token(hashed)
        if found is None:
            try:
                found = await self._find(hashed)
            except _UncheckedError:
                return Standing.UNSURE, None
        return _as_owner(found, claimed, hashed)

    async def require(self, request: Request) -> Caller:
        """The caller of a plain route.

        Raises:
            Refused: with the reason.
        """
        standing, caller = await self.tell(request)
        refuse = refuse_standing(standing)
        if refuse is not None:
            raise Refused(refuse)
        assert caller is not None
        return caller

    async def require_operator(self, request: Request) -> Caller:
        caller = await self.require(request)
        if not caller.is_operator:
            sentence = "This is for operators. Use the admin token, or a key with the right `operator`."
            raise Refused(Refuse(403, "operator_only", sentence))
        return caller

    async def _find(self, hashed: bytes) -> Workspace | Key | None:
        remembered = self._remembered.get(hashed)
        if remembered is not None and remembered.until > time.monotonic():
            return remembered.key
        task = self._lookups.get(hashed)
        if task is None:
            if len(self._lookups) >= _WAITING_MAX:
                raise _UncheckedError
            task = self._lookups[hashed] = asyncio.create_task(self._look_up(hashed))
            task.add_done_callback(lambda _: self._lookups.pop(hashed, None))
        return await asyncio.shield(task)

    async def _look_up(self, hashed: bytes) -> Workspace | Key | None:
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S), self._slots:
                found = await self._store.find_token(hashed)
        except Exception as error:
            if classify(error) is None:
                raise
            log.warning("token_unchecked", error=type(error).__name__)
            TOKEN_LOOKUPS.labels("failed").inc()
            raise _UncheckedError from error
        if isinstance(found, Workspace):
            self._copies.registry.put(found)
            TOKEN_LOOKUPS.labels("workspace").inc()
            return found
        TOKEN_LOOKUPS.labels("key" if found else "nobody").inc()
        fresh_s = self._settings.key_fresh_s if found else self._settings.token_unknown_s
        self._remembered[hashed] = _Remembered(found, time.monotonic() + fresh_s)
        self._remembered.move_to_end(hashed)
        while len(self._remembered) > _REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return found


class _UncheckedError(Exception):
    """Nobody can say now whose token this is."""


def _bearer(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None


def _claimed(request: Request) -> str | None:
    said = request.headers.get(b"x-workspace-id")
    return said.strip().decode("utf-8", "surrogateescape") if said else None


def _is_reserved(name: str | None) -> bool:
    return name is not None and name.lower().startswith(RESERVED_PREFIXES)


def _as_admin(claimed: str | None) -> tuple[Standing, Caller | None]:
    if _is_reserved(claimed):
        return Standing.FORGED, None
    return Standing.GOOD, _caller(claimed or ADMIN, ALL_RIGHTS, True, None)  # noqa: FBT003


def _as_owner(found: Workspace | Key | None, claimed: str | None, hashed: bytes) -> tuple[Standing, Caller | None]:
    if _is_reserved(claimed):
        return Standing.FORGED, None
    match found:
        case Workspace() if hmac.compare_digest(found.token_hash, hashed):
            caller = _caller(found.workspace_id, frozenset(), False, found.workspace_id)  # noqa: FBT003
            name = found.workspace_id
        case Key():
            caller = _caller(found.caller_id, found.rights, False, None)  # noqa: FBT003
            name = found.caller_id
        case _:
            return Standing.UNKNOWN, None
    if claimed is not None and claimed != name:
        return Standing.MISMATCH, None
    return (Standing.FORGED, None) if _is_reserved(name) else (Standing.GOOD, caller)
