"""Ticks on real servers, with real agents: no fire lost or run twice, and the newest prompt at dispatch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.queue import deliver
from services.queue.history import History
from shared.batches import encode
from shared.facts import Priority, ScheduleChanged, ScheduleTick
from tests.conftest import Stack, until
from tests.integration.calendar_kit import Calendar, at, calendar, free, said, tick
from tests.integration.queue_kit import agent, queue_service, queue_settings

LONG = 60.0
"""A turn that ends when the test says so."""
TIMING = {"sweep_s": 0.3, "reconcile_s": 0.3, "busy_cap_s": 0.2, "follow_min_s": 0.1, "follow_max_s": 0.2}


@pytest.fixture
async def days(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Calendar]:
    """A calendar, and the queue service."""
    async with calendar(stack, monkeypatch) as opened, queue_service(stack, **TIMING):
        yield opened
        counters = "SELECT workspace_id, waiting, running FROM workspaces WHERE waiting < 0 OR running < 0"
        assert not await opened.rows.fetch(counters)


def fresh() -> tuple[str, UUID]:
    """A workspace and a schedule of it."""
    return f"w-{uuid7().hex[-8:]}", uuid7()


async def counted(days: Calendar, name: str) -> tuple[int, int]:
    row = await days.rows.fetchrow("SELECT waiting, running FROM workspaces WHERE workspace_id = $1", name)
    return (row["waiting"], row["running"]) if row else (0, 0)


# ── what waits ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_twelve_fires_behind_one_delivery_are_one_tick_with_the_newest_prompt(days: Calendar) -> None:
    """C-B1, C-E1, C-V1: the story behind all this. Eleven are told with the first, which runs once, as it is now."""
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "the prompt of before")
        await days.front.keep(long := days.front.busy(name, "six hours"))
        await worker.until(lambda: worker.active == 1)
        first = await days.fire(name, schedule, 0)
        await days.waiting(first)
        for minute in range(1, 12):
            await days.fire(name, schedule, minute)
        await days.waiting(first, 12)
        item = await days.front.item(first)
        assert (item["kind"], item["schedule_id"], item["merged_count"]) == ("tick", str(schedule), 12)
        assert (item["fire_at"], item["first_missed_at"]) == ("2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z")
        assert item["waits"]["reason"] == "at_capacity"
        assert (await days.front.item(long.queue_id))["kind"] == "message"
        assert (await days.say(name, schedule, 2, "the prompt of 18:23")).withdrawn == 0
        worker.behave(work_s=0.01)
        free(worker)
        (done,) = await days.front.ended(first)
        assert (done["status"], done["merged_count"]) == ("completed", 12)
        assert [each.text for each in worker.received] == ["six hours", "the prompt of 18:23"]
        assert said(worker.received[1]) == {
            "kind": "tick", "schedule_id": str(schedule), "fire_at": "2026-11-21T12:00:00Z",
            "last_fire_at": "2026-11-21T12:11:00Z", "merged_count": 12, "first_missed_at": "2026-11-21T12:00:00Z",
            "rev": 2,
        }  # fmt: skip
        outcomes = await days.outcomes(schedule, 12)
        assert outcomes == {0: ("delivered", None), **dict.fromkeys(range(1, 12), ("coalesced", None))}
        assert days.told(schedule, 0).began_at is not None
        assert {
            (days.told(schedule, each).merged_into, days.told(schedule, each).queue_id) for each in range(1, 12)
        } == {(at(0), first)}
        assert await counted(days, name) == (0, 0)


async def test_while_one_is_delivered_the_next_waits_as_the_one(days: Calendar) -> None:
    """C-B1, C-B2: the tick itself is what runs for long."""
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "work")
        first = await days.fire(name, schedule, 0)
        await worker.until(lambda: worker.active == 1)
        second = await days.fire(name, schedule, 1)
        await days.waiting(second)
        await days.fire(name, schedule, 2)
        await days.waiting(second, 2)
        worker.behave(work_s=0.01)
        free(worker)
        await days.front.ended(first, second)
        assert [said(each)["merged_count"] for each in worker.received] == [1, 2]
        outcomes = await days.outcomes(schedule, 3)
        assert outcomes == {0: ("delivered", None), 1: ("delivered", None), 2: ("coalesced", None)}
        ids = [json.loads(each.body)["params"]["message"] for each in worker.received]
        assert [each["messageId"] for each in ids] == [str(first), str(second)]
        assert ids[0]["contextId"] != ids[1]["contextId"]


async def test_messages_of_the_same_priority_keep_their_place_among_ticks(days: Calendar) -> None:
    """C-B3, C-B5: CRITICAL first, the rest by when it came; two schedules do not stand in each other's way."""
    (name, one), (_, two) = fresh(), fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.say(name, one, 1, "one")
        await days.say(name, two, 1, "two")
        first, second = await days.fire(name, one, 0), await days.fire(name, two, 0)
        await days.waiting(second)
        user = days.front.busy(name, "user")
        critical = days.front.busy(name, "critical", priority=Priority.CRITICAL)
        await days.front.keep(user)
        await days.front.keep(critical)
        await days.fire(name, one, 1)
        await days.waiting(first, 2)
        await days.front.register(name, worker.url)
        await days.front.ended(first, second, user.queue_id, critical.queue_id)
        assert [each.text for each in worker.received] == ["critical", "one", "two", "user"]


