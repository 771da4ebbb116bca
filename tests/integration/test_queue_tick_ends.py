"""What comes back of ticks, what may be done with them, and what cannot be read, on real servers."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.queue import deliver
from services.queue.history import History
from shared.batches import encode
from shared.facts import ScheduleChanged, ScheduleTick
from tests.conftest import Stack, until
from tests.integration.calendar_kit import LONG, TIMING, Calendar, at, calendar, counted, days, free, fresh, said, tick
from tests.integration.queue_kit import agent, queue_service, queue_settings

__all__ = ["days"]


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
    monkeypatch.setattr(deliver, "TURN_SLACK_S", 0.0)
    name, schedule = fresh()
    async with agent(name, work_s=LONG) as worker:
        await days.front.register(name, worker.url, checkpoint_grace_s=0.0, stop_grace_s=0.0)
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


async def test_a_replica_that_stops_leaves_its_tick_to_go_on_alone(stack: Stack) -> None:
    """C-B4: written back while its agent works; what fired since is a turn of its own."""
    name, schedule = fresh()
    async with calendar(stack) as days, agent(name, work_s=LONG) as worker:
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


async def test_a_tick_whose_task_its_agent_accepted_is_followed_through_a_restart_and_a_pause(stack: Stack) -> None:
    """C-B4, C-E4: it runs already, whatever its schedule says since; it is neither sent again nor withdrawn."""
    name, schedule = fresh()
    behaviour = {"asynchronous": True, "work_s": LONG}
    async with calendar(stack) as days, agent(name, behaviour=behaviour) as worker:
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


async def test_a_fire_that_met_a_bug_runs_once_it_is_published_again(days: Calendar) -> None:
    """C-R5: a table is not there, as after a deploy without its migration; said twice, it is published once."""
    name, schedule = fresh()
    async with agent(name, work_s=0.01) as worker:
        await days.front.register(name, worker.url)
        await days.say(name, schedule, 1, "p")
        await days.rows.execute("ALTER TABLE schedules RENAME TO away")
        try:
            fire = await days.fire(name, schedule, 0)
            assert await days.outcomes(schedule, 1) == {0: ("failed", "unreadable")}
        finally:
            await days.rows.execute("ALTER TABLE away RENAME TO schedules")
        letter = await days.rows.fetchval("SELECT digest FROM dead_letters WHERE fact_type = 'ScheduleTick'")
        for _ in range(2):
            status, body = await days.front.ask("replay", dead_letter=letter)
            assert (status, body["facts"]) == (200, 1)
        await days.front.ended(fire)
        assert [each.queue_id for each in worker.received] == [str(fire)]


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
