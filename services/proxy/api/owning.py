"""Task ownership: every call about a task is scoped to its caller, also where the task is an agent's own (2-http).

What another was given does not exist for this caller. An id that nobody was given goes to the agent, which knows it or
does not: a proxy that forgot something must not tell an owner that his task is gone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

from services.proxy.api.identity import Caller
from services.proxy.api.questions import NOBODYS
from services.proxy.copies import Copies
from services.proxy.copies.owners import task_hash
from services.proxy.decide import Refuse
from services.proxy.store import Store
from shared.database import classify
from shared.results import Kind, read_result
from shared.telemetry import log

UNCHECKED = Refuse(503, "owner_unchecked", "Whose task this is cannot be checked now. Ask again.", retry_after_s=1)
UNREADABLE = Refuse(
    502,
    "answer_unreadable",
    "The agent's answer could not be read, so nobody can say what of it is yours. Ask again.",
)
_LOOKUP_TIMEOUT_S = 2.0


class Owning:
    """Tells whose tasks are."""

    def __init__(self, copies: Copies, store: Store) -> None:
        self._owners = copies.owners
        self._store = store

    async def refuse(self, workspace_id: str, caller: Caller, task_ids: Iterable[str]) -> Refuse | None:
        """Say why this caller may not name these tasks; None: he may. An operator may name all of them."""
        if caller.is_operator:
            return None
        try:
            holders = await self._holders(workspace_id, caller, task_ids)
        except _UncheckedError:
            return UNCHECKED
        strange = any(held and caller.caller_hash not in held for held in holders.values())
        return NOBODYS if strange else None

    async def only_own(self, workspace_id: str, caller: Caller, listed: bytes) -> bytes | Refuse:
        """The agent's answer to ListTasks with this caller's tasks alone. An error of the agent stays as it is."""
        try:
            said = json.loads(listed)
            result = said["result"]
            tasks = [each for each in result["tasks"] if isinstance(each["id"], str)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return listed if read_result(listed).kind is Kind.ERROR else UNREADABLE
        try:
            holders = await self._holders(workspace_id, caller, [each["id"] for each in tasks])
        except _UncheckedError:
            return UNCHECKED
        result["tasks"] = [each for each in tasks if caller.caller_hash in holders[each["id"]]]
        if "totalSize" in result:
            result["totalSize"] = len(result["tasks"])  # how many others have is not told
        return json.dumps(said).encode()

    async def _holders(self, workspace_id: str, caller: Caller, task_ids: Iterable[str]) -> dict[str, set[bytes]]:
        """Who was given each of the tasks. Postgres is asked for those that are not known to be this caller's."""
        hashes = {task_id: task_hash(workspace_id, task_id) for task_id in task_ids}
        holders = {task_id: set(self._owners.of(hashed)) for task_id, hashed in hashes.items()}
        own = caller.caller_hash
        strange = [task_id for task_id, held in holders.items() if own not in held]
        found = await self._look_up([hashes[task_id] for task_id in strange]) if strange else {}
        for task_id in strange:
            # What is told here and not written yet counts too.
            holders[task_id] |= found.get(hashes[task_id], set()) | self._owners.of(hashes[task_id])
            if own in holders[task_id]:
                self._owners.learn((hashes[task_id], own))
        return holders

    async def _look_up(self, hashes: list[bytes]) -> dict[bytes, set[bytes]]:
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                return await self._store.find_task_owners(hashes)
        except Exception as error:
            if classify(error) is None:
                raise
            log.warning("owner_unchecked", error=type(error).__name__)
            raise _UncheckedError from error


class _UncheckedError(Exception):
    """Postgres does not answer."""