async def test_queue_all_keeps_every_fire_in_its_order(days: Calendar) -> None:
    """C-B2; with one context for all of them."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.say(name, schedule, 1, "each")
        fires = [await days.fire(name, schedule, each, overlap="queue_all", context="same") for each in range(4)]
        for queue_id in fires:
            await days.waiting(queue_id)
        await days.front.register(name, worker.url)
        await days.front.ended(*fires)
        assert [each.queue_id for each in worker.received] == [str(each) for each in fires]
        assert len({json.loads(each.body)["params"]["message"]["contextId"] for each in worker.received}) == 1
        assert set((await days.outcomes(schedule, 4)).values()) == {("delivered", None)}


async def test_skip_runs_only_what_need_not_wait(days: Calendar) -> None:
    """C-B2: the agent does something else, an earlier one runs, and then nothing is in the way."""
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "if free")
        await days.front.keep(days.front.busy(name, "else"))
        await worker.until(lambda: worker.active == 1)
        await days.fire(name, schedule, 0, overlap="skip")
        await days.outcomes(schedule, 1)
        free(worker)
        await worker.until(lambda: worker.active == 0)

        async def idle() -> bool:
            return await counted(days, name) == (0, 0)

        await until(idle)
        second = await days.fire(name, schedule, 1, overlap="skip")
        await worker.until(lambda: worker.active == 1)
        await days.fire(name, schedule, 2, overlap="skip")
        await days.outcomes(schedule, 2)
        free(worker)
        await days.front.ended(second)
        outcomes = await days.outcomes(schedule, 3)
        assert outcomes == {0: ("skipped", "in_use"), 1: ("delivered", None), 2: ("skipped", "running")}


# ── what the schedule says now ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_pause_withdraws_what_waits_and_what_comes_until_it_is_resumed(days: Calendar) -> None:
    """C-E4, C-E7: told again, it is told again; nothing of the past runs afterwards."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.say(name, schedule, 1, "p")
        waiting = await days.fire(name, schedule, 0)
        await days.waiting(waiting)
        await days.fire(name, schedule, 1)
        await days.waiting(waiting, 2)
        assert (await days.say(name, schedule, 2, "p", paused=True)).withdrawn == 1
        assert (await days.say(name, schedule, 2, "p", paused=True)).withdrawn == 0
        (item,) = await days.front.ended(waiting)
        assert (item["status"], item["reason"]) == ("canceled", "schedule_paused")
        await days.fire(name, schedule, 2, rev=1)  # on its way when the pause came
        await days.outcomes(schedule, 3)
        after = await days.fire(name, schedule, 3, rev=3)  # it was resumed, which is on its way
        await days.waiting(after)
        await days.front.register(name, worker.url)
        assert (await days.say(name, schedule, 3, "again")).withdrawn == 0
        await days.front.ended(after)
        outcomes = await days.outcomes(schedule, 4)
        assert outcomes == {
            0: ("canceled", "schedule_paused"), 1: ("coalesced", None), 2: ("canceled", "schedule_paused"),
            3: ("delivered", None),
        }  # fmt: skip
        assert [each.text for each in worker.received] == ["again"]


