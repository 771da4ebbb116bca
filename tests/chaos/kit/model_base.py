"""What every part of the queue's machine stands on: its two sides, and that they say the same after each step."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Coroutine
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from uuid_utils.compat import uuid7

from shared.facts import MessageBusy, ProxyBeat, SessionGate
from tests.chaos.kit.model import Item, Model
from tests.chaos.kit.model_clock import Clock
from tests.chaos.kit.model_rig import Replica, Rig
from tests.chaos.kit.model_seat import Seat

ROWS = """
SELECT queue_id, workspace_id, status, delivery_no, attempts, deaths, owner, agent_task_id, priority, lane, rank_ms,
  cancel_at IS NOT NULL AS cancel, stop_reason AS stop, hang_up_at IS NOT NULL AS hung_up,
  extract(epoch FROM not_before)::float8 AS not_before,
  extract(epoch FROM enqueued_at)::float8 AS enqueued_at, extract(epoch FROM expires_at)::float8 AS expires_at,
  extract(epoch FROM give_up_at)::float8 AS give_up_at, encode(key_hash, 'hex') AS key, retry_of
FROM a2a_queue WHERE workspace_id = ANY($1::text[])"""
FINISHED = """
SELECT queue_id, workspace_id, status, reason, delivery_no, attempts, retry_of, retried_by,
  md5((to_jsonb(f) - 'retried_by')::text) AS digest
FROM a2a_finished f WHERE workspace_id = ANY($1::text[])"""
SEATS = """
SELECT workspace_id, waiting, waiting_critical, waiting_info, running, floors, served_critical,
  extract(epoch FROM not_before)::float8 AS not_before, extract(epoch FROM paused_at)::float8 AS paused_at,
  gates, gate_generation, incarnation, status IN ('offline', 'restarting', 'gave_up')
    AND dead_incarnation >= incarnation AS is_down, (SELECT count(*) FROM dead_letters) AS dead_letters
FROM workspaces WHERE workspace_id = ANY($1::text[])"""
TOLD = """
SELECT id, convert_from(fact, 'UTF8')::jsonb ->> 'queue_id' AS queue_id,
  convert_from(fact, 'UTF8')::jsonb ->> 'status' AS status, convert_from(fact, 'UTF8')::jsonb ->> 'reason' AS reason
