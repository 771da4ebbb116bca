"""The loop of sessions: takes in the queue's newest snapshot, takes the steps that are due, sleeps until the next.

Every replica turns it and no one leads: a snapshot is taken in by one of them, a session is stepped by whoever holds
its row. What a step says is said after its commit and again by a later step, so a replica that dies in between repeats
nothing and loses nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

from services.scheduler import decide, store, turns
from services.scheduler.decide import Began, Closing, Session, State
from services.scheduler.metrics import KILLS, KILLS_WAITING, OPEN, UNENFORCEABLE
from services.scheduler.sessions import telling
from services.scheduler.sessions.ending import end
from services.scheduler.sessions.snapshots import take_in
from services.scheduler.sessions.telling import Turn
from services.scheduler.settings import Settings
from services.scheduler.store import SQL
from shared.broker import Publisher
from shared.database import Connection, Pool, in_words, transact
from shared.facts import BacklogSnapshot, GateClosed, KillDone
from shared.intake import Tell
from shared.loops import Loop
from shared.snapshots import Assembly
from shared.telemetry import log

_BATCH = 200
_MEASURE_S = 5.0
_FAILED_S = 60.0
"""How long a session is left alone whose step could not be taken."""


class Sessions:
    """`loop` steps; the handlers are those of the facts about sessions. `told` is called after a kill was ordered."""

    def __init__(self, settings: Settings, pool: Pool, publisher: Publisher, *, told: Callable[[], None]) -> None:
        self._settings = settings
        self._pool = pool
        self._publisher = publisher
        self._told = told
        self._assembly = Assembly()
        self._newest: list[BacklogSnapshot] = []
        self._looked_at_all = False
        self.loop = Loop("sessions", self.run_once)

    # ── what comes over the bus ──────────────────────────────────────────────────────────────────────────────────────

    async def snapshots(self, facts: Sequence[BacklogSnapshot]) -> None:
        """Keep the newest snapshot that is complete; the loop takes it in."""
        for fact in facts:
            parts = self._assembly.add(fact)
            if parts is not None:
                self._newest = parts
                self.loop.wake()

    async def gates_closed(self, connection: Connection, facts: Sequence[GateClosed]) -> Tell:
        """Remember what the gate says: a kill may wait for it."""
        newest: dict[str, GateClosed] = {}
        for fact in sorted(facts, key=lambda fact: fact.occurred_at):
            newest[fact.session_id] = fact
        await store.hear_closings(connection, {name: _closing(fact) for name, fact in newest.items()})
        return self.loop.wake

    async def kills_done(self, connection: Connection, facts: Sequence[KillDone]) -> Tell:
        """End the sessions whose containers are gone; those that nobody can end are marked."""
        ended = {fact.session_id: fact.result for fact in facts if fact.result != "not_killable"}
        turn, now = Turn(), await store.clock(connection)
        held = await store.lock_sessions(connection, [fact.session_id for fact in facts])
        marked = [
            after for each in held if each.session_id not in ended and (after := decide.kill_refused(each)) != each
        ]
        await store.save_sessions(connection, [(decide.revised(each), now) for each in marked])
        for name, result in sorted(ended.items()):
            await end(connection, [name], f"kill_{result}", now, turn)
            for gone in await store.answer_orders(connection, [name], f"kill_{result}"):
                turn.told += telling.facts(gone, [decide.Gate(None)], now)

        def tell() -> None:
            for fact in facts:
                KILLS.labels(fact.result).inc()
            for each in marked:
                log.error("ceiling_unenforceable", workspace_id=each.workspace_id, session_id=each.session_id)
            self._tell(turn)
            self.loop.wake()

        return tell

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run_once(self, now: datetime | None = None) -> float:
        """Take in a snapshot, if there is a new one, and one batch of steps; return the seconds until the next."""
        parts, self._newest = self._newest, []
        if parts:
            try:
                self._tell(await transact(self._pool, partial(take_in, self._settings, parts)))
            except BaseException:
                self._newest = self._newest or parts
                raise
        if not self._looked_at_all:  # our own settings may be others than when these were looked at last
            await self._pool.execute(SQL["look_at_sessions"])
            self._looked_at_all = True
        turn = await turns.take(self._pool, partial(self._step, now=now), partial(self._step_singly, now=now))
        self._tell(turn)
        if turn.more:
            return 0.0
        return turns.sleep_s(await self._pool.fetchval(SQL["next_session_in"], now), self._settings.look_s)

    async def probe(self) -> None:
        """For /readyz: as long as it stands still nothing that does not end is ended."""
        await turns.probe(self.loop, self._settings.look_s)

    async def measure(self) -> float:
        counts: dict[str, int] = dict.fromkeys((state.value for state in State), 0)
        unenforceable = late = 0
        for row in await self._pool.fetch(SQL["measure_sessions"]):
            counts[row["state"]] += row["sessions"]
            late += row["late"]
            unenforceable += row["sessions"] if row["unenforceable"] else 0
        for state, count in counts.items():
            OPEN.labels(state).set(count)
        UNENFORCEABLE.set(unenforceable)
        KILLS_WAITING.set(late)
        return _MEASURE_S

    def _tell(self, turn: Turn) -> None:
        for session, reason in turn.failed:
            log.error(
                "session_step_failed", workspace_id=session.workspace_id, session_id=session.session_id, reason=reason
            )
        telling.tell(self._publisher, turn)
        if any(after.orders != before.orders for before, after in turn.stepped):
            self._told()

    async def _step(self, connection: Connection, *, now: datetime | None) -> Turn:
        turn = Turn()
        claimed, moment = await store.claim_sessions(connection, _BATCH, now)
        if not claimed:
            return turn
        turn.more = len(claimed) == _BATCH
        await self._take_steps(connection, claimed, moment, turn)
        return turn

    async def _step_singly(self, connection: Connection, *, now: datetime | None) -> Turn:
        """As `_step`, where some session of the batch cannot be written: that one waits, the others go on."""
        turn = Turn()
        claimed, moment = await store.claim_sessions(connection, _BATCH, now)
        turn.more = len(claimed) == _BATCH
        for session in claimed:
            alone = Turn()
            write = partial(self._take_steps, connection, [session], moment, alone)
            give_up = partial(_look_later, connection, session, moment, turn)
            if await turns.alone(connection, write, give_up):
                turn.told += alone.told
                turn.stepped += alone.stepped
        return turn

    async def _take_steps(
        self, connection: Connection, claimed: Sequence[Session], moment: datetime, turn: Turn
    ) -> None:
        """Decide and write for sessions that are held; `turn` gets what is to be told."""
        names = sorted({each.workspace_id for each in claimed})
        rules = await store.read_rules(connection, names, self._settings.rules)
        around = _by_workspace(await store.sessions_of(connection, names))
        saved: list[tuple[Session, datetime | None]] = []
        for session in claimed:
            siblings = [each for each in around[session.workspace_id] if each.session_id != session.session_id]
            taken = decide.step(
                session, rules[session.workspace_id], moment, siblings=siblings, pace=self._settings.pace
            )
            after = decide.revised(taken.session)
            saved.append((after, taken.due_at))
            turn.stepped.append((session, after))
            turn.told += telling.facts(after, taken.says, moment)
        await store.save_sessions(connection, saved)
        turn.told = await telling.order(connection, turn.told)


async def _look_later(connection: Connection, session: Session, moment: datetime, turn: Turn, error: Exception) -> None:
    await connection.execute(SQL["look_later"], session.session_id, moment, _FAILED_S)
    turn.failed.append((session, in_words(error)))


def _by_workspace(sessions: Sequence[Session]) -> dict[str, list[Session]]:
    found: dict[str, list[Session]] = defaultdict(list)
    for session in sessions:
        found[session.workspace_id].append(session)
    return found


def _closing(fact: GateClosed) -> Closing:
    return Closing(
        generation=fact.generation,
        at=fact.occurred_at,
        until=fact.until,
        in_flight=tuple(Began(each.session_id, each.started_at, each.ceiling_s) for each in fact.in_flight),
        foreign=fact.foreign,
        beat_at=fact.beat_at,
        cadence_s=fact.cadence_s,
    )
