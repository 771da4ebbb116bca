"""The door: who is declared dead, and what becomes of orders and of restarts that nobody has begun (transaction 1)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from uuid_utils.compat import uuid7

from services.liveness import store
from services.liveness.decide import budget
from services.liveness.decide.judge import Reason
from services.liveness.decide.life import Life, Status, believed, unsuspected
from services.liveness.decide.orders import Ruling, rule
from services.liveness.metrics import ORDERS, RESTARTS, RESTARTS_ENDED
from services.liveness.store import SQL
from shared import outbox
from shared.database import Connection
from shared.facts import DirectiveKind, SessionDirective, SessionKill
from shared.telemetry import log

ERROR_MAX = 300
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
_ALIVE = frozenset({Reason.OPERATOR, Reason.CEILING, Reason.WEDGED})
"""Reasons that speak of an agent that runs: it goes down when its turn comes, not when that is decided."""


async def declare_dead(
    connection: Connection, life: Life, reason: Reason, evidence: str, now: datetime, *, notice_s: float = 0.0,
    backoff_s: float = budget.BACKOFF_FIRST_S,
) -> Life:  # fmt: skip
    """Transaction 1, inside the caller's, which holds the agent: open the restart, or give up. The caller saves it.

    `notice_s`: what an agent that can still hear gets before its turn. A request during a restart is that restart.
    """
    if await store.find_open(connection, life.workspace_id) is not None:
        ordered_at = now if reason in budget.UNBUDGETED else None
        await connection.execute(SQL["ask_again"], life.workspace_id, ordered_at)
        return life
    since = max(now - timedelta(seconds=budget.BUDGET_WINDOW_S), life.forgiven_at or _LONG_AGO)
    recent = await connection.fetchval(SQL["recent_restarts"], life.workspace_id, since)
    plan = budget.plan(life, reason, recent, now, backoff_s=backoff_s)
    if plan.due_at is None:
        RESTARTS_ENDED.labels("gave_up").inc()
        log.error("gave_up", workspace_id=life.workspace_id, why=plan.sentence)
        return believed(unsuspected(plan.life), Status.GAVE_UP, plan.sentence)
    due_at = plan.due_at + timedelta(seconds=notice_s)
    fence = await connection.fetchval(
        SQL["open_restart"], uuid7(), life.workspace_id, life.incarnation, reason.value, evidence,
        "kill" if reason is Reason.CEILING else "start", now, due_at,
    )  # fmt: skip
    if fence is None:
        return life  # the fence: somebody else was first, or it is another life
    RESTARTS.labels(reason.value).inc()
    log.warning("declared_dead", workspace_id=life.workspace_id, incarnation=life.incarnation, reason=reason.value,
                fence=fence, evidence=evidence, due=plan.sentence)  # fmt: skip
    after = replace(plan.life, fence=fence)
    if reason in _ALIVE:
        return after
    return believed(unsuspected(replace(after, boot_until=None)), Status.OFFLINE, evidence)


async def tell_and_restart(
    connection: Connection, life: Life, reason: Reason, evidence: str, now: datetime, *, notice_s: float,
    backoff_s: float = budget.BACKOFF_FIRST_S,
) -> Life:  # fmt: skip
    """Restart an agent that may still hear: it is asked to save its work first (A-L-19)."""
    notice_s = notice_s if life.heard_at is not None else 0.0
    after = await declare_dead(connection, life, reason, evidence, now, notice_s=notice_s, backoff_s=backoff_s)
    if after.fence > life.fence and notice_s > 0:
        directive = SessionDirective(
            workspace_id=life.workspace_id,
            rev=after.fence,
            directive_id=uuid7(),
            session_id=f"restart:{life.workspace_id}:{life.incarnation}:{after.fence}",
            incarnation=life.incarnation,
            kind=DirectiveKind.CHECKPOINT,
            reason="restart",
            deadline=now + timedelta(seconds=notice_s),
        )
        await outbox.add(connection, [directive])
    return after


async def order(
    connection: Connection, life: Life | None, fact: SessionKill, now: datetime, *, drivers: Collection[str]
) -> Life | None:
    """Take an order to kill: answer it, or open the restart whose kill answers it. `drivers`: those that may act."""
    opened = life is not None and await store.find_open(connection, life.workspace_id) is not None
    killed = await connection.fetchval(SQL["was_killed"], fact.workspace_id, fact.incarnation, now)
    ruling = rule(
        life, incarnation=fact.incarnation, ordered_at=fact.occurred_at, expires_at=fact.expires_at, is_opened=opened,
        was_killed=killed, drivers=drivers, now=now,
    )  # fmt: skip
    log.warning("kill_ordered", workspace_id=fact.workspace_id, session_id=fact.session_id, ruling=ruling.value)
    if ruling not in {Ruling.KILL, Ruling.JOIN}:
        await answer(connection, fact.order_id, ruling.value, now)
        return life
    assert life is not None
    return await declare_dead(connection, life, Reason.CEILING, f"ordered for session {fact.session_id}", now)


async def withdraw(connection: Connection, life: Life, result: str, now: datetime) -> bool:
    """End a restart that nobody has begun: its agent speaks again, or is another one, or is gone."""
    row = await connection.fetchrow(SQL["find_open"], life.workspace_id)
    if row is None or row["owner"] is not None:
        return False
    if result == "recovered" and row["reason"] == Reason.EXITED and row["incarnation"] == life.incarnation:
        return False  # its last words were on their way: the engine saw the end of this very container
    await end(connection, row["restart_id"], result, now)
    await settle_orders(connection, life, now)
    return True


async def end(
    connection: Connection, restart_id: UUID, result: str, now: datetime, *, error: str | None = None,
    owner: str | None = None,
) -> bool:  # fmt: skip
    words = error[:ERROR_MAX] if error is not None else None
    if await connection.fetchval(SQL["end_restart"], restart_id, now, result, words, owner) is None:
        return False
    RESTARTS_ENDED.labels(result).inc()
    return True


async def answer(connection: Connection, order_id: UUID, result: str, now: datetime) -> None:
    if await store.answer_order(connection, order_id, result, now):
        ORDERS.labels(result).inc()


async def settle_orders(connection: Connection, life: Life, now: datetime) -> None:
    """Answer the orders of a kill that will not happen: of another life they are stale, else they have expired."""
    for row in await connection.fetch(SQL["open_orders"], life.workspace_id):
        if row["incarnation"] < life.incarnation:
            await answer(connection, row["order_id"], "stale", now)
        elif life.removed:
            await answer(connection, row["order_id"], "already_ended", now)
        else:
            await answer(connection, row["order_id"], "expired", now)
