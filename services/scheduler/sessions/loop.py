"""The loop of sessions: takes in the queue's newest snapshot, takes the steps that are due, sleeps until the next.

Every replica turns it and no one leads: a snapshot is taken in by one of them, a session is stepped by whoever holds
its row. What a step says is said after its commit and again by a later step, so a replica that dies in between repeats
nothing and loses nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial

from services.scheduler import decide, store, turns
from services.scheduler.cron import CronError
from services.scheduler.decide import Activity, Began, Closing, Rules, Seen, Session, State, Waiting
from services.scheduler.metrics import KILLS, KILLS_WAITING, OPEN, UNENFORCEABLE
from services.scheduler.rules import rule_of
from services.scheduler.sessions import telling
from services.scheduler.sessions.telling import Turn
from services.scheduler.settings import Settings
from services.scheduler.store import SQL, OpenFire
from shared.broker import Publisher
from shared.database import Connection, Pool, in_words, transact
from shared.facts import BacklogSnapshot, GateClosed, KillDone, NamedBacklog, Running
from shared.intake import Tell
from shared.loops import Loop
from shared.snapshots import Assembly
from shared.telemetry import log

_BATCH = 200
_MEASURE_S = 5.0
_FAILED_S = 60.0
"""How long a session is left alone whose step could not be taken."""
_FIRES_MAX = 2 * decide.ASKS_MAX
"""Fires on their way that are looked at in one workspace: for one session's requests, beside those being delivered."""


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
            await _end(connection, [name], f"kill_{result}", now, turn)
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
                self._tell(await transact(self._pool, partial(self._take_in, parts)))
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

    # ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _take_in(self, parts: Sequence[BacklogSnapshot], connection: Connection) -> Turn:
        """Note what has begun, end what has gone, and ask for room where somebody waits."""
        turn = Turn()
        read_at = min(part.occurred_at for part in parts)
        at = await connection.fetchval(SQL["take_snapshot"], read_at, parts[0].snapshot_id)
        if at is None:
            return turn  # a replica was quicker
        now = await store.clock(connection)
        named = {each.workspace_id: each for part in parts for each in part.backlogs}
        known = await store.open_sessions(connection)
        lives = await store.incarnations(connection, named.keys() | {each.workspace_id for each in known})
        for name, each in named.items():
            lives[name] = max(lives.get(name, 0), each.incarnation)
        seen = [session for name in sorted(named) for session in _seen(named[name])]
        unexplained = Counter({name: each.foreign for name, each in named.items() if each.foreign})
        news = decide.compare(
            known, seen, lives, at, unexplained=unexplained, note_after_s=self._settings.session_note_s
        )
        unexplained.subtract(each.workspace_id for each in news.lingering)
        begun, ended = await self._foreign(connection, named, +unexplained, known, at)
        over = {each.session_id for each in (*news.outlived, *news.gone, *ended)}
        await store.lock_sessions(connection, over)  # all of them in key order; they end in two parts
        await _end(connection, [each.session_id for each in news.outlived], "new_life", now, turn)
        await _end(connection, [each.session_id for each in (*news.gone, *ended)], "gone", now, turn)
        await store.begin_sessions(connection, [*news.begun, *begun], at)
        going_on = [each for each in known if each.session_id not in over]
        await self._ask_for_room(connection, [*going_on, *news.begun, *begun], named, turn)
        return turn

    @staticmethod
    async def _foreign(
        connection: Connection,
        named: Mapping[str, NamedBacklog],
        unexplained: Mapping[str, int],
        known: Sequence[Session],
        at: datetime,
    ) -> tuple[list[Session], list[Session]]:
        """What has begun and ended of work that nothing explains."""
        running = {each.workspace_id: each for each in known if each.kind == "foreign"}
        activities = await store.read_activities(connection)
        begun: list[Session] = []
        ended: list[Session] = []
        changed: list[Activity] = []
        in_doubt = {name for name, each in activities.items() if each.beats}
        for name in sorted(unexplained.keys() | in_doubt | running.keys()):
            backlog = named.get(name)
            before = activities.get(name, Activity(name))
            after, session, is_over = decide.foreign(
                before, name in running, at=at,
                count=unexplained.get(name, 0),
                beat_at=backlog.beat_at if backlog else None,
                incarnation=backlog.incarnation if backlog else before.incarnation,
            )  # fmt: skip
            if after != before:
                changed.append(after)
            if session is not None:
                begun.append(session)
            if is_over:
                ended.append(running[name])
        await store.save_activities(connection, changed)
        return begun, ended

    async def _ask_for_room(
        self, connection: Connection, sessions: Sequence[Session], named: Mapping[str, NamedBacklog], turn: Turn
    ) -> None:
        """Early requests, where a session runs and somebody waits for it. They are read again once they are held."""
        running = [each for each in sessions if each.state is State.RUNNING]
        names = sorted({each.workspace_id for each in running})
        rules = await store.read_rules(connection, names, self._settings.rules)
        now = await store.clock(connection)
        yielding = sorted(
            {each.workspace_id for each in running if decide.yields_to_ticks(each, rules[each.workspace_id], now)}
        )
        ticks = _ticks(await store.open_fires(connection, yielding, _FIRES_MAX), named)
        asked: dict[str, tuple[Session, tuple[decide.Directive, ...]]] = {}
        for session in running:
            after, says = self._early(session, rules[session.workspace_id], now, named, ticks)
            if says:
                asked[session.session_id] = (after, says)
        saved = []
        for held in await store.lock_sessions(connection, asked):
            if held.state is not State.RUNNING:
                continue  # it has taken a step meanwhile
            after, says = self._early(held, rules[held.workspace_id], now, named, ticks)
            saved.append((decide.revised(after), now))  # looked at now: its asks are said again in time
            turn.told += telling.facts(after, says, now)
        await store.save_sessions(connection, saved)

    @staticmethod
    def _early(
        session: Session,
        rules: Rules,
        now: datetime,
        named: Mapping[str, NamedBacklog],
        ticks: Mapping[str, Sequence[Waiting]],
    ) -> tuple[Session, tuple[decide.Directive, ...]]:
        backlog = named.get(session.workspace_id)
        return decide.early(
            session, rules, now, ticks=ticks.get(session.workspace_id, ()),
            critical_since=backlog.critical_waiting_since if backlog else None,
        )  # fmt: skip


