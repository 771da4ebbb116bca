"""What the queue's newest snapshot changes: which sessions have begun, which are gone, and who is asked for room."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

from services.scheduler import decide, store
from services.scheduler.cron import CronError
from services.scheduler.decide import Activity, Rules, Seen, Session, State, Waiting
from services.scheduler.rules import rule_of
from services.scheduler.sessions import telling
from services.scheduler.sessions.ending import end
from services.scheduler.sessions.telling import Turn
from services.scheduler.settings import Settings
from services.scheduler.store import SQL, OpenFire
from shared.database import Connection
from shared.facts import BacklogSnapshot, NamedBacklog, Running

_FIRES_MAX = 2 * decide.ASKS_MAX
"""Fires on their way that are looked at in one workspace: for one session's requests, beside those being delivered."""


async def take_in(settings: Settings, parts: Sequence[BacklogSnapshot], connection: Connection) -> Turn:
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
    news = decide.compare(known, seen, lives, at, unexplained=unexplained, note_after_s=settings.session_note_s)
    unexplained.subtract(each.workspace_id for each in news.lingering)
    begun, ended = await _foreign(connection, named, +unexplained, known, at)
    over = {each.session_id for each in (*news.outlived, *news.gone, *ended)}
    await store.lock_sessions(connection, over)  # all of them in key order; they end in two parts
    await end(connection, [each.session_id for each in news.outlived], "new_life", now, turn)
    await end(connection, [each.session_id for each in (*news.gone, *ended)], "gone", now, turn)
    await store.begin_sessions(connection, [*news.begun, *begun], at)
    going_on = [each for each in known if each.session_id not in over]
    await _ask_for_room(connection, settings.rules, [*going_on, *news.begun, *begun], named, turn)
    return turn


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
    connection: Connection,
    default: Rules,
    sessions: Sequence[Session],
    named: Mapping[str, NamedBacklog],
    turn: Turn,
) -> None:
    """Early requests, where a session runs and somebody waits for it. They are read again once they are held."""
    running = [each for each in sessions if each.state is State.RUNNING]
    names = sorted({each.workspace_id for each in running})
    rules = await store.read_rules(connection, names, default)
    now = await store.clock(connection)
    yielding = sorted(
        {each.workspace_id for each in running if decide.yields_to_ticks(each, rules[each.workspace_id], now)}
    )
    ticks = _ticks(await store.open_fires(connection, yielding, _FIRES_MAX), named)
    asked: dict[str, tuple[Session, tuple[decide.Directive, ...]]] = {}
    for session in running:
        after, says = _early(session, rules[session.workspace_id], now, named, ticks)
        if says:
            asked[session.session_id] = (after, says)
    saved = []
    for held in await store.lock_sessions(connection, asked):
        if held.state is not State.RUNNING:
            continue  # it has taken a step meanwhile
        after, says = _early(held, rules[held.workspace_id], now, named, ticks)
        saved.append((decide.revised(after), now))  # looked at now: its asks are said again in time
        turn.told += telling.facts(after, says, now)
    await store.save_sessions(connection, saved)


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
