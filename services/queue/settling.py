"""What a turn makes of endings: the fate of each, what that changes in its workspace, and what is told of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from services.queue import decide, fires, store
from services.queue.decide import Finish, Requeue, Workspace
from services.queue.deliver import Ending
from services.queue.metrics import ENDED
from services.queue.settings import Settings
from services.queue.store import Settled
from shared.database import Connection
from shared.facts import Fact, ItemChanged

_RIDES_ALONG_MAX = 64 << 10


async def settle(
    connection: Connection, endings: Sequence[Ending], workspaces: Mapping[str, Workspace], settings: Settings
) -> list[Settled]:
    """Give each ending its fate; what else is wanted of an item counts only where no real answer has come."""
    open_ = [
        ending.item.queue_id
        for ending in endings
        if decide.may_have_been_stopped(ending.reply, task_canceled=ending.task_canceled)
    ]
    instead = await fires.instead(connection, open_)
    return [
        _settled(each, workspaces[each.item.workspace_id], instead.get(each.item.queue_id, fires.NOTHING), settings)
        for each in endings
    ]


def _settled(ending: Ending, workspace: Workspace, instead: fires.Instead, settings: Settings) -> Settled:
    item = ending.item
    fate = decide.fate(
        ending.reply,
        attempts=item.attempts,
        deaths=item.deaths,
        at_most_once=item.at_most_once,
        cancel_requested=instead.canceled_as is not None or item.cancel_requested,
        canceled_as=instead.canceled_as or "canceled",
        stopped_for=instead.stopped_for,
        task_canceled=ending.task_canceled,
        critical_waits=workspace.waiting_critical > 0,
        attempts_max=settings.attempts_max,
        deaths_max=settings.deaths_max,
    )
    wait_s = 0.0
    if isinstance(fate, Requeue) and (fate.closes or fate.row_wait):
        wait_s = decide.busy_wait_s(
            workspace.busy_streak if fate.closes else item.attempts,
            retry_after_s=ending.retry_after_s,
            base_s=settings.busy_base_s,
            cap_s=settings.busy_cap_s,
            jitter=random.random(),  # noqa: S311 - spreads load, guards nothing
        )
    answer = ending.answer if isinstance(fate, Finish) else None
    return Settled(item, fate, answer, ending.error, wait_s)


def begin(workspace: Workspace, claimed: store.Claimed) -> Workspace:
    """Bring a workspace up to date with what was claimed in it."""
    priorities = [item.priority for item in claimed.items]
    return decide.begin(workspace, priorities, claimed.floors, served_critical=claimed.served_critical)


def account(workspace: Workspace, settled: Settled, row: store.Ended, now: float) -> Workspace:
    """Bring a workspace up to date with one item that ended or went back."""
    fate = settled.fate
    if row.was == "queued":  # a late success of an earlier delivery ended a row that waited again
        return decide.leave(workspace, row.priority)
    ended = decide.end(
        workspace, fate.ending, begun_at=row.dispatched_at, now=now, back_at=row.place, priority=row.priority
    )
    if isinstance(fate, Requeue) and fate.closes:
        return replace(ended, not_before=now + settled.wait_s, busy_streak=ended.busy_streak + 1)
    if fate.ending is decide.Ending.ANSWERED:
        return replace(ended, not_before=None, busy_streak=0)
    return ended


def ends(settled: Iterable[Settled], ended: Mapping[UUID, store.Ended]) -> Iterator[Fact]:
    """What is told of those that have ended, and of the fires that they were."""
    for each in settled:
        row = ended.get(each.item.queue_id)
        if row is None:
            continue
        yield _change(each, row)
        if row.fire is not None:
            assert isinstance(each.fate, Finish)
            began_at = row.dispatched_at if each.fate.ending is not decide.Ending.NEITHER else None
            yield fires.settled(
                row.workspace_id, row.queue_id, row.fire, each.fate.status, each.fate.reason, began_at=began_at
            )


def _change(settled: Settled, row: store.Ended) -> ItemChanged:
    """The fact that an item has ended."""
    assert isinstance(settled.fate, Finish)
    ENDED.labels(settled.fate.status.value).inc()
    answer = settled.answer
    return ItemChanged(
        workspace_id=row.workspace_id,
        rev=row.rev,
        queue_id=row.queue_id,
        status=settled.fate.status,
        reason=settled.fate.reason,
        delivery_no=settled.item.delivery_no,
        answer=answer if answer is not None and len(answer) <= _RIDES_ALONG_MAX else None,
        answer_bytes=len(answer) if answer is not None else None,
    )
