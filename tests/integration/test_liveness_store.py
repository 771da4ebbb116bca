"""The contract of liveness's rows: what each statement of queries.sql promises, on Postgres and on the store in memory.

The fleet benchmark runs on the latter (tests/bench/fleet/memory.py), so it is held to the same sentences.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from services.liveness import store
from services.liveness.decide.judge import Decision, Reason, Verdict
from services.liveness.decide.life import Life, Status
from services.liveness.decide.seen import Observation, Seen
from services.liveness.store import SQL
from shared.database import Connection, Pool, open_pool, transact
from shared.facts import SessionKill
from tests.bench.fleet.memory import Memory
from tests.integration.liveness_kit import emptied, liveness_settings

NOW = datetime.now(UTC).replace(microsecond=250_000)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def life(name: str = "w1", **about: Any) -> Life:
    return Life(name, 1, 1, **{"driver": "process", "runtime": {"driver": "process"}, "status_at": NOW, **about})


@pytest.fixture(params=["postgres", "memory"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    if request.param == "memory":
        yield cast("Pool", Memory())
        return
    async with open_pool(liveness_settings(request.getfixturevalue("stack"))) as opened:
        await emptied(opened)
        yield opened


async def saved(pool: Pool, *lives: Life) -> None:
    await transact(pool, lambda connection: store.save(connection, {}, lives, NOW))


async def found(pool: Pool, name: str = "w1") -> Life:
    row = await pool.fetchrow(SQL["find_agent"], name)
    assert row is not None
    return store.life_of(row)


async def opened(
    pool: Pool, name: str = "w1", *, incarnation: int = 1, reason: str = "stopped", phase: str = "start",
    decided_at: datetime = NOW, due_at: datetime = NOW,
) -> UUID | None:  # fmt: skip
    """The id of a restart that the fence let through."""
    restart_id = uuid7()
    fence = await pool.fetchval(
        SQL["open_restart"], restart_id, name, incarnation, reason, "seen", phase, decided_at, due_at
    )
    return restart_id if fence is not None else None


async def ended(pool: Pool, restart_id: UUID | None, *, by: str | None = None, now: datetime = NOW) -> bool:
    return await pool.fetchval(SQL["end_restart"], restart_id, now, "started", None, by) is not None


def order(**about: Any) -> SessionKill:
    values = {
        "workspace_id": "w1", "rev": 7, "session_id": "s1", "incarnation": 1, "order_id": uuid7(),
        "expires_at": at(60), **about,
    }  # fmt: skip
    return SessionKill.model_validate(values)


async def ordered(pool: Pool, fact: SessionKill) -> bool:
    return await transact(pool, lambda connection: store.insert_order(connection, fact, NOW))


async def answered(pool: Pool, order_id: UUID, result: str, now: datetime = NOW) -> bool:
    return await transact(pool, lambda connection: store.answer_order(connection, order_id, result, now))


class TestAgents:
    async def test_a_life_comes_back_as_it_was_written(self, pool: Pool) -> None:
        whole = life(
            expects_beats=False, restart_wedged=True, cordoned=True, cadence_s=7.5, beat_rev=2**53, beats=4,
            gap_mean_s=30.25, gap_deviation_s=0.5, beat_at=at(-1), heard_at=at(-0.000001), active=2, progress=0.5,
            progress_at=at(-2), status=Status.SUSPECT, reason="zwölf “of” 2", suspected_at=at(-3),
            suspected_last_at=at(-2), suspicions=2, blind_since=at(-4), known=True, container_id="c1",
            started_at=at(-5), boot_until=at(5), next_check_at=at(6), fence=3, restarts=2, backoffs=1, unheard=1,
            restarted_at=at(-7), forgiven_at=at(-8),
        )  # fmt: skip
        await saved(pool, whole)
        assert await found(pool) == replace(whole, status_rev=1, status_at=NOW)
        assert await pool.fetchrow(SQL["find_agent"], "w9") is None

    async def test_a_changed_belief_is_numbered_and_told(self, pool: Pool) -> None:
        await saved(pool, life())
        before = await found(pool)
        for status in (Status.SUSPECT, Status.SUSPECT, Status.ONLINE):
            after = replace(before, status=status)
            await transact(
                pool,
                lambda c, b=before, a=after: store.save(c, {"w1": b}, [a], at(1)),  # type: ignore[misc]
            )
            before = await found(pool)
        assert (before.status_rev, before.status_at) == (2, at(1))

    async def test_agents_are_locked_in_order_and_unknown_ones_left_out(self, pool: Pool) -> None:
        await saved(pool, life("b"), life("a"))
        held = await transact(pool, lambda connection: store.lock(connection, ["b", "c", "a", "b"]))
        assert list(held) == ["a", "b"]

    @pytest.mark.parametrize(
        "broken",
        [
            life(suspicions=1), life(suspected_at=NOW, suspected_last_at=at(-1), suspicions=1), life(removed=True),
            life(driver=None, next_check_at=NOW),
        ],
        ids=["suspicions without a moment", "last before first", "removed and online", "a look without a driver"],
    )  # fmt: skip
    async def test_what_contradicts_itself_is_refused(self, pool: Pool, broken: Life) -> None:
        with pytest.raises(asyncpg.CheckViolationError):
            await saved(pool, broken)

    async def test_the_first_word_is_not_overwritten_by_who_did_not_see_it(self, pool: Pool) -> None:
        await saved(pool, life(fence=3))
        with pytest.raises(asyncpg.SerializationError):
            await transact(pool, lambda connection: store.save(connection, {}, [life("w0"), life(fence=1)], NOW))
        assert (await found(pool)).fence == 3
        assert await pool.fetchrow(SQL["find_agent"], "w0") is None

    async def test_a_transaction_that_raises_leaves_nothing(self, pool: Pool) -> None:
        await saved(pool, life())
        before = await found(pool)

        async def work(connection: Connection) -> None:
            await store.save(connection, {"w1": before}, [replace(before, status=Status.SUSPECT, fence=9)], NOW)
            await store.save(connection, {}, [life("w2")], NOW)
            await connection.fetchval(SQL["open_restart"], uuid7(), "w1", 1, "stopped", "x", "start", NOW, NOW)
            await store.record(connection, before, SEEN, DECIDED, source="look", now=NOW)
            raise LookupError

        with pytest.raises(LookupError):
            await transact(pool, work)
        assert await found(pool) == before
        assert await pool.fetchrow(SQL["find_agent"], "w2") is None
        assert await pool.fetchrow(SQL["find_open"], "w1") is None
        assert await pool.fetch(SQL["last_evidence"], "w1", 9) == []
        assert await opened(pool) is not None

    async def test_the_clock_is_the_stores_own_unless_it_is_given(self, pool: Pool) -> None:
        assert await pool.fetchval(SQL["read_clock"], NOW) == NOW
        told = await pool.fetchval(SQL["read_clock"], None)
        assert abs((told - datetime.now(UTC)).total_seconds()) < 60

    async def test_statuses_that_were_ever_told_are_told_again(self, pool: Pool) -> None:
        gone = life("c", removed=True, status=Status.REMOVED)
        await saved(pool, life("b", status=Status.SUSPECT), life("a", status=Status.OFFLINE), life("d"), gone)
        assert [row["workspace_id"] for row in await pool.fetch(SQL["repeat_statuses"])] == ["a", "b"]

    async def test_measures_are_by_status(self, pool: Pool) -> None:
        await saved(
            pool, life("a", heard_at=at(-500)), life("b", heard_at=at(-900), expects_beats=False),
            life("c", blind_since=at(-500)), life("d", status=Status.OFFLINE, blind_since=NOW),
        )  # fmt: skip
        rows = {row["status"]: row for row in await pool.fetch(SQL["measure"])}
        assert {name: (row["agents"], row["blind"]) for name, row in rows.items()} == {
            "online": (3, 1), "offline": (1, 0),
        }  # fmt: skip
        assert 499 < rows["online"]["silent_s"] < 900
        assert rows["offline"]["silent_s"] is None


class TestLooks:
    async def test_what_is_due_soon_is_taken_with_what_is_due(self, pool: Pool) -> None:
        await saved(
            pool, life("c", next_check_at=NOW), life("b", next_check_at=at(2)), life("a", next_check_at=at(2.1)),
            life("d", driver=None),
        )  # fmt: skip
        assert await pool.fetch(SQL["claim_looks"], at(-0.1), 2.0, 9, 10.0) == []
        rows = await pool.fetch(SQL["claim_looks"], NOW, 2.0, 9, 10.0)
        assert {row["workspace_id"] for row in rows} == {"b", "c"}
        assert {row["next_check_at"] for row in rows} == {at(10)}
        assert (await found(pool, "c")).next_check_at == at(10)
        assert await pool.fetchval(SQL["next_look_in"], NOW) == pytest.approx(2.1)

    async def test_no_more_are_taken_than_asked_for(self, pool: Pool) -> None:
        await saved(pool, *(life(name, next_check_at=NOW) for name in "cab"))
        first = await pool.fetch(SQL["claim_looks"], NOW, 2.0, 2, 10.0)
        assert {row["workspace_id"] for row in first} == {"a", "b"}
        assert len(await pool.fetch(SQL["claim_looks"], NOW, 2.0, 2, 10.0)) == 1

    async def test_nothing_to_look_at_is_no_moment(self, pool: Pool) -> None:
        await saved(pool, life())
        assert await pool.fetchval(SQL["next_look_in"], NOW) is None

    async def test_suspects_of_an_engine_are_those_of_the_last_30_s(self, pool: Pool) -> None:
        def suspected(name: str, ago_s: float, **about: Any) -> Life:
            return life(name, suspected_at=at(-ago_s), suspected_last_at=NOW, suspicions=1, **about)

        await saved(
            pool, suspected("a", 29.9), suspected("b", 30), suspected("c", 1, driver="docker"), suspected("d", 1),
            life("e"), suspected("f", 1, paused=True), suspected("g", 1, desired="stopped"),
            suspected("h", 1, status=Status.GAVE_UP), suspected("i", 1, removed=True, status=Status.REMOVED),
        )  # fmt: skip
        row = await pool.fetchrow(SQL["fleet_doubts"], NOW, "process", ["d"])
        assert row is not None
        assert (row["agents"], row["suspects"]) == (4, 1)

    async def test_the_fleet_is_heard_through_those_that_beat(self, pool: Pool) -> None:
        row = await pool.fetchrow(SQL["fleet_heard"])
        assert row is not None
        assert (row["expected"], row["beat_at"], row["cadence_s"]) == (0, None, None)
        await saved(
            pool, life("a", beats=1, beat_at=at(-9), cadence_s=20.0),
            life("b", beats=2, beat_at=at(-8), cadence_s=10.0),
            life("c"), life("d", beats=1, beat_at=NOW, status=Status.OFFLINE),
            life("e", beats=1, beat_at=NOW, expects_beats=False), life("f", beats=1, beat_at=NOW, paused=True),
        )  # fmt: skip
        row = await pool.fetchrow(SQL["fleet_heard"])
        assert row is not None
        assert (row["expected"], row["beat_at"], row["cadence_s"]) == (2, at(-8), 20.0)


SEEN = Observation(Seen.STOPPED, "c1")
DECIDED = Decision(Verdict.SUSPECT, Reason.SUSPECTED, "1 of 2.", life())


class TestEvidence:
    async def test_evidence_is_told_newest_first_and_forgotten(self, pool: Pool) -> None:
        async def keep(connection: Connection) -> None:
            for name, days in (("w1", 9), ("w1", 8), ("w2", 8), ("w1", 0)):
                moment = NOW - timedelta(days=days)
                await store.record(connection, life(name), SEEN, DECIDED, source="look", now=moment)

        await transact(pool, keep)
        rows = await pool.fetch(SQL["last_evidence"], "w1", 2)
        assert [row["at"] for row in rows] == [NOW, NOW - timedelta(days=8)]
        assert (rows[0]["seen"], rows[0]["verdict"], rows[0]["reason"], rows[0]["source"]) == (
            "stopped", "suspect", "suspected", "look",
        )  # fmt: skip
        assert await pool.execute(SQL["forget_evidence"], NOW, 7, 2) == "DELETE 2"
        assert await pool.execute(SQL["forget_evidence"], NOW, 7, 2) == "DELETE 1"
        assert await pool.execute(SQL["forget_evidence"], None, 7, 2) == "DELETE 0"
        assert len(await pool.fetch(SQL["last_evidence"], "w1", 9)) == 1

    async def test_proxies_are_heard_without_a_break_for_three_beats(self, pool: Pool) -> None:
        assert await pool.fetchrow(SQL["hearing"], NOW) is None
        await pool.execute(SQL["hear_proxies"], ["p1"])
        first = await pool.fetchval(SQL["hearing"], datetime.now(UTC))
        await pool.execute(SQL["hear_proxies"], ["p1", "p2"])
        assert await pool.fetchval(SQL["hearing"], datetime.now(UTC)) == first
        assert await pool.fetchrow(SQL["hearing"], datetime.now(UTC) + timedelta(seconds=16)) is None
        await pool.execute(SQL["forget_proxies"])
        assert await pool.fetchval(SQL["hearing"], datetime.now(UTC)) == first

    async def test_a_command_is_noted_once(self, pool: Pool) -> None:
        query_id = uuid7()
        assert await pool.fetchval(SQL["insert_audit"], query_id, "anna", "restart", "w1", "") == query_id
        assert await pool.fetchval(SQL["insert_audit"], query_id, "anna", "restart", "w1", "") is None


class TestRestarts:
    async def test_one_restart_is_open_and_it_has_the_next_fence(self, pool: Pool) -> None:
        await saved(pool, life(fence=4, container_id="c1"))
        assert await opened(pool) is not None
        assert await opened(pool) is None
        restart = await transact(pool, lambda connection: store.find_open(connection, "w1"))
        assert restart is not None
        assert (restart.fence, restart.container_id, restart.driver, restart.tries) == (5, "c1", "process", 0)
        assert await transact(pool, lambda connection: store.find_open(connection, "w2")) is None

    @pytest.mark.parametrize(
        ("about", "incarnation"),
        [({}, 2), ({"driver": None}, 1), ({"removed": True, "status": Status.REMOVED}, 1)],
        ids=["another incarnation", "no driver", "removed"],
    )
    async def test_the_fence_refuses(self, pool: Pool, about: dict[str, Any], incarnation: int) -> None:
        await saved(pool, life(**about))
        assert await opened(pool, incarnation=incarnation) is None

    async def test_a_request_during_a_restart_may_only_hasten_it(self, pool: Pool) -> None:
        await saved(pool, life())
        await opened(pool, due_at=at(10))
        for due_at in (None, at(20), at(5)):
            await pool.execute(SQL["ask_again"], "w1", due_at)
        row = await pool.fetchrow(SQL["find_open"], "w1")
        assert row is not None
        assert (row["asked_again"], row["due_at"]) == (3, at(5))
        assert await pool.fetchval(SQL["next_restart_in"], NOW) == pytest.approx(5)

    async def test_an_engine_whose_restarts_wait_keeps_those_of_no_other_waiting(self, pool: Pool) -> None:
        await saved(pool, life("w1"), life("w2"), life("w3", driver="docker"))
        first = await opened(pool, "w1", due_at=at(-9))
        await opened(pool, "w2", due_at=at(-8))
        other = await opened(pool, "w3", due_at=at(-1))
        assert [row["restart_id"] for row in await pool.fetch(SQL["due_restarts"], NOW, 1)] == [first, other]

    async def test_a_lease_hides_it_from_others_until_it_ends(self, pool: Pool) -> None:
        await saved(pool, life("w1"), life("w2"))
        assert await pool.fetchval(SQL["next_restart_in"], NOW) is None
        second, first = await opened(pool, "w1", due_at=at(-1)), await opened(pool, "w2", due_at=at(-2))
        due = await pool.fetch(SQL["due_restarts"], NOW, 9)
        assert [row["restart_id"] for row in due] == [first, second]
        assert len(await pool.fetch(SQL["due_restarts"], NOW, 1)) == 1
        assert await pool.fetch(SQL["due_restarts"], at(-3), 9) == []
        await pool.execute(SQL["lease_restart"], first, NOW, 75.0, "one")
        assert [row["restart_id"] for row in await pool.fetch(SQL["due_restarts"], at(75), 9)] == [second]
        assert len(await pool.fetch(SQL["due_restarts"], at(75.1), 9)) == 2
        row = await pool.fetchrow(SQL["lock_restart"], first)
        assert row is not None
        assert (row["owner"], row["tries"], row["began_at"], row["lease_until"]) == ("one", 1, NOW, at(75))
        await pool.execute(SQL["lease_restart"], first, at(80), 75.0, "two")
        row = await pool.fetchrow(SQL["lock_restart"], first)
        assert row is not None
        assert (row["owner"], row["tries"], row["began_at"]) == ("two", 2, NOW)

    async def test_it_is_ended_by_who_holds_it_or_while_nobody_does(self, pool: Pool) -> None:
        await saved(pool, life())
        restart_id = await opened(pool)
        await pool.execute(SQL["lease_restart"], restart_id, NOW, 75.0, "one")
        assert not await ended(pool, restart_id, by="two")
        assert not await ended(pool, restart_id, by="two", now=at(75))
        assert await ended(pool, restart_id, by="one")
        assert not await ended(pool, restart_id, by="one")
        again = await opened(pool)
        assert await ended(pool, again)
        last = await opened(pool)
        await pool.execute(SQL["lease_restart"], last, NOW, 75.0, "one")
        assert await ended(pool, last, by="two", now=at(75.1))
        assert [row["result"] for row in await pool.fetch(SQL["last_restarts"], "w1", 9)] == ["started"] * 3

    async def test_a_call_that_failed_is_put_off_by_its_holder(self, pool: Pool) -> None:
        await saved(pool, life())
        restart_id = await opened(pool)
        await pool.execute(SQL["lease_restart"], restart_id, NOW, 75.0, "one")
        assert await pool.fetchval(SQL["postpone_restart"], restart_id, at(10), "500", "two") is None
        assert await pool.fetchval(SQL["postpone_restart"], restart_id, at(10), "500", "one") == "w1"
        row = await pool.fetchrow(SQL["lock_restart"], restart_id)
        assert row is not None
        assert (row["owner"], row["lease_until"], row["due_at"], row["last_error"]) == (None, None, at(10), "500")
        assert await ended(pool, restart_id)
        row = await pool.fetchrow(SQL["lock_restart"], restart_id)
        assert row is not None
        assert row["last_error"] == "500", "an end without words keeps the last"

    async def test_a_kill_becomes_a_start_once(self, pool: Pool) -> None:
        await saved(pool, life())
        restart_id = await opened(pool, reason="ceiling", phase="kill")
        await pool.execute(SQL["lease_restart"], restart_id, NOW, 75.0, "one")
        assert await pool.fetchval(SQL["killed_restart"], restart_id, "two") is None
        assert await pool.fetchval(SQL["killed_restart"], restart_id, "one") == "w1"
        assert await pool.fetchval(SQL["killed_restart"], restart_id, "one") is None

    async def test_only_started_restarts_that_nobody_ordered_count_against_the_budget(self, pool: Pool) -> None:
        await saved(pool, life())
        for reason, decided_at in (("stopped", at(-600)), ("stopped", at(-599)), ("operator", NOW), ("ceiling", NOW)):
            assert await ended(pool, await opened(pool, reason=reason, decided_at=decided_at))
        withdrawn = await opened(pool)
        await pool.fetchval(SQL["end_restart"], withdrawn, NOW, "withdrawn", None, None)
        await opened(pool)
        assert await pool.fetchval(SQL["recent_restarts"], "w1", at(-600)) == 1

    async def test_who_restarts_is_counted_by_engine(self, pool: Pool) -> None:
        def booting(name: str, ago_s: float, **about: Any) -> Life:
            values = {"status": Status.RESTARTING, "boot_until": at(99), "restarted_at": at(-ago_s), **about}
            return life(name, **values)

        await saved(
            pool, life("a"), life("b"), booting("c", 29.9), booting("d", 30), booting("e", 1, boot_until=None),
            booting("f", 1, status=Status.ONLINE), life("g", driver="docker"), life("h", driver=None),
            booting("i", 1, removed=True, status=Status.REMOVED),
        )  # fmt: skip
        await pool.execute(SQL["hold_fleet"])
        await pool.execute(SQL["lease_restart"], await opened(pool, "a"), NOW, 75.0, "one")
        await opened(pool, "b")
        rows = await pool.fetch(SQL["fleet_in_flight"], NOW, 30.0)
        assert {row["driver"]: (row["agents"], row["in_flight"]) for row in rows} == {
            "process": (6, 2), "docker": (1, 0),
        }  # fmt: skip

    async def test_old_ones_are_forgotten_and_open_ones_are_not(self, pool: Pool) -> None:
        await saved(pool, life("w1"), life("w2"))
        old = NOW - timedelta(days=8)
        assert await ended(pool, await opened(pool, decided_at=old), now=old)
        await opened(pool, "w2", decided_at=old)
        assert await pool.execute(SQL["forget_restarts"], NOW, 7, 9) == "DELETE 1"
        assert await pool.fetchrow(SQL["find_open"], "w2") is not None


class TestOrders:
    async def test_an_order_is_taken_once_and_again_with_more_time(self, pool: Pool) -> None:
        first = order()
        assert await ordered(pool, first)
        assert not await ordered(pool, first)
        assert await ordered(pool, order(order_id=first.order_id, expires_at=at(90)))
        (row,) = await pool.fetch(SQL["open_orders"], "w1")
        assert row["expires_at"] == at(90)
        assert await answered(pool, first.order_id, "expired")
        assert await pool.fetch(SQL["open_orders"], "w1") == []
        assert await ordered(pool, order(order_id=first.order_id, expires_at=at(120)))
        assert await answered(pool, first.order_id, "applied")
        assert not await answered(pool, first.order_id, "applied")
        assert not await ordered(pool, order(order_id=first.order_id, expires_at=at(999)))

    async def test_a_kill_counts_for_its_life_and_for_three_minutes(self, pool: Pool) -> None:
        fact = order()
        await ordered(pool, fact)
        assert await pool.fetchval(SQL["was_killed"], "w1", 1, NOW) is False
        await answered(pool, fact.order_id, "applied")
        assert await pool.fetchval(SQL["was_killed"], "w1", 1, at(179.9)) is True
        assert await pool.fetchval(SQL["was_killed"], "w1", 1, at(180)) is False
        assert await pool.fetchval(SQL["was_killed"], "w1", 2, NOW) is False

    async def test_answered_orders_are_forgotten(self, pool: Pool) -> None:
        done, waiting = order(), order()
        await ordered(pool, done)
        await ordered(pool, waiting)
        await answered(pool, done.order_id, "stale", NOW - timedelta(days=8))
        assert await pool.execute(SQL["forget_orders"], NOW, 7, 9) == "DELETE 1"
        assert [row["order_id"] for row in await pool.fetch(SQL["open_orders"], "w1")] == [waiting.order_id]


def test_the_store_in_memory_has_every_statement() -> None:
    assert Memory().names == {*SQL, "insert_outbox"}
