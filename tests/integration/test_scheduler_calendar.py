"""Schedules on their rows: what people may do with them, and what the queue's word about a fire changes."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from shared.database import Connection, transact
from shared.facts import TickSettled, WorkspaceRegistered, WorkspaceRemoved
from tests.integration.scheduler_kit import T0, Calendar, calendar, query, settled, whole

__all__ = ["calendar"]

MIN = timedelta(minutes=1)


async def test_a_schedule_is_created_once_however_often_it_is_said(calendar: Calendar) -> None:
    """A-S-10: and its prompt has the line ends that agents expect, whatever the caller's editor makes."""
    create = query("create", uuid7(), body=whole(name="a", prompt="one\r\ntwo\rthree"))
    status, first = (await calendar.ask(create))[0]
    assert (status, first["rev"], first["prompt"]) == (201, 1, "one\ntwo\nthree")
    assert first["next_fire_at"] > datetime.now(UTC).isoformat()
    again = create.model_copy(update={"query_id": uuid7()})
    assert await calendar.ask(create, again) == [(200, first), (200, first)]
    assert [(each.prompt, each.rev, each.deleted) for each in await calendar.changes()] == [
        ("one\ntwo\nthree", 1, False)
    ]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"cron": "* * * *"}, "wrong_field_count"),
        ({"cron": "0 0 30 2 *"}, "never_fires"),
        ({"cron": "0 0 * * *", "every_s": 5}, "not_one_rule"),
        ({"cron": "0 0 * * *", "timezone": "Mars/Base"}, "unknown_zone"),
        ({"cron": "0 " * 200}, "too_long"),
        ({"cron": "@reboot"}, "reboot"),
        ({"at": "2020-01-01T00:00:00Z"}, "never_fires"),
        ({"at": "2030-01-01T00:00:00"}, "invalid_schedule"),
        ({"every_s": 0}, "out_of_range"),
        ({"every_s": 60, "ends_at": "2020-01-01T00:00:00Z"}, "never_fires"),
        ({"every_s": 60, "remaining_runs": 0}, "never_fires"),
        ({"prompt": ""}, "invalid_schedule"),
        ({"prompt": "a\x00b"}, "invalid_schedule"),
        ({"prompt": "x" * 65_537}, "invalid_schedule"),
        ({"name": "a\nb"}, "invalid_schedule"),
        ({"priority": "HIGH"}, "invalid_schedule"),
        ({"overlap": "many"}, "invalid_schedule"),
        ({"jitter_s": -1}, "invalid_schedule"),
        ({"catchup_window_s": 0.5}, "invalid_schedule"),
        ({"next_fire_at": "2030-01-01T00:00:00Z"}, "invalid_schedule"),
    ],
)
async def test_what_cannot_be_is_refused_with_a_sentence(calendar: Calendar, body: dict[str, Any], code: str) -> None:
    """C-C4."""
    status, said = await calendar.do("create", uuid7(), body=whole(**body))
    assert (status, said["code"]) == (422, code)
    assert len(said["detail"]) > 10
    assert await calendar.pool.fetchval("SELECT count(*) FROM schedules") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{",
        b'{"name": "\xff", "prompt": "p", "every_s": 5}',
        b'{"name": "n", "prompt": "\\ud800", "every_s": 5}',
    ],
    ids=["no object", "no JSON", "no UTF-8", "half a character"],
)
async def test_a_body_that_is_no_json_object_is_refused(calendar: Calendar, body: bytes) -> None:
    status, said = await calendar.do("create", uuid7(), body=body)
    assert (status, said["code"]) == (422, "invalid_json")


async def test_names_are_unique_among_the_living_of_a_workspace(calendar: Calendar) -> None:
    first = await calendar.create(name="a")
    assert (await calendar.do("create", uuid7(), body=whole(name="a")))[1]["code"] == "name_taken"
    assert (await calendar.do("create", uuid7(), body=whole(name="a"), workspace_id="other"))[0] == 201
    other = await calendar.create(name="b")
    assert (await calendar.do("patch", other, body={"name": "a"}))[1]["code"] == "name_taken"
    await calendar.do("delete", first)
    assert (await calendar.do("patch", other, body={"name": "a"}))[1]["name"] == "a"