async def _look_later(connection: Connection, session: Session, moment: datetime, turn: Turn, error: Exception) -> None:
    await connection.execute(SQL["look_later"], session.session_id, moment, _FAILED_S)
    turn.failed.append((session, in_words(error)))


async def _end(connection: Connection, session_ids: Sequence[str], reason: str, now: datetime, turn: Turn) -> None:
    """End sessions; those whose gate was closed leave it.

    Not while an order to kill is on its way, which would end what begins next: its answer opens the gate, or time does.
    """
    for session in await store.end_sessions(connection, session_ids, reason, now):
        turn.ended.append((session, reason))
        if session.stop_reason is not None and not (reason == "gone" and decide.has_order(session, now)):
            turn.told += telling.facts(session, [decide.Gate(None)], now)


def _by_workspace(sessions: Sequence[Session]) -> dict[str, list[Session]]:
    found: dict[str, list[Session]] = defaultdict(list)
    for session in sessions:
        found[session.workspace_id].append(session)
    return found


def _ticks(fires: Sequence[OpenFire], named: Mapping[str, NamedBacklog]) -> dict[str, list[Waiting]]:
    """The ticks that wait, by workspace: fires on their way that are not being delivered."""
    delivered = {each.session_id.partition(":")[0] for backlog in named.values() for each in backlog.running}
    found: dict[str, list[Waiting]] = defaultdict(list)
    for fire in fires:
        if str(fire.queue_id) not in delivered:
            about = f"{fire.schedule.schedule_id} {fire.fire_at.isoformat()}"
            found[fire.schedule.workspace_id].append(Waiting(about, fire.fire_at, _period_s(fire)))
    return found


def _period_s(fire: OpenFire) -> float | None:
    try:
        following = rule_of(fire.schedule).next(fire.fire_at)
    except CronError:
        return None  # its zone is gone; the calendar says so
    return (following - fire.fire_at).total_seconds() if following is not None else None


def _seen(backlog: NamedBacklog) -> list[Seen]:
    def of(running: Running, kind: str) -> Seen:
        return Seen(
            session_id=running.session_id, kind="delivery" if kind == "delivery" else "forward",
            workspace_id=backlog.workspace_id, incarnation=backlog.incarnation, started_at=running.started_at,
            ceiling_s=running.ceiling_s, schedule_id=running.schedule_id,
        )  # fmt: skip

    return [of(each, "delivery") for each in backlog.running] + [of(each, "forward") for each in backlog.forwards]


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
