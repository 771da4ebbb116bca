"""What the turns of both loops have in common: one bad row holds up no other, and no sleep is longer than a look.

A batch is one transaction. Where something of it cannot be written it is taken again, each row alone: that one is given
up, in whichever way its loop gives up, and the others go on. A server that is away is no row's fault, and is raised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.database import Connection, Pool, Trouble, classify, in_words, transact
from shared.loops import Loop
from shared.telemetry import log

_HELD_ELSEWHERE_S = 0.05
_SILENT_LOOKS = 2
_SILENT_MIN_S = 2.0
T = TypeVar("T")


async def take(
    pool: Pool, batch: Callable[[Connection], Awaitable[T]], singly: Callable[[Connection], Awaitable[T]]
) -> T:
    """Take a batch in one transaction; where that cannot be, take it `singly` in another."""
    try:
        return await transact(pool, batch)
    except Exception as error:
        if _is_nobodys_fault(error):
            raise
        log.warning("batch_repeated_singly", error=in_words(error))
        return await transact(pool, singly)


async def alone(
    connection: Connection, write: Callable[[], Awaitable[None]], give_up: Callable[[Exception], Awaitable[None]]
) -> bool:
    """Write what belongs to one row; where that cannot be, undo it and `give_up`. Say whether it was written."""
    try:
        async with connection.transaction():
            await write()
    except Exception as error:
        if _is_nobodys_fault(error):
            raise
        await give_up(error)
        return False
    return True


def sleep_s(until_s: float | None, look_s: float) -> float:
    """How long to sleep when the next moment is `until_s` away (None: there is none); what is due is held elsewhere."""
    if until_s is None:
        return look_s
    return min(max(until_s, _HELD_ELSEWHERE_S if until_s <= 0 else 0.001), look_s)


async def probe(loop: Loop, look_s: float) -> None:
    """For /readyz: a loop that stands still is seen after two of its longest sleeps (C-R6)."""
    await loop.probe(max(_SILENT_LOOKS * look_s, _SILENT_MIN_S))


def _is_nobodys_fault(error: Exception) -> bool:
    return classify(error) in {Trouble.INFRASTRUCTURE, Trouble.CONFLICT}