async def test_a_deleted_schedule_never_runs_again_also_if_its_tick_comes_back(days: Calendar) -> None:
    """C-E4: all that waits ends, the one that its agent has goes on; pre-empted, it ends instead of waiting again."""
    name, schedule = fresh()
    async with agent(name, behaviour={"preempted": 1, "slow_s": LONG}) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        running = await days.fire(name, schedule, 0, overlap="queue_all")
        await worker.until(lambda: worker.active == 1)
        waiting = [await days.fire(name, schedule, minute, overlap="queue_all") for minute in (1, 2)]
        for queue_id in waiting:
            await days.waiting(queue_id)
        assert (await days.say(name, schedule, 2, deleted=True)).withdrawn == 2
        assert (await days.front.item(running))["status"] == "dispatched"
        free(worker)
        items = await days.front.ended(running, *waiting)
        assert {(item["status"], item["reason"]) for item in items} == {("canceled", "schedule_deleted")}
        await days.fire(name, schedule, 3)
        assert set((await days.outcomes(schedule, 4)).values()) == {("canceled", "schedule_deleted")}
        assert len(worker.received) == 1
        assert await counted(days, name) == (0, 0)


async def test_a_tick_waits_for_the_word_of_its_rev_and_holds_up_nobody(days: Calendar) -> None:
    """C-E1: the fire came first, and is told nothing older than what it fired for; so is one that it merges into."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.front.register(name, worker.url)
        early = await days.fire(name, schedule, 0, rev=2)
        await days.waiting(early)
        item = await days.front.item(early)
        assert (item["waits"]["reason"], item["expires_at"] is not None) == ("awaits_prompt", True)
        await days.front.keep(user := days.front.busy(name, "user"))
        await days.front.ended(user.queue_id)
        await days.say(name, schedule, 1, "too old")
        await days.fire(name, schedule, 1, rev=3)
        await days.waiting(early, 2)
        await days.say(name, schedule, 2, "not new enough")
        await days.front.keep(second := days.front.busy(name, "user again"))
        await days.front.ended(second.queue_id)
        await days.waiting(early, 2)
        await days.say(name, schedule, 3, "new")
        await days.front.ended(early)
        assert [each.text for each in worker.received] == ["user", "user again", "new"]
        assert said(worker.received[-1])["rev"] == 3


async def test_what_waits_for_its_turn_waits_for_the_word_of_a_newer_fire_too(days: Calendar) -> None:
    """C-E1: the fire says that there is a newer prompt; the older one is not run in its name."""
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "old")
        await days.front.keep(days.front.busy(name, "long"))
        await worker.until(lambda: worker.active == 1)
        waits = await days.fire(name, schedule, 0)
        await days.waiting(waits)
        await days.fire(name, schedule, 1, rev=2)
        await days.waiting(waits, 2)
        await days.front.keep(user := days.front.busy(name, "user"))
        worker.behave(work_s=0.01)
        free(worker)
        await days.front.ended(user.queue_id)
        assert (await days.front.item(waits))["waits"]["reason"] == "awaits_prompt"
        await days.say(name, schedule, 2, "new")
        await days.front.ended(waits)
        assert [each.text for each in worker.received] == ["long", "user", "new"]


async def test_facts_that_come_twice_late_and_out_of_order_are_in_effect_once(days: Calendar) -> None:
    """C-V1: a shuffled bus; the newest rev counts, and each fire."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.say(name, schedule, 5, "newest")
        assert (await days.say(name, schedule, 4, "older", paused=True)).rev == 5, "known: it is told what counts"
        facts = [tick(name, schedule, minute, rev=5) for minute in range(6)]
        await days.publisher.publish(facts[5])
        await days.waiting(facts[5].queue_id)
        for fact in (*reversed(facts), *facts):
            await days.publisher.publish(fact)
        again = facts[5].model_copy(update={"fact_id": uuid7()})  # a dead letter that was published again
        await days.publisher.publish(again)
        first = facts[5].queue_id
        await days.waiting(first, 6)
        seen = "SELECT count(*) FROM inbox WHERE fact_id = $1"

        async def read() -> bool:
            return bool(await days.rows.fetchval(seen, again.fact_id))

        await until(read)
        await days.front.register(name, worker.url)
        await days.front.ended(first)
        (received,) = worker.received
        assert received.text == "newest"
        told = said(received)
        assert (told["merged_count"], told["first_missed_at"]) == (6, "2026-11-21T12:00:00Z")
        assert (told["fire_at"], told["last_fire_at"]) == ("2026-11-21T12:05:00Z", "2026-11-21T12:05:00Z")
        outcomes = await days.outcomes(schedule, 6)
        assert outcomes == {5: ("delivered", None), **dict.fromkeys(range(5), ("coalesced", None))}
        assert {days.told(schedule, minute).merged_into for minute in range(5)} == {at(5)}


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fate", ["preempted", "failing"])
async def test_a_tick_that_comes_back_stands_for_the_one_that_waits(days: Calendar, fate: str) -> None:
    """C-B4: its turn is over at the agent, so the next tells of both; the newer ends, visibly."""
    name, schedule = fresh()
    async with agent(name, behaviour={fate: 1, "slow_s": LONG}) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        older = await days.fire(name, schedule, 0)
        await worker.until(lambda: worker.active == 1)
        newer = await days.fire(name, schedule, 1)
        await days.waiting(newer)
        await days.fire(name, schedule, 2)
        await days.waiting(newer, 2)
        await days.say(name, schedule, 2, "edited")
        worker.behave(slow_s=0, work_s=0.01)
        free(worker)
        done, gone = await days.front.ended(older, newer)
        assert (done["status"], done["merged_count"], done["delivery_no"]) == ("completed", 3, 2)
        assert (gone["status"], gone["superseded_by"]) == ("superseded", str(older))
        assert [(each.text, said(each)["merged_count"]) for each in worker.received] == [("p", 1), ("edited", 3)]
        outcomes = await days.outcomes(schedule, 3)
        assert outcomes == {0: ("delivered", None), 1: ("coalesced", None), 2: ("coalesced", None)}
        assert (days.told(schedule, 1).merged_into, days.told(schedule, 2).merged_into) == (at(0), at(1))
        assert await counted(days, name) == (0, 0)