FROM outbox WHERE id > $1 ORDER BY id"""
AS_MODELED = (
    "status", "delivery_no", "attempts", "deaths", "owner", "cancel", "stop", "hung_up", "lane",
    "rank_ms", "not_before", "enqueued_at",
    "expires_at", "give_up_at", "key", "retry_of",
)  # fmt: skip
NUMBERS = {"CRITICAL": 100, "TASK": 50, "INFO": 10}

some = st.integers(0, 7)


class Base(RuleBasedStateMachine):
    """The queue on one side, the model on the other; `holds` after each step."""

    rig: ClassVar[Rig]
    loop: ClassVar[asyncio.AbstractEventLoop]
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(seen=type(self).seen)
        self.names = [f"w{number}-{uuid7().hex}" for number in range(2)]
        self.replicas: list[Replica] = []
        self.silent: set[str] = set()
        self.facts: list[MessageBusy] = []
        self.beats: dict[tuple[str, str], list[ProxyBeat]] = {}
        self.revs = dict.fromkeys(self.names, 0)
        self.lives = dict.fromkeys(self.names, 0)
        self.words: dict[tuple[str, str], list[SessionGate]] = {}
        self.final: dict[UUID, str] = {}
        self.told: dict[UUID, tuple[str, str | None]] = {}
        self.orphans: dict[str, set[tuple[str, int]]] = {}
        self.told_to = 0
        self.is_whole = False
        """No step has failed: then the end must hold too."""

    @property
    def clock(self) -> Clock:
        return self.rig.clock

    def run(self, step: Coroutine[Any, Any, None]) -> None:
        type(self).steps += 1
        self.is_whole = False
        self.loop.run_until_complete(step)
        self.is_whole = True

    def pick(self, index: int) -> Replica:
        return self.replicas[index % len(self.replicas)]

    def seat(self, index: int) -> Seat:
        return self.model.seat(self.names[index % 2])

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def holds(self) -> None:
        if self.replicas:
            self.is_whole = False
            try:
                self.loop.run_until_complete(self.check())
            except AssertionError as error:
                error.add_note(self.loop.run_until_complete(self._account()))
                raise
            self.is_whole = True

    async def _account(self) -> str:
        """Both sides of every workspace, for whoever reads a failure."""
        now = self.clock.now()
        lines = [f"now {now}"]
        for row in await self.rig.pool.fetch(
            "SELECT * FROM workspaces WHERE workspace_id = ANY($1::text[])", self.names
        ):
            seat = self.model.seat(row["workspace_id"])
            lines += [f"row   {dict(row)}", f"model {seat}, in use {seat.in_use(now)}, capacity {seat.capacity(now)}"]
        return "\n".join(lines)

    async def check(self) -> None:
        rows = {row["queue_id"]: row for row in await self.rig.pool.fetch(ROWS, self.names)}
        finished = {row["queue_id"]: row for row in await self.rig.pool.fetch(FINISHED, self.names)}
        assert not rows.keys() & finished.keys(), "I1: an item is in one place"
        assert rows.keys() | finished.keys() == self.model.items.keys(), "I1: nothing appears or disappears"
        for queue_id, item in self.model.items.items():
            if queue_id in rows:
                self._check_row(rows[queue_id], item)
            else:
                self._check_finished(finished[queue_id], item)
        for row in await self.rig.pool.fetch(SEATS, self.names):
            self._check_seat(row, self.model.seat(row["workspace_id"]))
        await self._check_told()

    @staticmethod
    def _check_row(row: asyncpg.Record, item: Item) -> None:
        found = {name: row[name] for name in AS_MODELED}
        expected = {name: getattr(item, name) for name in AS_MODELED}
        if item.status == "queued":
            found["cancel"] = expected["cancel"] = None  # a cancel of one that waits ends it: there is none to keep
        found |= {"task": row["agent_task_id"], "priority": row["priority"]}
        near(found, expected | {"task": item.task, "priority": NUMBERS[item.priority]})

    def _check_finished(self, row: asyncpg.Record, item: Item) -> None:
        names = ("status", "reason", "delivery_no", "attempts", "retry_of", "retried_by")
        near({name: row[name] for name in names}, {name: getattr(item, name) for name in names})
        assert self.final.setdefault(item.queue_id, row["digest"]) == row["digest"], "I1: what has ended never changes"

    def _check_seat(self, row: asyncpg.Record, seat: Seat) -> None:
        waiting, running = self.model.of(seat.name, "queued"), self.model.of(seat.name, "dispatched")
        counted = {
            "waiting": len(waiting),
            "waiting_critical": sum(item.priority == "CRITICAL" for item in waiting),
            "waiting_info": sum(item.priority == "INFO" for item in waiting),
            "running": len(running),
        }
        assert {name: row[name] for name in counted} == counted, f"B-06: the counters are the rows: {counted}"
        for item in waiting:
            assert row["floors"][item.lane] <= item.rank_ms, f"I3: {item.queue_id} waits below the floor of its lane"
        near(
            {name: row[name] for name in ("served_critical", "paused_at", "dead_letters", "incarnation")},
            {
                "served_critical": seat.served_critical, "paused_at": seat.paused_at, "dead_letters": 0,
                "incarnation": seat.incarnation,
            },
        )  # fmt: skip
        assert bool(row["is_down"]) == seat.is_down, "who is dead gets nothing"

        now = self.clock.said
        gates = json.loads(row["gates"]).values()
        closed = max((until for _, until, left in gates if until > now and not left), default=None)
        near(
            {"gate_until": closed, "gate_generation": row["gate_generation"]},
            {"gate_until": seat.gate_until(now), "gate_generation": seat.closings},
        )

    async def _check_told(self) -> None:
        for row in await self.rig.pool.fetch(TOLD, self.told_to):
            self.told_to = row["id"]
            queue_id = UUID(row["queue_id"])
            assert queue_id not in self.told, "an end is told once"
            self.told[queue_id] = (row["status"], row["reason"])
        ended = {item.queue_id: (item.status, item.reason) for item in self.model.items.values() if not item.is_active}
        assert self.told == ended, "every end is told"


def near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Times may differ by what a float of them cannot hold."""
    for name, value in found.items():
        wanted = expected[name]
        same = abs(value - wanted) < 1e-4 if isinstance(value, float) and wanted is not None else value == wanted
        assert same, f"{name}: the row says {value!r}, the model {wanted!r}"