async def test_another_workspaces_schedule_is_not_told_from_none(calendar: Calendar) -> None:
    """A-S-12."""
    schedule_id = await calendar.create()
    for verb in ("show", "fires", "preview", "patch", "delete", "run", "pause", "resume"):
        assert (await calendar.do(verb, schedule_id, workspace_id="other"))[0] == 404, verb
        assert (await calendar.do(verb, uuid7()))[0] == 404, verb
    assert (await calendar.do("list", None, workspace_id="other"))[1]["items"] == []
    assert (await calendar.do("create", schedule_id, body=whole(), workspace_id="other"))[1]["code"] == "id_taken"


async def test_a_change_says_its_rev_and_one_that_comes_too_late_is_refused(calendar: Calendar) -> None:
    """C-E6: of two who change what they have both read, one is told."""
    schedule_id = await calendar.create(name="a")
    answers = await calendar.ask(
        query("patch", schedule_id, body={"prompt": "x"}, if_match=1),
        query("patch", schedule_id, body={"prompt": "y"}, if_match=1),
    )
    assert sorted(status for status, _ in answers) == [200, 412]
    assert (await calendar.row(schedule_id))["rev"] == 2
    for verb in ("delete", "run", "pause", "resume"):
        assert (await calendar.do(verb, schedule_id, if_match=1))[0] == 412
    same = await calendar.do("patch", schedule_id, body={"prompt": (await calendar.row(schedule_id))["prompt"]})
    assert same[1]["rev"] == 2, "nothing has changed"
    assert [each.rev for each in await calendar.changes()] == [1, 2]


async def test_a_patch_keeps_what_it_does_not_name(calendar: Calendar) -> None:
    schedule_id = await calendar.create(jitter_s=9, ends_at="2099-01-01T00:00:00Z", priority="INFO")
    _, before = await calendar.do("show", schedule_id)
    _, after = await calendar.do("patch", schedule_id, body={"session_ceiling_s": 0, "ends_at": None})
    assert after == {**before, "session_ceiling_s": 0.0, "ends_at": None, "rev": 2}
    _, hourly = await calendar.do("patch", schedule_id, body={"every_s": 3600})
    assert "cron" not in hourly
    assert hourly["every_s"] == 3600


async def test_a_command_that_is_said_again_is_done_once(calendar: Calendar) -> None:
    """The answer of the first may have been lost; also a condition on the rev holds only the first time."""
    schedule_id = await calendar.create()
    run, patch = query("run", schedule_id), query("patch", schedule_id, body={"prompt": "q"}, if_match=1)
    delete = query("delete", schedule_id)
    for command in (run, patch, delete):
        (first,) = await calendar.ask(command)
        (second,) = await calendar.ask(command)
        assert first[1] == second[1]
    assert len(await calendar.ticks()) == 1
    assert [each.rev for each in await calendar.changes()] == [1, 2, 3]
    actions = [row["action"] for row in await calendar.pool.fetch("SELECT action FROM audit ORDER BY at")]
    assert actions == ["create", "run", "patch", "delete"]