async def test_a_tick_that_its_agent_may_have_stands_for_no_other(days: Calendar) -> None:
    """C-B4: the connection broke; an agent that dedupes would answer with the turn that began before the next fire."""
    name, schedule = fresh()
    async with agent(name, behaviour={"cut": 1, "slow_s": LONG}) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        older = await days.fire(name, schedule, 0)
        await worker.until(lambda: worker.active == 1)
        newer = await days.fire(name, schedule, 1)
        await days.waiting(newer)
        worker.behave(slow_s=0, work_s=0.01)
        free(worker)
        items = await days.front.ended(older, newer)
        assert [item["status"] for item in items] == ["completed", "completed"]
        assert {said(each)["merged_count"] for each in worker.received} == {1}
        assert set((await days.outcomes(schedule, 2)).values()) == {("delivered", None)}


async def test_a_busy_agent_costs_a_tick_nothing_and_it_goes_on_gathering(days: Calendar) -> None:
    """C-B4: busy between the check and the dispatch."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        worker.busy_for(LONG)
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        first = await days.fire(name, schedule, 0)
        await worker.until(lambda: len(worker.refused) >= 2)
        for minute in (1, 2, 3):
            await days.fire(name, schedule, minute)

        async def all_told() -> bool:
            return len(days.of(schedule)) == 3

        await until(all_told)
        worker.busy_for(0)
        live = {"delivered": 0, "coalesced": 0}
        for outcome, _ in (await days.outcomes(schedule, 4)).values():
            live[outcome] += 1
        assert live == {"delivered": 1, "coalesced": 3}
        (item,) = await days.front.ended(UUID(worker.received[0].queue_id or ""))
        assert (item["attempts"], item["merged_count"]) == (0, 4)
        assert str(first) in {each.queue_id for each in worker.refused}


@pytest.mark.parametrize(
    ("behaviour", "reason"), [({"cut": -1}, "poison"), ({"refusing": -1}, "refused")], ids=["poison", "refused"]
)
async def test_a_tick_that_fails_says_why_and_the_next_one_runs(
    days: Calendar, behaviour: dict[str, int], reason: str
) -> None:
    name, schedule = fresh()
    async with agent(name, behaviour={"work_s": 0.01, **behaviour}) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        bad = await days.fire(name, schedule, 0)
        (item,) = await days.front.ended(bad)
        assert (item["status"], item["reason"], item["kind"]) == ("failed", reason, "tick")
        worker.behave(cut=0, refusing=0)
        good = await days.fire(name, schedule, 1)
        await days.front.ended(good)
        assert await days.outcomes(schedule, 2) == {0: ("failed", reason), 1: ("delivered", None)}
        assert days.told(schedule, 0).began_at is not None


async def test_a_tick_has_the_ceiling_of_its_schedule(days: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliver, "CEILING_SLACK_S", 0.0)
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        await days.front.ended(await days.fire(name, schedule, 0, ceiling_s=0.3))
        assert await days.outcomes(schedule, 1) == {0: ("ceiling", None)}


async def test_a_tick_that_is_given_up_on_has_failed_and_one_for_a_removed_workspace_is_canceled(
    days: Calendar,
) -> None:
    """C-E5."""
    name, schedule = fresh()
    await days.say(name, schedule, 1, "p")
    old = await days.fire(name, schedule, 0)
    await days.waiting(old)
    await days.rows.execute("UPDATE a2a_queue SET give_up_at = now() WHERE queue_id = $1", old)
    (item,) = await days.front.ended(old)
    assert item["status"] == "expired"
    await days.remove(name)
    await days.fire(name, schedule, 1)
    assert await days.outcomes(schedule, 2) == {0: ("failed", "expired"), 1: ("canceled", "workspace_removed")}
    assert [days.told(schedule, minute).began_at for minute in (0, 1)] == [None, None]


async def test_a_replica_that_stops_leaves_its_tick_to_go_on_alone(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C-B4: written back while its agent works; what fired since is a turn of its own."""
    name, schedule = fresh()
    async with calendar(stack, monkeypatch) as days, agent(name, work_s=LONG) as worker:
        async with queue_service(stack, **{**TIMING, "drain_s": 0.0}):
            await days.front.register(name, worker.url)
            await days.say(name, schedule, 1, "p")
            older = await days.fire(name, schedule, 0)
            await worker.until(lambda: worker.active == 1)
            newer = await days.fire(name, schedule, 1)
            await days.waiting(newer)
        rows = [await days.row(each) for each in (older, newer)]
        assert [(row["status"], row["body"], row["coalesces"]) for row in rows if row] == [
            ("queued", b"", False),
            ("queued", b"", True),
        ]
        worker.behave(work_s=0.01)
        free(worker)
        async with queue_service(stack, **TIMING):
            await days.front.ended(older, newer)
            assert set((await days.outcomes(schedule, 2)).values()) == {("delivered", None)}
            assert {each.queue_id for each in worker.received} == {str(older), str(newer)}
            assert await counted(days, name) == (0, 0)


