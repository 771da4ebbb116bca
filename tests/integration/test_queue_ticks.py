"""Ticks on real servers, with real agents: no fire lost or run twice, and the newest prompt at dispatch."""

from __future__ import annotations

import json

from uuid_utils.compat import uuid7

from shared.facts import Priority
from tests.conftest import until
from tests.integration.calendar_kit import LONG, Calendar, at, counted, days, free, fresh, said, tick
from tests.integration.queue_kit import agent

__all__ = ["days"]


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
