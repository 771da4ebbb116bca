"""Sessions that are asked for something: by what waits for them, and by people."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from uuid_utils.compat import uuid7

from services.scheduler.decide import ASKS_MAX
from shared.facts import NamedBacklog, ScheduleTick, SessionDirective
from tests.conftest import Stack
from tests.integration.ender_kit import Supervisors, asks_of, at, backlog, of, runs, supervised, words
from tests.integration.scheduler_kit import many, settled

SCHEDULE = uuid4()
LONG = {"session_ceiling_s": 10_000.0, "session_min_s": 600.0}


@pytest.fixture
async def patient(stack: Stack) -> AsyncIterator[Supervisors]:
    """Their sessions last long; a tick may ask after ten minutes, CRITICAL after one."""
    async with supervised(stack, **LONG) as opened:
        yield opened


async def fired(supervisors: Supervisors, moment: datetime, **body: object) -> ScheduleTick:
    """A schedule, and its fire of this moment; the clock then says so."""
    schedule_id = await supervisors.calendar.create(**body)
    await supervisors.calendar.due_at(schedule_id, moment)
    await supervisors.until((moment - at(0)).total_seconds())
    await supervisors.calendar.fire()
    (tick,) = [each for each in await supervisors.calendar.ticks() if each.schedule_id == schedule_id]
    return tick


def by_tick(*also: object, **about: object) -> NamedBacklog:
    """A session that a tick began, 1000 s before the fires of these tests; who else runs there."""
    return backlog(runs("q:1", -1000, schedule_id=SCHEDULE), *also, **about)  # type: ignore[arg-type]


async def test_a_tick_that_waits_asks_once_and_nothing_follows(patient: Supervisors) -> None:
    """A-S-16: a tick of every minute asks when it has waited for a minute."""
    tick = await fired(patient, at(0), every_s=60)
    await patient.until(59)
    assert await patient.see(by_tick()) == []
    await patient.until(60)
    (asked,) = of(await patient.see(by_tick()), SessionDirective)
    assert (asked.kind, asked.reason, asked.session_id) == ("checkpoint", "tick_waiting", "q:1")
    assert asked.deadline == at(80)
    await patient.until(70)
    (again,) = of(await patient.see(by_tick(), by=1), SessionDirective)
    assert (again.directive_id, again.deadline) == (asked.directive_id, asked.deadline)
    for moment in (80, 85, 300):
        await patient.until(moment)
        assert await patient.see(by_tick(), by=1) == [], "it is past, and not asked again"
    row = await patient.row()
    assert (row["state"], asks_of(row)) == ("running", ["tick_waiting"])
    await patient.calendar.settle(settled(tick, "delivered", began_at=at(301)))


async def test_each_tick_that_waits_asks_for_itself(patient: Supervisors) -> None:
    await fired(patient, at(0), every_s=60)
    await fired(patient, at(60), every_s=60)
    asked = []
    for moment in (60, 120):
        await patient.until(moment)
        asked.append(len({each.directive_id for each in of(await patient.see(by_tick()), SessionDirective)}))
    assert asked == [1, 2], "of the first schedule another fire waits by then"
    assert len(asks_of(await patient.row())) == 3


@pytest.mark.parametrize("state", ["running", "checkpoint_sent"])
async def test_a_tick_that_is_being_delivered_waits_for_nobody(patient: Supervisors, state: str) -> None:
    """Also when it is just being asked to end at a ceiling of its own."""
    tick = await fired(patient, at(0), every_s=60)
    began_s, ceiling_s = (50.0, None) if state == "running" else (-100.0, 150.0)
    delivered = runs(f"{tick.queue_id}:1", began_s, schedule_id=tick.schedule_id, ceiling_s=ceiling_s)
    for moment in (55, 60, 65):
        await patient.until(moment)
        said = await patient.see(by_tick(delivered))
        assert "checkpoint tick_waiting" not in words(said)
    assert (await patient.row(delivered.session_id))["state"] == state
    assert asks_of(await patient.row()) == []


async def test_one_workspace_s_ticks_hide_no_other_s(patient: Supervisors) -> None:
    """However many fires are on their way in the fleet, and however much older they are."""
    tick = await fired(patient, at(0), every_s=60)
    await many(patient.pool, 1, at(86_400))
    await patient.pool.execute(
        """INSERT INTO fires (schedule_id, fire_at, last_fire_at, queue_id, rev)
           SELECT schedule_id, moment, moment, gen_random_uuid(), 1
           FROM schedules, generate_series($1::timestamptz, $1 + interval '1000 s', interval '1 s') AS moment
           WHERE workspace_id = 'w1'""",
        at(-1001),
    )
    loud = backlog(runs("loud:1", -1000, schedule_id=SCHEDULE), name="w1")
    await patient.until(60)
    asked = of(await patient.see(loud, by_tick()), SessionDirective)
    (mine,) = [each for each in asked if each.workspace_id == tick.workspace_id]
    assert (mine.session_id, mine.reason) == ("q:1", "tick_waiting")
    assert len(asks_of(await patient.row("loud:1"))) == ASKS_MAX


async def test_a_fire_that_is_settled_or_withdrawn_waits_no_longer(patient: Supervisors) -> None:
    tick = await fired(patient, at(0), every_s=60)
    await patient.calendar.settle(settled(tick, "canceled"))
    other = await fired(patient, at(1), every_s=60)
    await patient.calendar.do("delete", other.schedule_id)
    await patient.until(100)
    assert await patient.see(by_tick()) == []


async def test_a_workspace_says_whom_its_ticks_may_ask(patient: Supervisors) -> None:
    await fired(patient, at(0), every_s=60)
    await patient.until(100)
    message = runs("m:1", -1000)
    asked = []
    for whom in ("none", "ticks", "all"):
        await patient.allow(tick_preempts=whom)
        await patient.until(patient.now_s + 1)
        asked.append(sorted(each.session_id for each in of(await patient.see(by_tick(message)), SessionDirective)))
    assert asked == [[], ["q:1"], ["m:1"]]


async def test_critical_asks_whatever_runs_once_for_each_item(patient: Supervisors) -> None:
    def waits(since: float) -> NamedBacklog:
        return backlog(runs("q:1", 0), critical_waiting_since=at(since))

    said = []
    for moment, since in ((59, 50), (60, 50), (65, 50), (71, 50), (75, 70), (76, 70)):
        await patient.until(moment)
        said.append(words(await patient.see(waits(since))))
    one = ["checkpoint critical_waiting"]
    assert said == [[], one, [], one, one, []], "at 71 it is the same again, at 75 another"
    assert len(asks_of(await patient.row())) == 2


async def test_two_replicas_ask_once_for_one_thing(patient: Supervisors) -> None:
    """C-K5."""
    await fired(patient, at(0), every_s=60)
    await patient.until(100)
    fact = patient.made(by_tick(critical_waiting_since=at(90)))
    for replica in patient.replicas:
        await replica.sessions.snapshots([fact])
    assert sorted(words(await patient.turn_all())) == ["checkpoint critical_waiting", "checkpoint tick_waiting"]


# ── people ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operators_stop_is_done_once_and_written_down(patient: Supervisors) -> None:
    await patient.until(5)
    await patient.see(backlog(runs("q:1"), runs("q:2")))
    query_id = uuid7()
    status, said = await patient.ask("stop", query_id)
    assert status == 200
    assert {each["state"] for each in said["sessions"]} == {"stop_sent"}
    assert sorted(words(patient.said())) == sorted(["cancel operator", "gate"] * 2)
    row = await patient.row()
    assert (row["stop_reason"], row["deadline_at"]) == ("operator", at(15))
    await patient.until(6)
    assert (await patient.ask("stop", query_id))[0] == 200
    assert (await patient.ask("stop"))[0] == 200
    assert patient.said() == []
    assert (await patient.row())["deadline_at"] == at(15)
    audit = await patient.pool.fetch("SELECT query_id, caller_id, action, workspace_id FROM audit")
    assert [tuple(each) for each in audit] == [(query_id, "anna", "session_stop", "w")]
    await patient.until(16)
    await patient.turn()
    await patient.shut(in_flight=(runs("q:1"), runs("q:2")))
    assert len(await patient.kills()) == 1, "below its ceiling, but so somebody said"


async def test_an_operators_stop_holds_for_what_its_ceiling_has_stopped(patient: Supervisors) -> None:
    """C-K9: its ceiling was raised after its stop, so nothing but this ends it."""
    await patient.allow(session_ceiling_s=100.0)
    await patient.brought_to("stop_sent")
    await patient.allow(session_ceiling_s=1000.0)
    await patient.until(131)
    await patient.turn()
    await patient.shut()
    assert await patient.kills() == []
    assert (await patient.ask("stop"))[0] == 200
    assert words(patient.said()) == ["cancel operator", "stop operator"]
    row = await patient.row()
    assert (row["stop_reason"], row["deadline_at"]) == ("operator", at(130))
    await patient.shut(moment=at(131.5))
    assert len(await patient.kills()) == 1


async def test_an_operators_checkpoint_is_asked_once_for_each_question(patient: Supervisors) -> None:
    await patient.until(5)
    await patient.see(backlog(runs("q:1")))
    first, second = uuid7(), uuid7()
    for query_id in (first, first, second):
        status, said = await patient.ask("checkpoint", query_id)
        assert status == 200
        assert said["sessions"][0]["state"] == "running"
    directives = of(patient.said(), SessionDirective)
    assert [each.reason for each in directives] == ["operator", "operator"]
    assert len({each.directive_id for each in directives}) == 2
    assert {each.deadline for each in directives} == {at(25)}
    assert await patient.pool.fetchval("SELECT count(*) FROM audit WHERE action = 'session_checkpoint'") == 2


@pytest.mark.parametrize("verb", ["stop", "checkpoint"])
async def test_where_nothing_is_known_to_run_that_is_said(patient: Supervisors, verb: str) -> None:
    await patient.until(5)
    await patient.see(backlog(runs("q:1"), name="v"))
    status, said = await patient.ask(verb)
    assert (status, said["code"]) == (409, "no_session")
    assert patient.said() == []
    assert await patient.pool.fetchval("SELECT count(*) FROM audit") == 0


async def test_what_runs_is_shown_with_what_waits_for_it(patient: Supervisors) -> None:
    """C-V2: running N h in one session, schedule X bounced K times, next step at T."""
    tick = await fired(patient, at(0), every_s=60, name="hourly")
    for number in range(12):
        later = at(60 * (number + 1))
        await patient.until(60 * (number + 1))
        await patient.calendar.fire()
        newest = (await patient.calendar.ticks())[-1]
        assert newest.fire_at == later
        await patient.calendar.settle(settled(newest, "coalesced", merged_into=tick.fire_at))
    await patient.until(7300)
    await patient.see(by_tick(runs("m:1", 100), incarnation=1))
    status, said = await patient.ask("sessions")
    assert status == 200
    bounces = (await patient.calendar.row(tick.schedule_id))["bounces"]
    assert bounces >= 12
    (schedule,) = said["schedules"]
    assert (schedule["name"], schedule["bounces"]) == ("hourly", bounces)
    assert [each["session_id"] for each in said["sessions"]] == ["q:1", "m:1"]
    session = said["session"]
    assert session == said["sessions"][0]
    summary = session.pop("summary")
    assert session == {
        "session_id": "q:1", "kind": "delivery", "started_at": "2026-03-01T11:43:20Z", "running_s": 8300.0,
        "ceiling_s": 10_000.0, "state": "running", "stop_reason": None, "next_step": "checkpoint",
        "next_step_at": "2026-03-01T14:30:00Z", "schedule_id": str(SCHEDULE),
    }  # fmt: skip
    assert summary == (
        "running for 2 h 18 m in one session (ceiling 2 h 47 m); checkpoint in 28 m; "
        f"schedule hourly has bounced {bounces} times"
    )


@pytest.mark.parametrize(
    ("state", "words_of_it"),
    [
        ("checkpoint_sent", "it was asked to save and end its turn; stop in 20 s"),
        ("stop_sent", "it was told to stop, and nothing else begins meanwhile; kill in 10 s"),
        ("kill_ordered", "its container is being ended; kill in 2 m"),
    ],
)
async def test_each_step_is_said_in_a_sentence(patient: Supervisors, state: str, words_of_it: str) -> None:
    await patient.allow(session_ceiling_s=100.0)
    await patient.brought_to(state)  # type: ignore[arg-type]
    _, said = await patient.ask("sessions")
    assert said["session"]["summary"].partition("; ")[2] == words_of_it


async def test_what_nobody_can_end_is_said_in_a_sentence(patient: Supervisors) -> None:
    await patient.allow(session_ceiling_s=100.0)
    await patient.brought_to("kill_ordered")
    await patient.killed("not_killable")
    _, said = await patient.ask("sessions")
    shown = said["session"]
    assert (shown["next_step"], shown["next_step_at"]) == (None, None)
    assert shown["summary"].endswith("it is over its ceiling, and nobody can end its container")


async def test_all_that_runs_is_shown_at_once(patient: Supervisors) -> None:
    await patient.until(5)
    both = (runs("r:2", 4), runs("r:1", 3))
    await patient.see(backlog(runs("q:1")), backlog(*both, name="v"), backlog(name="idle", waiting=3))
    status, said = await patient.ask("sessions", name="-")
    assert (status, sorted(said["workspaces"])) == (200, ["v", "w"])
    assert [each["session_id"] for each in said["workspaces"]["v"]["sessions"]] == ["r:1", "r:2"], "the oldest first"
    assert said["workspaces"]["v"]["session"]["session_id"] == "r:1"
    status, said = await patient.ask("sessions", name="-", workspaces=["idle", "v"])
    assert (status, sorted(said["workspaces"])) == (200, ["idle", "v"]), "only what is named"
    assert [each["session_id"] for each in said["workspaces"]["v"]["sessions"]] == ["r:1", "r:2"]
    status, said = await patient.ask("sessions", name="idle")
    assert (status, json.dumps(said)) == (200, '{"session": null, "sessions": [], "schedules": []}')


async def test_one_workspace_s_schedules_hide_no_other_s(patient: Supervisors) -> None:
    """C-V2: what bounces is shown also where nothing runs, and no page is filled by one workspace."""
    await many(patient.pool, 10_100, at(0))  # 101 in each of w0 … w99
    await patient.pool.execute("UPDATE schedules SET bounces = 7 WHERE name = (SELECT max(name) FROM schedules)")
    names = [f"w{number}" for number in range(100)]
    status, said = await patient.ask("sessions", name="-", workspaces=names)
    assert (status, sorted(said["workspaces"])) == (200, sorted(names))
    found = [each["schedules"] for each in said["workspaces"].values()]
    assert {len(each) for each in found} == {100}
    assert [each[0]["bounces"] for each in found if each[0]["bounces"]] == [7], "the worst first"


@pytest.mark.parametrize("body", [{}, {"workspaces": "w"}, {"workspaces": None}, {"workspaces": []}])
async def test_whoever_names_no_workspace_sees_those_where_something_runs(
    patient: Supervisors, body: dict[str, Any]
) -> None:
    """A proxy of the version before names none."""
    await patient.until(5)
    await patient.see(backlog(runs("q:1")))
    status, said = await patient.ask("sessions", name="-", **body)
    assert (status, list(said["workspaces"])) == (200, [] if body.get("workspaces") == [] else ["w"])


async def test_what_a_kill_waits_for_is_said_and_counted(patient: Supervisors) -> None:
    """A gate may be held for as long as that: whoever looks learns why, and what ends it."""
    await patient.allow(session_ceiling_s=100.0)
    await patient.brought_to("stop_sent")
    await patient.until(131)
    await patient.see(backlog(runs("q:1"), runs("q:2", 120)))
    _, said = await patient.ask("sessions")
    assert said["session"]["summary"].endswith(
        "nothing else begins meanwhile; the kill waits for q:2 below its ceiling"
    )
    await patient.replicas[0].sessions.measure()
    assert REGISTRY.get_sample_value("bide_scheduler_kills_waiting") == 1
    await patient.allow(session_ceiling_s=10_000.0)
    _, said = await patient.ask("sessions")
    raised = "its ceiling was raised after it was stopped: an operator's stop ends it"
    assert said["session"]["summary"].endswith(raised)
    await patient.ask("stop")
    _, said = await patient.ask("sessions")
    assert said["session"]["summary"].endswith("the kill waits for the gate's word of what else is in flight")
