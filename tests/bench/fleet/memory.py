"""The rows of liveness in memory: every named statement of its queries.sql, behind what its code calls of a pool.

It is held to the contract of the real one (tests/integration/test_liveness_store.py). It keeps what Postgres keeps for
those who are alone: statements, constraints that the service leans on, rollback. It has no locks, and refuses a second
transaction while one is open: whoever awaits inside a transaction awaits only statements, and those never wait.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import orjson

from services.liveness.store import SQL
from shared import outbox
from shared.database import load_queries

Row: TypeAlias = dict[str, Any]
Table: TypeAlias = dict[Any, Row]

_MOMENTS = (
    "beat_at", "heard_at", "progress_at", "status_at", "suspected_at", "suspected_last_at", "blind_since",
    "started_at", "boot_until", "next_check_at", "restarted_at", "forgiven_at",
)  # fmt: skip
_FENCED = frozenset({"online", "suspect", "wedged", "gave_up", "paused", "offline", "restarting"})
_PROXY_SILENT = timedelta(seconds=15)
_SUSPECT_FOR = timedelta(seconds=30)
_KILL_COUNTS_FOR = timedelta(seconds=180)


class Memory:
    """A pool with one connection, which is itself. `clock` is what Postgres calls clock_timestamp()."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.statements: Counter[str] = Counter()
        """How often each was called."""
        self.agents: Table = {}
        self.restarts: Table = {}
        self.orders: Table = {}
        self.evidence: Table = {}
        self.proxies: Table = {}
        self.audit: Table = {}
        self.outbox: Table = {}
        self._clock = clock
        self._open: dict[str, Row] = {}
        """The open restart of each workspace: the partial unique index."""
        self._numbers = 0
        self._undo: list[tuple[Table, Any, Row | None]] | None = None
        inserts = load_queries(Path(outbox.__file__).parent / "queries.sql")["insert_outbox"]
        named = {sql: name for name, sql in SQL.items() if hasattr(self, f"_{name}")}
        self._named = {sql: (name, getattr(self, f"_{name}")) for sql, name in named.items()}
        self._named[inserts] = ("insert_outbox", self._insert_outbox)

    @property
    def names(self) -> frozenset[str]:
        """The statements that it has."""
        return frozenset(name for name, _ in self._named.values())

    # ── what is called of a pool and of a connection ─────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def acquire(self, *, timeout: float | None = None) -> AsyncIterator[Memory]:
        del timeout
        yield self

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        assert self._undo is None, "one transaction at a time: this store has no locks"
        self.statements["commit"] += 1
        self._undo = []
        try:
            yield
        except BaseException:
            undo, self._undo = self._undo, None
            for table, key, row in reversed(undo):
                self._put(table, key, row)
            raise
        self._undo = None

    async def fetch(self, sql: str, *values: Any) -> list[Row]:
        return self._run(sql, values)

    async def fetchrow(self, sql: str, *values: Any) -> Row | None:
        return next(iter(self._run(sql, values)), None)

    async def fetchval(self, sql: str, *values: Any) -> Any:
        row = next(iter(self._run(sql, values)), None)
        return next(iter(row.values())) if row is not None else None

    async def execute(self, sql: str, *values: Any) -> str:
        """Only how many rows a DELETE took is ever asked."""
        return f"DELETE {len(self._run(sql, values))}"

    def _run(self, sql: str, values: Sequence[Any]) -> list[Row]:
        name, statement = self._named[sql]
        self.statements[name] += 1
        rows: list[Row] = statement(*values)
        return rows

    def _put(self, table: Table, key: Any, row: Row | None) -> None:
        """Write a row whole; rows that were given out stay as they were."""
        old = table.get(key)
        if self._undo is not None:
            self._undo.append((table, key, old))
        if table is self.restarts:
            self._index(old, row)
        if row is None:
            del table[key]
        else:
            table[key] = row

    def _index(self, old: Row | None, row: Row | None) -> None:
        if old is not None and old["ended_at"] is None:
            del self._open[old["workspace_id"]]
        if row is not None and row["ended_at"] is None:
            self._open[row["workspace_id"]] = row

    def _delete(self, table: Table, keys: Iterable[Any]) -> list[Row]:
        gone = {key: table[key] for key in keys}
        for key in gone:
            self._put(table, key, None)
        return list(gone.values())

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    # ── agents ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_clock(self, now: datetime | None) -> list[Row]:
        return [{"coalesce": now or self._clock()}]

    def _lock_agents(self, names: Sequence[str]) -> list[Row]:
        return [self.agents[name] for name in sorted(set(names)) if name in self.agents]

    def _find_agent(self, name: str) -> list[Row]:
        return [self.agents[name]] if name in self.agents else []

    def _save_agents(self, values: str, held: Sequence[str]) -> list[Row]:
        rows = [row for row in orjson.loads(values) if row["workspace_id"] not in self.agents.keys() - set(held)]
        for row in rows:
            for name in _MOMENTS:
                if row[name] is not None:
                    row[name] = datetime.fromisoformat(row[name])
            row["runtime"] = json.dumps(row["runtime"])
            _check_agent(row)
            self._put(self.agents, row["workspace_id"], row)
        return rows

    def _claim_looks(self, now: datetime | None, together_s: float, limit: int, sweep_s: float) -> list[Row]:
        now = now or self._clock()
        waiting = [row for row in self.agents.values() if row["next_check_at"] is not None]
        if not any(row["next_check_at"] <= now for row in waiting):
            return []
        until = now + timedelta(seconds=together_s)
        due = sorted((row for row in waiting if row["next_check_at"] <= until), key=lambda row: row["workspace_id"])
        claimed = [row | {"next_check_at": now + timedelta(seconds=sweep_s)} for row in due[:limit]]
        for row in claimed:
            self._put(self.agents, row["workspace_id"], row)
        return claimed

    def _next_look_in(self, now: datetime | None) -> list[Row]:
        return self._seconds_until((row["next_check_at"] for row in self.agents.values()), now)

    def _repeat_statuses(self) -> list[Row]:
        rows = (row for row in self.agents.values() if row["status_rev"] > 0 and not row["removed"])
        return sorted(rows, key=lambda row: str(row["workspace_id"]))

    def _measure(self) -> list[Row]:
        now = self._clock()
        by_status: dict[str, list[Row]] = defaultdict(list)
        for row in self.agents.values():
            by_status[row["status"]].append(row)
        return [
            {
                "status": status,
                "agents": len(rows),
                "blind": sum(
                    row["blind_since"] is not None and row["blind_since"] < now - timedelta(seconds=120) for row in rows
                ),
                "silent_s": max(
                    (
                        (now - row["heard_at"]).total_seconds()
                        for row in rows
                        if row["heard_at"] is not None and row["expects_beats"] and not row["removed"]
                    ),
                    default=None,
                ),
            }
            for status, rows in by_status.items()
        ]

    def _fleet_doubts(self, now: datetime, driver: str, but: Sequence[str]) -> list[Row]:
        of_it = [
            row for row in self._wanted() if row["driver"] == driver and row["status"] != "gave_up"
        ]  # fmt: skip
        left_out = set(but)
        suspects = sum(
            row["suspected_at"] is not None
            and row["suspected_at"] > now - _SUSPECT_FOR
            and row["workspace_id"] not in left_out
            for row in of_it
        )
        return [{"agents": len(of_it), "suspects": suspects}]

    def _fleet_heard(self) -> list[Row]:
        rows = [
            row
            for row in self._wanted()
            if row["expects_beats"] and row["beats"] > 0 and row["status"] in {"online", "suspect"}
        ]
        return [
            {
                "expected": len(rows),
                "beat_at": max((row["beat_at"] for row in rows if row["beat_at"] is not None), default=None),
                "cadence_s": max((row["cadence_s"] for row in rows), default=None),
            }
        ]

    def _wanted(self) -> Iterable[Row]:
        return (
            row
            for row in self.agents.values()
            if not row["removed"] and not row["paused"] and row["desired"] == "running"
        )

    # ── evidence, proxies, audit, outbox ─────────────────────────────────────────────────────────────────────────────

    def _insert_evidence(self, *values: Any) -> list[Row]:
        names = (
            "workspace_id", "at", "incarnation", "source", "seen", "container_id", "verdict", "reason", "sentence",
        )  # fmt: skip
        number = self._number()
        self._put(self.evidence, number, {"id": number, **dict(zip(names, values, strict=True))})
        return []

    def _last_evidence(self, name: str, limit: int) -> list[Row]:
        return [row for row in reversed(self.evidence.values()) if row["workspace_id"] == name][:limit]

    def _forget_evidence(self, now: datetime | None, days: int, limit: int) -> list[Row]:
        return self._forget(self.evidence, "at", now, days, limit)

    def _hear_proxies(self, names: Sequence[str]) -> list[Row]:
        now = self._clock()
        for name in names:
            row = self.proxies.get(name)
            is_new = row is None or now - row["beat_at"] > _PROXY_SILENT
            since_at = now if row is None or is_new else row["since_at"]
            self._put(self.proxies, name, {"proxy_id": name, "beat_at": now, "since_at": since_at})
        return []

    def _hearing(self, now: datetime) -> list[Row]:
        heard = [row["since_at"] for row in self.proxies.values() if row["beat_at"] > now - _PROXY_SILENT]
        return [{"since_at": min(heard)}] if heard else []

    def _forget_proxies(self) -> list[Row]:
        before = self._clock() - timedelta(days=1)
        return self._delete(self.proxies, [key for key, row in self.proxies.items() if row["beat_at"] < before])

    def _insert_audit(self, query_id: Any, by: str, action: str, name: str, note: str) -> list[Row]:
        if query_id in self.audit:
            return []
        row = {"query_id": query_id, "caller_id": by, "action": action, "workspace_id": name, "note": note}
        self._put(self.audit, query_id, row)
        return [{"query_id": query_id}]

    def _insert_outbox(self, kinds: Sequence[str], facts: Sequence[bytes]) -> list[Row]:
        for kind, fact in zip(kinds, facts, strict=True):
            number = self._number()
            self._put(self.outbox, number, {"id": number, "fact_type": kind, "fact": fact})
        return []

    def _forget(self, table: Table, moment: str, now: datetime | None, days: int, limit: int) -> list[Row]:
        before = (now or self._clock()) - timedelta(days=days)
        old = [key for key, row in table.items() if row[moment] is not None and row[moment] < before]
        return self._delete(table, sorted(old, key=lambda key: table[key][moment])[:limit])

    # ── restarts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_restart(  # noqa: PLR0917 - as the statement has them
        self, restart_id: Any, name: str, incarnation: int, reason: str, evidence: str, phase: str, now: datetime,
        due_at: datetime,
    ) -> list[Row]:  # fmt: skip
        agent = self.agents.get(name)
        if agent is None or agent["incarnation"] != incarnation or agent["removed"] or agent["driver"] is None:
            return []
        if agent["status"] not in _FENCED or name in self._open:
            return []
        row = {
            "restart_id": restart_id, "workspace_id": name, "incarnation": incarnation, "fence": agent["fence"] + 1,
            "reason": reason, "evidence": evidence, "container_id": agent["container_id"], "driver": agent["driver"],
            "phase": phase, "decided_at": now, "due_at": due_at, "began_at": None, "lease_until": None, "owner": None,
            "tries": 0, "asked_again": 0, "last_error": None, "ended_at": None, "result": None,
        }  # fmt: skip
        self._put(self.restarts, restart_id, row)
        return [{"fence": row["fence"]}]

    def _find_open(self, name: str) -> list[Row]:
        return [self._open[name]] if name in self._open else []

    def _ask_again(self, name: str, due_at: datetime | None) -> list[Row]:
        row = self._open.get(name)
        if row is None:
            return []
        due_at = row["due_at"] if due_at is None else min(row["due_at"], due_at)
        return self._change(row, asked_again=row["asked_again"] + 1, due_at=due_at)

    def _recent_restarts(self, name: str, since: datetime) -> list[Row]:
        count = sum(
            row["workspace_id"] == name
            and row["decided_at"] > since
            and row["result"] == "started"
            and row["reason"] not in {"operator", "ceiling"}
            for row in self.restarts.values()
        )
        return [{"count": count}]

    def _hold_fleet(self) -> list[Row]:
        return []

    def _fleet_in_flight(self, now: datetime, slot_s: float) -> list[Row]:
        agents: Counter[str] = Counter()
        in_flight: Counter[str] = Counter()
        for row in self.agents.values():
            if row["driver"] is None or row["removed"]:
                continue
            agents[row["driver"]] += 1
            restart = self._open.get(row["workspace_id"])
            is_leased = restart is not None and restart["lease_until"] is not None and restart["lease_until"] > now
            boots = row["status"] == "restarting" and row["boot_until"] is not None and row["restarted_at"] is not None
            if is_leased or (boots and row["restarted_at"] > now - timedelta(seconds=slot_s)):
                in_flight[row["driver"]] += 1
        return [{"driver": name, "agents": agents[name], "in_flight": in_flight[name]} for name in agents]

    def _due_restarts(self, now: datetime, limit: int) -> list[Row]:
        due = [
            row
            for row in self._open.values()
            if row["due_at"] <= now
            and (row["lease_until"] is None or row["lease_until"] < now)
            and row["workspace_id"] in self.agents
        ]
        due.sort(key=lambda row: (row["due_at"], row["restart_id"]))
        places: Counter[str] = Counter()
        found = []
        for row in due:
            places[row["driver"]] += 1
            if places[row["driver"]] <= limit:
                found.append({"restart_id": row["restart_id"], "workspace_id": row["workspace_id"]})
        return found

    def _lock_restart(self, restart_id: Any) -> list[Row]:
        return [self.restarts[restart_id]] if restart_id in self.restarts else []

    def _lease_restart(self, restart_id: Any, now: datetime, lease_s: float, owner: str) -> list[Row]:
        row = self.restarts[restart_id]
        return self._change(
            row, lease_until=now + timedelta(seconds=lease_s), owner=owner, tries=row["tries"] + 1,
            began_at=row["began_at"] or now,
        )  # fmt: skip

    def _next_restart_in(self, now: datetime | None) -> list[Row]:
        moments = (max(row["due_at"], row["lease_until"] or row["due_at"]) for row in self._open.values())
        return self._seconds_until(moments, now)

    def _end_restart(
        self, restart_id: Any, now: datetime, result: str, error: str | None, owner: str | None
    ) -> list[Row]:
        row = self.restarts.get(restart_id)
        if row is None or row["ended_at"] is not None:
            return []
        if row["owner"] not in {None, owner} and row["lease_until"] >= now:
            return []
        return self._change(
            row, ended_at=now, result=result, owner=None, lease_until=None, last_error=error or row["last_error"]
        )

    def _killed_restart(self, restart_id: Any, owner: str) -> list[Row]:
        row = self.restarts.get(restart_id)
        if row is None or row["ended_at"] is not None or row["owner"] != owner or row["phase"] != "kill":
            return []
        return self._change(row, phase="start")

    def _postpone_restart(self, restart_id: Any, due_at: datetime, error: str, owner: str) -> list[Row]:
        row = self.restarts.get(restart_id)
        if row is None or row["ended_at"] is not None or row["owner"] != owner:
            return []
        return self._change(row, owner=None, lease_until=None, due_at=due_at, last_error=error)

    def _last_restarts(self, name: str, limit: int) -> list[Row]:
        rows = [row for row in self.restarts.values() if row["workspace_id"] == name]
        return sorted(rows, key=lambda row: row["decided_at"], reverse=True)[:limit]

    def _forget_restarts(self, now: datetime | None, days: int, limit: int) -> list[Row]:
        return self._forget(self.restarts, "ended_at", now, days, limit)

    def _change(self, row: Row, **changes: Any) -> list[Row]:
        after = row | changes
        self._put(self.restarts, row["restart_id"], after)
        return [{"workspace_id": after["workspace_id"]}]

    # ── orders ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _insert_order(  # noqa: PLR0917 - as the statement has them
        self, order_id: Any, name: str, session_id: str, incarnation: int, rev: int, expires_at: datetime, now: datetime
    ) -> list[Row]:
        old = self.orders.get(order_id)
        if old is not None:
            if old["result"] not in {None, "expired"} or expires_at <= old["expires_at"]:
                return []
            self._put(self.orders, order_id, old | {"expires_at": expires_at, "result": None, "answered_at": None})
            return [{"order_id": order_id}]
        row = {
            "order_id": order_id, "workspace_id": name, "session_id": session_id, "incarnation": incarnation,
            "rev": rev, "expires_at": expires_at, "at": now, "result": None, "answered_at": None,
        }  # fmt: skip
        self._put(self.orders, order_id, row)
        return [{"order_id": order_id}]

    def _open_orders(self, name: str) -> list[Row]:
        rows = (row for row in self.orders.values() if row["workspace_id"] == name and row["result"] is None)
        return sorted(rows, key=lambda row: str(row["order_id"]))

    def _was_killed(self, name: str, incarnation: int, now: datetime) -> list[Row]:
        killed = any(
            (row["workspace_id"], row["incarnation"], row["result"]) == (name, incarnation, "applied")
            and row["answered_at"] > now - _KILL_COUNTS_FOR
            for row in self.orders.values()
        )
        return [{"exists": killed}]

    def _answer_order(self, order_id: Any, result: str, now: datetime) -> list[Row]:
        row = self.orders.get(order_id)
        if row is None or row["result"] is not None:
            return []
        answered = row | {"result": result, "answered_at": now}
        self._put(self.orders, order_id, answered)
        return [answered]

    def _forget_orders(self, now: datetime | None, days: int, limit: int) -> list[Row]:
        return self._forget(self.orders, "answered_at", now, days, limit)

    def _seconds_until(self, moments: Iterable[datetime | None], now: datetime | None) -> list[Row]:
        first = min((each for each in moments if each is not None), default=None)
        return [{"in_s": None if first is None else (first - (now or self._clock())).total_seconds()}]


def _check_agent(row: Row) -> None:
    """The table's constraints, those that tie columns to each other."""
    is_broken = (
        (row["suspicions"] == 0) != (row["suspected_at"] is None)
        or (row["suspected_at"] is not None and row["suspected_last_at"] < row["suspected_at"])
        or row["removed"] != (row["status"] == "removed")
        or (row["driver"] is None and row["next_check_at"] is not None)
    )
    if is_broken:
        raise asyncpg.CheckViolationError("a constraint of agents")