async def test_a_tick_whose_task_its_agent_accepted_is_followed_through_a_restart_and_a_pause(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C-B4, C-E4: it runs already, whatever its schedule says since; it is neither sent again nor withdrawn."""
    name, schedule = fresh()
    behaviour = {"asynchronous": True, "work_s": LONG}
    async with calendar(stack, monkeypatch) as days, agent(name, behaviour=behaviour) as worker:
        async with queue_service(stack, **{**TIMING, "drain_s": 0.0}):
            await days.front.register(name, worker.url)
            await days.say(name, schedule, 1, "p")
            running = await days.fire(name, schedule, 0)

            async def accepted() -> bool:
                row = await days.row(running)
                return row is not None and row["agent_task_id"] is not None

            await until(accepted)
        async with queue_service(stack, **TIMING):
            assert (await days.say(name, schedule, 2, "p", paused=True)).withdrawn == 0
            free(worker)
            await days.front.ended(running)
            assert len(worker.received) == 1
            assert await days.outcomes(schedule, 1) == {0: ("delivered", None)}


# ── verbs, and what cannot be read ───────────────────────────────────────────────────────────────────────────────────


async def test_what_may_be_done_with_an_item_may_be_done_with_a_tick(days: Calendar) -> None:
    """A retried tick is a message with the prompt that was sent: its fire is not settled again."""
    name, schedule = fresh()
    async with agent(name, behaviour={"refusing": 1, "work_s": 0.01}) as worker:
        await days.say(name, schedule, 1, "sent")
        withdrawn = await days.fire(name, schedule, 0)
        await days.waiting(withdrawn)
        status, body = await days.front.ask("cancel", name, queue_id=withdrawn)
        assert (status, body["status"], body["kind"]) == (200, "canceled", "tick")
        status, body = await days.front.ask("retry", name, queue_id=withdrawn)
        assert (status, body["code"]) == (409, "never_sent")
        dropped = await days.fire(name, schedule, 1)
        await days.waiting(dropped)
        status, body = await days.front.ask("cancel_many", name)
        assert (status, body["canceled"]) == (200, 1)
        await days.front.keep(user := days.front.busy(name, "user"))
        failed = await days.fire(name, schedule, 2)
        await days.waiting(failed)
        status, body = await days.front.ask("promote", name, queue_id=failed)
        assert (status, body["position"]) == (200, 1)
        status, body = await days.front.ask("list", name)
        assert [(each["kind"], each["merged_count"]) for each in body["items"]] == [("tick", 1), ("message", None)]
        await days.front.register(name, worker.url)
        await days.front.ended(failed, user.queue_id)
        await days.say(name, schedule, 2, "edited")
        status, body = await days.front.ask("retry", name, queue_id=failed)
        assert (status, body["kind"], body["schedule_id"], body["retry_of"]) == (201, "message", None, str(failed))
        await days.front.ended(UUID(body["queue_id"]))
        assert [each.text for each in worker.received] == ["sent", "user", "sent"]
        outcomes = await days.outcomes(schedule, 3)
        assert outcomes == {0: ("canceled", "canceled"), 1: ("canceled", "dropped"), 2: ("failed", "refused")}


async def test_one_bad_fact_of_the_calendar_takes_no_other_along(days: Calendar) -> None:
    """C-R5, C-V1: what cannot be read goes alone, and its fire has failed; a prompt may hold whatever JSON may."""
    name, schedule = fresh()
    prompt = 'nul \0, quotes ", émigré, 語\n'
    async with agent(name, work_s=0.01) as worker:
        bad_prompt = ScheduleChanged(workspace_id=name, rev=1, schedule_id=schedule, prompt="bad", name="mark")
        days.publisher.post_encoded(ScheduleChanged, encode(bad_prompt).replace(b'"mark"', b'"\\ud800"'))
        bad, good = (tick(name, schedule, minute) for minute in (0, 1))
        days.publisher.post_encoded(ScheduleTick, encode(bad).replace(b'"queue_one"', b'"whenever"'))
        days.publisher.post(good)
        await days.say(name, schedule, 1, prompt)
        await days.front.register(name, worker.url)
        await days.front.ended(good.queue_id)
        assert [json.loads(each.body)["params"]["message"]["parts"][0]["text"] for each in worker.received] == [prompt]
        assert await days.outcomes(schedule, 2) == {0: ("failed", "unreadable"), 1: ("delivered", None)}
        letters = await days.rows.fetch("SELECT fact_type, reason FROM dead_letters ORDER BY 1")
        assert [tuple(row) for row in letters] == [("ScheduleChanged", "invalid"), ("ScheduleTick", "invalid")]


async def test_a_deleted_schedule_is_forgotten_after_a_while_and_a_living_one_is_not(
    days: Calendar, stack: Stack
) -> None:
    (name, gone), (_, late), (_, lives) = fresh(), fresh(), fresh()
    for schedule in (gone, late, lives):
        await days.say(name, schedule, 1, "p")
    await days.say(name, gone, 2, deleted=True)
    await days.say(name, late, 2, deleted=True)
    assert not await days.rows.fetchval("SELECT prompt FROM schedules WHERE schedule_id = $1", gone)
    before = "UPDATE schedules SET changed_at = now() - interval '30 days' WHERE schedule_id = ANY($1)"
    await days.rows.execute(before, [gone, lives])
    await History(queue_settings(stack), days.rows).run_once()
    left = await days.rows.fetch("SELECT schedule_id FROM schedules")
    assert {row["schedule_id"] for row in left} == {late, lives}


async def test_two_replicas_settle_each_fire_once(days: Calendar, stack: Stack) -> None:
    """C-V1: fires, edits and deliveries at once; what was delivered stood for all that was told with it."""
    name = fresh()[0]
    schedules = [uuid7() for _ in range(4)]
    fires = 40
    async with agent(name, work_s=0.005, max_concurrent=2) as worker, queue_service(stack, **TIMING):
        await days.front.register(name, worker.url, maximum=2)

        async def run(schedule: UUID) -> None:
            for minute in range(fires):
                if minute % 8 == 0:
                    rev = minute // 8 + 1
                    changed = ScheduleChanged(workspace_id=name, rev=rev, schedule_id=schedule, prompt=f"rev {rev}")
                    await days.publisher.publish(changed)
                await days.fire(name, schedule, minute, rev=minute // 8 + 1)

        await asyncio.gather(*(run(schedule) for schedule in schedules))
        for schedule in schedules:
            outcomes = await days.outcomes(schedule, fires)
            assert len(outcomes) == fires
            assert {outcome for outcome, _ in outcomes.values()} <= {"delivered", "coalesced"}
        mine = [said(each) for each in worker.received]
        for schedule in schedules:
            told = [each for each in mine if each["schedule_id"] == str(schedule)]
            assert sum(each["merged_count"] for each in told) == fires
        assert all(each.text == f"rev {said(each)['rev']}" for each in worker.received)
        assert all(said(each)["rev"] >= _minute_of(said(each)["last_fire_at"]) // 8 + 1 for each in worker.received)
        assert await counted(days, name) == (0, 0)


def _minute_of(moment: str) -> int:
    return int(moment[14:16])