async def test_a_command_after_its_deadline_does_nothing(calendar: Calendar) -> None:
    late = query("create", uuid7(), body=whole(), expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert (await calendar.ask(late))[0][0] == 408
    assert await calendar.changes() == []


async def test_pause_and_resume_never_fire_the_past(calendar: Calendar) -> None:
    """C-E7 A-S-18: what was due and not yet fired ends visibly, and 30 days of pause are nothing."""
    schedule_id = await calendar.create(every_s=60)
    await calendar.due_at(schedule_id, (await calendar.row(schedule_id))["anchor_at"] - 30 * 24 * 60 * MIN)
    _, paused = await calendar.do("pause", schedule_id, body={"note": "holiday"})
    assert (paused["paused"], paused["pause_note"], paused["next_fire_at"]) == (True, "holiday", None)
    assert paused["counts"]["canceled"] == paused["fires"] == 1, "an interval has no moment before it began"
    assert await calendar.do("pause", schedule_id) == (200, paused)
    await calendar.fire()
    _, resumed = await calendar.do("resume", schedule_id)
    assert (resumed["paused"], resumed["pause_note"]) == (False, None)
    assert resumed["next_fire_at"] > datetime.now(UTC).isoformat()
    await calendar.fire()
    assert await calendar.ticks() == []
    assert [each.paused for each in await calendar.changes()] == [False, True, False]


async def test_a_deleted_schedule_never_fires_again_and_its_history_stays(calendar: Calendar) -> None:
    """C-E4."""
    schedule_id = await calendar.create(cron="* * * * *")
    await calendar.due_at(schedule_id, T0)
    await calendar.fire(T0)
    await calendar.due_at(schedule_id, T0 + MIN)
    assert (await calendar.do("delete", schedule_id))[0] == 200
    await calendar.fire()
    assert len(await calendar.ticks()) == 1
    _, fires = await calendar.do("fires", schedule_id)
    assert [each["outcome"] for each in fires["items"]] == ["canceled", None]
    assert fires["items"][0]["reason"] == "deleted"
    assert (await calendar.do("show", schedule_id))[0] == 404
    assert (await calendar.changes())[-1].deleted


async def test_a_run_by_hand_takes_none_of_the_runs_and_waits_for_a_resume(calendar: Calendar) -> None:
    """C-E8."""
    schedule_id = await calendar.create(remaining_runs=1, paused=True)
    assert (await calendar.do("run", schedule_id))[1]["code"] == "paused"
    await calendar.do("resume", schedule_id)
    status, fire = await calendar.do("run", schedule_id)
    assert (status, fire["outcome"], fire["reason"]) == (201, None, "by_hand")
    (tick,) = await calendar.ticks()
    assert (str(tick.queue_id), tick.rev) == (fire["queue_id"], 2)
    await calendar.settle(settled(tick, "coalesced", merged_into=tick.fire_at))
    _, now = await calendar.do("show", schedule_id)
    assert (now["remaining_runs"], now["counts"]["coalesced"], now["fires"]) == (1, 1, 1)


async def test_a_preview_is_what_then_fires(calendar: Calendar) -> None:
    """C-V4."""
    schedule_id = await calendar.create(cron="*/7 3 * * *", timezone="Europe/Berlin")
    _, preview = await calendar.do("preview", schedule_id, limit=10)
    assert len(preview["next"]) == 10
    for moment in preview["next"]:
        await calendar.fire(datetime.fromisoformat(moment))
    fired = [each.fire_at.isoformat().replace("+00:00", "Z") for each in await calendar.ticks()]
    assert fired == preview["next"]
    _, draft = await calendar.do("preview", None, body={"cron": "0 4 * * *"}, limit=3)
    assert len(draft["next"]) == 3
    assert draft["words"].startswith("At 04:00")
    assert (await calendar.do("preview", None, body={"cron": "nonsense"}))[0] == 422


async def test_listings_come_in_pages(calendar: Calendar) -> None:
    ids = [await calendar.create(name=f"n{number}") for number in (3, 1, 2, 5, 4)]
    ids = [ids[place] for place in (1, 2, 0, 4, 3)]
    found, cursor = [], None
    while True:
        _, page = await calendar.do("list", None, limit=2, cursor=cursor)
        found += [UUID(each["schedule_id"]) for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == ids
    assert (await calendar.do("fires", ids[0], cursor="x"))[0] == 400
    for _ in range(3):
        await calendar.do("run", ids[0])
    _, newest = await calendar.do("fires", ids[0], limit=2)
    _, rest = await calendar.do("fires", ids[0], limit=2, cursor=newest["next_cursor"])
    moments = [each["fire_at"] for each in newest["items"] + rest["items"]]
    assert moments == sorted(moments, reverse=True)
    assert (len(moments), rest["next_cursor"]) == (3, None)


async def test_a_workspace_has_a_bounded_number_of_schedules(calendar: Calendar) -> None:
    await calendar.pool.execute(
        """INSERT INTO schedules (schedule_id, workspace_id, name, every_s, timezone, anchor_at, prompt, context,
                                  overlap, priority, jitter_s)
           SELECT gen_random_uuid(), 'w', n::text, 5, 'UTC', now(), 'p', 'fresh', 'skip', 'TASK', 0
           FROM generate_series(1, 1000) AS n"""
    )
    assert (await calendar.do("create", uuid7(), body=whole()))[1]["code"] == "too_many_schedules"


async def hear(calendar: Calendar, fact: WorkspaceRegistered | WorkspaceRemoved) -> None:
    async def work(connection: Connection) -> None:
        if isinstance(fact, WorkspaceRemoved):
            await calendar.handlers.removed(connection, [fact])
        else:
            await calendar.handlers.registered(connection, [fact])

    await transact(calendar.pool, work)


async def test_a_removed_workspace_has_no_schedules_any_more(calendar: Calendar) -> None:
    """A-S-11 C-E5: what waits of them is withdrawn by what the queue is told."""
    schedule_id, other = await calendar.create(), (await calendar.do("create", uuid7(), body=whole(), workspace_id="x"))
    await hear(calendar, WorkspaceRegistered(workspace_id="w", rev=3, incarnation=1, url="http://a"))
    await hear(calendar, WorkspaceRemoved(workspace_id="w", rev=2))
    assert (await calendar.do("show", schedule_id))[0] == 200, "that was another life of it"
    await hear(calendar, WorkspaceRemoved(workspace_id="w", rev=4))
    assert (await calendar.do("show", schedule_id))[0] == 404
    assert (await calendar.do("show", UUID(other[1]["schedule_id"]), workspace_id="x"))[0] == 200
    assert [(each.schedule_id, each.rev, each.deleted) for each in await calendar.changes()][-1] == (
        schedule_id,
        2,
        True,
    )
    assert (await calendar.do("create", uuid7(), body=whole()))[1]["code"] == "workspace_removed"
    await hear(calendar, WorkspaceRegistered(workspace_id="w", rev=5, incarnation=2, url="http://a"))
    assert (await calendar.do("create", uuid7(), body=whole()))[0] == 201


async def test_a_removal_and_a_create_at_once_leave_no_schedule_behind(calendar: Calendar) -> None:
    """C-E5."""
    for turn in range(10):
        name = f"r{turn}"
        answers = await asyncio.gather(
            calendar.do("create", uuid7(), body=whole(), workspace_id=name),
            hear(calendar, WorkspaceRemoved(workspace_id=name, rev=1)),
        )
        assert answers[0][0] in {201, 409}
    assert await calendar.pool.fetchval("SELECT count(*) FROM schedules WHERE deleted_at IS NULL") == 0


# ── what became of a fire ────────────────────────────────────────────────────────────────────────────────────────────


async def fired(calendar: Calendar, count: int, **body: Any) -> UUID:
    """A schedule of each minute that has fired so often from T0 on."""
    schedule_id = await calendar.create(cron="* * * * *", **body)
    await calendar.due_at(schedule_id, T0)
    for number in range(count):
        await calendar.fire(T0 + number * MIN)
    return schedule_id


async def test_each_fire_ends_once_and_the_outcomes_are_the_fires(calendar: Calendar) -> None:
    """C-V1 A-S-15: said twice, said otherwise later, said of a fire that nobody knows: it stays as it was."""
    schedule_id = await fired(calendar, 7)
    ticks = await calendar.ticks()
    outcomes = ["delivered", "coalesced", "skipped", "missed", "failed", "ceiling", "canceled"]
    words = [settled(tick, outcome, reason="r") for tick, outcome in zip(ticks, outcomes, strict=True)]
    unknown = settled(ticks[0], "delivered", schedule_id=uuid7())
    await calendar.settle(*words, *words, unknown)
    await calendar.settle(settled(ticks[0], "failed"), unknown)
    row = await calendar.row(schedule_id)
    assert [row[outcome] for outcome in outcomes] == [1] * 7
    assert row["fires_total"] == 7
    assert [fire["outcome"] for fire in await calendar.fires(schedule_id)] == outcomes


async def test_what_is_shown_of_runs_and_of_what_comes_next_is_what_happened(calendar: Calendar) -> None:
    """A-S-06: at each step, also after edits: no count and no moment is left over from before."""
    schedule_id = await fired(calendar, 5)
    outcomes = ("delivered", "skipped", "ceiling", "coalesced", "failed")
    began = [T0 + number * MIN + timedelta(seconds=2) for number in range(5)]
    runs = 0
    shown: dict[str, Any] = {}
    for tick, outcome, moment in zip(await calendar.ticks(), outcomes, began, strict=True):
        ran = outcome in {"delivered", "ceiling", "failed"}
        runs += ran
        await calendar.settle(settled(tick, outcome, began_at=moment if ran else None))
        _, shown = await calendar.do("show", schedule_id)
        assert shown["run_count"] == runs
        assert shown["next_fire_at"] == "2026-03-01T12:05:00Z"
    assert shown["last_ran_at"] == "2026-03-01T12:04:02Z"
    assert (shown["fires"], shown["counts"]) == (5, {**dict.fromkeys(outcomes, 1), "missed": 0, "canceled": 0})
    _, same = await calendar.do("patch", schedule_id, body={"prompt": "q"})
    assert same["next_fire_at"] == "2026-03-01T12:05:00Z"
    _, moved = await calendar.do("patch", schedule_id, body={"cron": "0 4 * * *"})
    assert moved["next_fire_at"] > datetime.now(UTC).isoformat()
    assert moved["next_fire_at"].endswith("T04:00:00Z")
    assert (moved["run_count"], moved["last_ran_at"]) == (runs, shown["last_ran_at"])


async def test_bounces_are_those_since_the_last_run_in_whatever_order_they_are_told(calendar: Calendar) -> None:
    """B-33 C-V2: twelve fires during a session, the one that waits runs, and nobody relies on the order of words."""
    words: list[TickSettled] = []
    schedule_id = await fired(calendar, 14)
    ticks = await calendar.ticks()
    words.append(settled(ticks[0], "delivered", began_at=T0 + timedelta(seconds=1)))
    words += [settled(tick, "coalesced", merged_into=ticks[1].fire_at) for tick in ticks[2:13]]
    await calendar.settle(*words)
    assert (await calendar.row(schedule_id))["bounces"] == 12, "the one that waits for all has bounced too"
    runs = settled(ticks[1], "delivered", began_at=T0 + 12 * MIN + timedelta(seconds=5))
    later = settled(ticks[13], "skipped")
    await calendar.settle(runs, later)
    row = await calendar.row(schedule_id)
    assert (row["bounces"], row["run_count"], row["last_ran_at"]) == (1, 2, T0 + 12 * MIN + timedelta(seconds=5))
    seen = {(row["bounces"], row["run_count"], row["last_ran_at"], row["coalesced"])}
    for seed in range(6):
        await calendar.pool.execute(
            "UPDATE fires SET outcome = NULL, settled_at = NULL, began_at = NULL, bounced = false"
        )
        await calendar.pool.execute(
            "UPDATE schedules SET bounces = 0, run_count = 0, last_ran_at = NULL, delivered = 0, coalesced = 0, "
            "skipped = 0"
        )
        shuffled = [*words, runs, later]
        Random(seed).shuffle(shuffled)
        for at in range(0, len(shuffled), 3):
            await calendar.settle(*shuffled[at : at + 3])
        row = await calendar.row(schedule_id)
        seen.add((row["bounces"], row["run_count"], row["last_ran_at"], row["coalesced"]))
    assert len(seen) == 1


async def test_a_run_that_bounced_is_given_back_and_revives_its_schedule(calendar: Calendar) -> None:
    """C-E10: `remaining_runs` counts runs, exactly."""
    schedule_id = await fired(calendar, 3, remaining_runs=2)
    first, second = await calendar.ticks()
    assert ((await calendar.row(schedule_id))["remaining_runs"], (await calendar.row(schedule_id))["next_fire_at"]) == (
        0,
        None,
    )
    await calendar.settle(settled(second, "coalesced", merged_into=first.fire_at))
    row = await calendar.row(schedule_id)
    assert row["remaining_runs"] == 1
    assert row["next_fire_at"] > datetime.now(UTC), "what has passed never fires"
    assert calendar.woken
    await calendar.settle(settled(first, "delivered", began_at=T0))
    await calendar.fire(row["next_fire_at"])
    await calendar.settle(settled((await calendar.ticks())[-1], "delivered"))
    row = await calendar.row(schedule_id)
    assert (row["run_count"], row["remaining_runs"], row["next_fire_at"]) == (2, 0, None)


def test_the_body_of_the_tests_is_a_schedule() -> None:
    assert json.loads(query("create", None, body=whole(name="n")).body)["name"] == "n"
