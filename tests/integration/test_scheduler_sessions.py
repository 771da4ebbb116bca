"""Sessions as rows: seen, stepped, stopped, killed and forgotten, by two replicas in the test's time."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from shared.facts import SessionDirective, SessionGate, SessionStop
from tests.integration.ender_kit import Replica, Supervisors, at, backlog, of, runs, supervisors, words

__all__ = ["supervisors"]

STOPPED = ["cancel ceiling", "gate"]
SAID_AGAIN = ["cancel ceiling", "stop ceiling", "gate"]


# ── what is seen ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_is_noted_with_its_true_start_and_leaves_no_trace(supervisors: Supervisors) -> None:
    schedule_id = uuid4()
    await supervisors.until(5)
    said = await supervisors.see(backlog(runs("q:1", 0, schedule_id=schedule_id, ceiling_s=60), runs("q:2", 4.5)))
    assert said == []
    assert await supervisors.ids() == ["q:1"], "the other is too young to be noted"
    row = await supervisors.row()
    assert (row["started_at"], row["ceiling_s"], row["schedule_id"]) == (at(0), 60.0, schedule_id)
    assert (row["kind"], row["state"], row["due_at"]) == ("delivery", "running", at(45))
    await supervisors.until(10)
    assert await supervisors.see() == []
    assert await supervisors.ids() == []


async def test_one_that_was_asked_for_something_stays_as_ended(supervisors: Supervisors) -> None:
    await supervisors.until(2)
    await supervisors.see(backlog(runs("q:1")))
    await supervisors.until(75)
    assert words(await supervisors.turn()) == ["checkpoint ceiling_near"]
    await supervisors.until(80)
    assert await supervisors.see() == [], "no gate was asked for"
    row = await supervisors.row()
    assert (row["ended_at"], row["end_reason"], row["due_at"]) == (at(80), "gone", None)
    await supervisors.until(200)
    assert await supervisors.turn() == []


async def test_two_replicas_take_in_one_snapshot_once(supervisors: Supervisors) -> None:
    """Foreign work counts its beats: a snapshot that was taken in twice would count them twice."""
    await supervisors.until(2)
    for beat_s, begun in ((1, 0), (6, 1)):
        fact = supervisors.made(backlog(runs("q:1"), foreign=1, beat_at=at(beat_s)))
        for replica in supervisors.replicas:
            await replica.sessions.snapshots([fact])
        await supervisors.turn_all()
        beats = await supervisors.pool.fetchval("SELECT beats FROM activities")
        assert beats == begun + 1
        assert len(await supervisors.ids()) == 1 + begun
        await supervisors.until(7)
    assert await supervisors.ids() == ["foreign:w:1:1", "q:1"]
    for moment, left in ((12, 2), (17, 1)):
        await supervisors.until(moment)
        fact = supervisors.made(backlog(runs("q:1")))
        for replica in supervisors.replicas:
            await replica.sessions.snapshots([fact])
        await supervisors.turn_all()
        assert len(await supervisors.ids()) == left, "two snapshots end it"


async def test_an_older_snapshot_than_the_last_says_nothing(supervisors: Supervisors) -> None:
    await supervisors.until(10)
    await supervisors.see(backlog(runs("q:1")))
    await supervisors.see(read_at=at(9))
    await supervisors.see(read_at=at(10))
    assert await supervisors.ids() == ["q:1"]


async def test_a_snapshot_from_a_clock_that_is_ahead_is_taken_in_once_and_deafens_nobody(
    supervisors: Supervisors,
) -> None:
    await supervisors.until(10)
    ahead = supervisors.made(backlog(runs("q:1"), foreign=1, beat_at=at(9)), read_at=at(3610))
    for replica in supervisors.replicas:
        await replica.sessions.snapshots([ahead])
    await supervisors.turn_all()
    row = await supervisors.row()
    assert row["noted_at"] == at(10)
    assert row["due_at"] == at(75), "it is looked at as if the clock were right"
    await supervisors.until(15)
    await supervisors.see()
    assert await supervisors.ids() == []


async def test_a_snapshot_in_parts_is_taken_in_whole(supervisors: Supervisors) -> None:
    await supervisors.until(5)
    first = supervisors.made(backlog(runs("q:1"))).model_copy(update={"parts": 2})
    second = supervisors.made(backlog(runs("r:1"), name="v")).model_copy(
        update={"parts": 2, "part": 1, "snapshot_id": first.snapshot_id}
    )
    replica = supervisors.replicas[0].sessions
    await replica.snapshots([second])
    await supervisors.turn()
    assert await supervisors.ids() == []
    await replica.snapshots([first])
    await supervisors.turn()
    assert await supervisors.ids() == ["q:1", "r:1"]


async def test_a_session_that_was_gone_and_is_there_again_goes_on_in_its_state(supervisors: Supervisors) -> None:
    await supervisors.brought_to("stop_sent")
    await supervisors.until(122)
    assert words(await supervisors.see()) == ["gate opens"]
    row = await supervisors.row()
    assert (row["end_reason"], row["state"]) == ("gone", "stop_sent")
    await supervisors.until(127)
    said = await supervisors.see(backlog(runs("q:1")))
    again = await supervisors.row()
    assert (again["ended_at"], again["state"], again["deadline_at"]) == (None, "stop_sent", row["deadline_at"])
    assert words(said) == SAID_AGAIN
    assert of(said, SessionGate)[0].rev > row["rev"]


async def test_no_word_of_the_gate_from_before_it_was_gone_licenses_a_kill(supervisors: Supervisors) -> None:
    """Its gate was open meanwhile: what began then is in no list of before."""
    await supervisors.brought_to("stop_sent")
    await supervisors.until(131)
    before = supervisors.shutting("q:1")
    assert words(await supervisors.see()) == ["gate opens"]
    await supervisors.until(136)
    await supervisors.see(backlog(runs("q:1")))
    await supervisors.hear_shut(before)
    await supervisors.until(137)
    await supervisors.turn()
    assert await supervisors.kills() == []
    await supervisors.shut()
    assert len(await supervisors.kills()) == 1


async def test_what_has_outlived_its_agent_is_ended_and_not_begun_again_in_its_new_life(
    supervisors: Supervisors,
) -> None:
    """Its owner may show it for a while yet: it is no session of the new life, and nothing there is ended for it."""
    await supervisors.until(2)
    await supervisors.see(backlog(runs("q:1")))
    await supervisors.allow(incarnation=2)
    for moment in (5, 10, 300):
        await supervisors.until(moment)
        assert await supervisors.see(backlog(runs("q:1"), incarnation=2)) == []
        row = await supervisors.row()
        assert (row["incarnation"], row["end_reason"], row["ended_at"]) == (1, "new_life", at(5))


async def test_a_new_life_opens_the_gate_even_while_an_order_is_on_its_way(supervisors: Supervisors) -> None:
    """The order is about the old one."""
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(132)
    assert words(await supervisors.see(backlog(incarnation=2))) == ["gate opens"]


# ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_steps_by_two_replicas_at_once_are_said_once(supervisors: Supervisors) -> None:
    """C-K5: whoever holds the row takes the step; the other finds it taken."""
    await supervisors.until(2)
    everyone = [runs(f"q{number}:1") for number in range(50)]
    await supervisors.see(*(backlog(each, name=f"w{number}") for number, each in enumerate(everyone)))
    for moment, once in ((100, ["checkpoint ceiling"]), (120, STOPPED)):
        await supervisors.until(moment)
        said = await supervisors.turn_all()
        assert sorted(words(said)) == sorted(once * 50)
        assert await supervisors.turn_all() == []


async def test_the_gates_word_puts_the_kill_into_the_outbox(supervisors: Supervisors) -> None:
    await supervisors.brought_to("stop_sent")
    await supervisors.until(131)
    assert words(await supervisors.turn()) == SAID_AGAIN
    assert await supervisors.kills() == []
    until = at(200)
    said = await supervisors.shut(until=until)
    (kill,) = await supervisors.kills()
    assert (kill.session_id, kill.incarnation, kill.occurred_at, kill.expires_at) == ("q:1", 1, at(131), until)
    assert words(said) == [], "the order leaves through the outbox, not from here"
    assert supervisors.replicas[0].relayed == 1
    row = await supervisors.row()
    assert (row["state"], row["deadline_at"], row["orders"]) == ("kill_ordered", until, 1)


async def test_who_dies_of_a_kill_before_its_stop_is_stopped_too(supervisors: Supervisors) -> None:
    await supervisors.until(2)
    both = [runs("q:1"), runs("q:2", 1)]
    for moment in (2, 100, 120):
        await supervisors.until(moment)
        await supervisors.see(backlog(*both))
    await supervisors.pool.execute(
        "UPDATE sessions SET state = 'checkpoint_sent', stop_reason = NULL, deadline_at = $1 WHERE session_id = 'q:2'",
        at(141),
    )
    await supervisors.until(131)
    stops = of(await supervisors.shut(in_flight=both), SessionStop)
    assert [(each.session_id, each.reason) for each in stops][-1] == ("q:2", "ceiling")
    assert len(await supervisors.kills()) == 1


async def test_words_of_the_gate_in_any_order_leave_the_newest(supervisors: Supervisors) -> None:
    """C-K4: repeated, late, reordered."""
    await supervisors.brought_to("stop_sent")
    await supervisors.until(131)
    newest = supervisors.shutting("q:1", generation=2, in_flight=(runs("q:1"), runs("q:2", 130)))
    older = supervisors.shutting("q:1", generation=1, moment=at(130.5))
    for facts in ([newest, older], [older, newest], [older], [newest]):
        await supervisors.hear_shut(*facts)
        await supervisors.turn()
    assert await supervisors.kills() == [], "by its newest word there is one that is below its ceiling"


@pytest.mark.parametrize("result", ["applied", "stale", "already_ended"])
async def test_what_a_kill_has_ended_is_ended_for_good(supervisors: Supervisors, result: str) -> None:
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(133)
    said = await supervisors.killed(result)
    assert words(said) == ["gate opens"]
    row = await supervisors.row()
    assert (row["end_reason"], row["ended_at"], row["state"]) == (f"kill_{result}", at(133), "kill_ordered")
    assert await supervisors.killed(result) == []
    await supervisors.until(140)
    assert await supervisors.see(backlog(runs("q:1"))) == []
    assert (await supervisors.row())["end_reason"] == f"kill_{result}"


async def test_what_nobody_can_end_stays_visible_with_its_gate_closed(supervisors: Supervisors) -> None:
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(133)
    await supervisors.killed("not_killable")
    assert (await supervisors.row())["unenforceable"]
    for moment in (145, 155, 400):
        await supervisors.until(moment)
        assert words(await supervisors.see(backlog(runs("q:1")))) == SAID_AGAIN
    assert len(await supervisors.kills()) == 1
    await supervisors.until(405)
    said = await supervisors.see(backlog(foreign=1, beat_at=at(404)))
    assert words(said) == ["gate"], "its owner hung up, and it goes on"
    await supervisors.until(410)
    assert words(await supervisors.see(backlog(foreign=1, beat_at=at(409)))) == SAID_AGAIN
    assert await supervisors.ids() == ["q:1"], "what it does is its own, and no foreign session"
    await supervisors.until(415)
    assert words(await supervisors.see(backlog(beat_at=at(414)))) == ["gate opens"]


@pytest.mark.parametrize("late_s", [250.999, 251, 300], ids=["in time", "as the order runs out", "late"])
async def test_a_refusal_stops_no_turn_of_others(supervisors: Supervisors, late_s: float) -> None:
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(late_s)
    await supervisors.see(backlog(runs("q:1")), backlog(runs("r:1", late_s - 100), name="v"))
    await supervisors.killed("not_killable")
    await supervisors.until(late_s + 20)
    assert "cancel ceiling" in words(await supervisors.see(backlog(runs("q:1")), backlog(runs("r:1"), name="v")))
    assert (await supervisors.row("r:1"))["state"] == "stop_sent"


async def test_of_two_answers_the_one_that_ended_it_counts(supervisors: Supervisors) -> None:
    await supervisors.brought_to("kill_ordered")
    await supervisors.killed_all(("q:1", "applied"), ("q:1", "not_killable"))
    row = await supervisors.row()
    assert (row["end_reason"], row["unenforceable"]) == ("kill_applied", False)


async def test_the_gate_stays_shut_while_an_order_for_a_session_that_is_gone_is_on_its_way(
    supervisors: Supervisors,
) -> None:
    """C-K2 C-K4: the container will be ended all the same; what began there meanwhile would die of it."""
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(133)
    assert await supervisors.see() == []
    assert (await supervisors.row())["end_reason"] == "gone"
    said = await supervisors.killed("applied")
    assert words(said) == ["gate opens"]
    assert await supervisors.killed("applied") == [], "said once"
    await supervisors.until(140)
    await supervisors.see(backlog(runs("q:1")))
    assert (await supervisors.row())["end_reason"] == "kill_applied", "it is not seen again"


async def test_an_order_that_has_run_out_keeps_no_gate_shut(supervisors: Supervisors) -> None:
    await supervisors.brought_to("kill_ordered")
    await supervisors.until(251)
    assert words(await supervisors.see()) == ["gate opens"]


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(days=-1)], ids=["a day ahead", "a day behind"])
async def test_an_applications_clock_that_steps_ends_nothing_early_or_late(
    supervisors: Supervisors, monkeypatch: pytest.MonkeyPatch, step: timedelta
) -> None:
    """C-K10: only the database's clock is read."""
    await supervisors.until(2)
    await supervisors.see(backlog(runs("q:1")))
    stepped(monkeypatch, step)
    states = []
    for moment in (99.999, 100, 119.999, 120, 129.999, 130.001):
        await supervisors.until(moment)
        await supervisors.see(backlog(runs("q:1")), by=round(moment) % 2)
        await supervisors.shut()
        states.append((await supervisors.row())["state"])
    early, late = ["running", "checkpoint_sent", "checkpoint_sent"], ["stop_sent", "stop_sent", "kill_ordered"]
    assert states == early + late


def stepped(monkeypatch: pytest.MonkeyPatch, step: timedelta) -> None:
    """The clock that the code of the scheduler would read is wrong by so much."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            assert tz is UTC
            return datetime.now(UTC) + step

    for name, module in list(sys.modules.items()):
        if name.startswith(("services.scheduler", "shared.")) and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", Wrong)


async def test_a_session_older_than_its_ceiling_at_first_sight_gets_each_grace_whole(
    supervisors: Supervisors,
) -> None:
    """C-K15: at the first start after an update, and after a long outage."""
    await supervisors.until(5000)
    assert words(await supervisors.see(backlog(runs("q:1")))) == ["checkpoint ceiling"]
    assert (await supervisors.row())["deadline_at"] == at(5020)
    await supervisors.until(9000)
    assert words(await supervisors.turn(1)) == STOPPED
    assert (await supervisors.row())["deadline_at"] == at(9010)


async def test_what_a_workspace_allows_reaches_what_runs(supervisors: Supervisors) -> None:
    """C-K9."""
    await supervisors.until(50)
    await supervisors.see(backlog(runs("q:1"), runs("q:2", 0, ceiling_s=1000)))
    await supervisors.allow(session_ceiling_s=40.0, checkpoint_grace_s=7.0)
    said = await supervisors.turn()
    assert [(each.session_id, each.reason, each.deadline) for each in of(said, SessionDirective)] == [
        ("q:1", "ceiling", at(57))
    ], "not one with a ceiling of its own"
    await supervisors.allow(session_ceiling_s=100.0)
    assert await supervisors.turn() == []
    row = await supervisors.row()
    assert (row["state"], row["deadline_at"], row["due_at"]) == ("running", None, at(75))
    await supervisors.allow(session_ceiling_s=0.0)
    await supervisors.turn()
    assert (await supervisors.row())["due_at"] is None
    await supervisors.until(1e5)
    assert "q:1" not in {each.session_id for each in of(await supervisors.turn(), SessionDirective)}


async def test_another_default_reaches_what_runs_when_a_replica_starts_with_it(supervisors: Supervisors) -> None:
    """A session without a ceiling has no next moment: nobody would look at it again."""
    await supervisors.allow(session_ceiling_s=0.0)
    await supervisors.until(2)
    await supervisors.see(backlog(runs("q:1")))
    await supervisors.pool.execute("UPDATE workspaces SET settings = '{}'")
    await supervisors.until(150)
    assert await supervisors.turn() == []
    assert (await supervisors.row())["due_at"] is None
    supervisors.replicas.append(Replica(supervisors.settings, supervisors.pool))
    assert words(await supervisors.turn(2)) == ["checkpoint ceiling"]


async def test_a_directive_said_again_is_the_same_under_another_ids_fact(supervisors: Supervisors) -> None:
    await supervisors.brought_to("checkpoint_sent")
    await supervisors.until(110)
    (again,) = of(await supervisors.turn(1), SessionDirective)
    await supervisors.until(119)
    assert await supervisors.turn() == []
    await supervisors.until(120)
    await supervisors.turn()
    await supervisors.until(120.5)
    stops = await supervisors.turn()
    await supervisors.until(130.5)
    repeated = await supervisors.turn(1)
    for kind in (SessionStop, SessionDirective):
        (first,), (second,) = of(stops, kind), of(repeated, kind)
        assert first.fact_id != second.fact_id
        if isinstance(first, SessionDirective):
            assert isinstance(second, SessionDirective)
            assert first.directive_id == second.directive_id != again.directive_id
        assert second.rev > first.rev


async def test_ended_sessions_are_forgotten_when_their_time_is_over(supervisors: Supervisors) -> None:
    await supervisors.brought_to("stop_sent")
    await supervisors.until(125)
    await supervisors.see(backlog(runs("r:1", 0, ceiling_s=0), name="v"))
    days = 86_400
    for passed, left in ((90 * days, ["q:1", "r:1"]), (90 * days + 1, ["r:1"])):
        await supervisors.until(125 + passed)
        await supervisors.calendar.ticking.forget()
        assert await supervisors.ids() == left, "what runs is never too old"


async def test_a_snapshot_that_could_not_be_written_is_taken_in_by_the_next_turn(supervisors: Supervisors) -> None:
    await supervisors.until(5)
    sessions = supervisors.replicas[0].sessions
    await supervisors.pool.execute("ALTER TABLE activities RENAME TO away")
    with pytest.raises(Exception, match="activities"):
        await supervisors.see(backlog(runs("q:1")))
    await supervisors.pool.execute("ALTER TABLE away RENAME TO activities")
    await sessions.run_once()
    assert await supervisors.ids() == ["q:1"]


@pytest.mark.parametrize(("column", "value"), [("rev", 2**63 - 1), ("ceiling_s", 1e300)], ids=["written", "decided"])
async def test_a_session_whose_step_cannot_be_taken_holds_up_no_other(
    supervisors: Supervisors, capfd: pytest.CaptureFixture[str], column: str, value: float
) -> None:
    """It is said, and tried again a minute later: by then somebody may have mended it."""
    await supervisors.until(2)
    await supervisors.see(backlog(runs("q:1"), runs("q:2")), backlog(runs("r:1"), name="v"))
    was = await supervisors.pool.fetchval(f"SELECT {column} FROM sessions WHERE session_id = 'q:2'")
    await supervisors.pool.execute(f"UPDATE sessions SET {column} = $1 WHERE session_id = 'q:2'", value)
    await supervisors.until(75)
    assert words(await supervisors.turn()) == ["checkpoint ceiling_near"] * 2
    assert (await supervisors.row("q:2"))["due_at"] == at(135)
    assert capfd.readouterr().out.count("session_step_failed") == 1
    await supervisors.pool.execute(f"UPDATE sessions SET {column} = $1 WHERE session_id = 'q:2'", was)
    await supervisors.until(135)
    await supervisors.turn()
    assert (await supervisors.row("q:2"))["state"] == "checkpoint_sent"


async def test_it_sleeps_until_the_next_moment_and_not_longer(supervisors: Supervisors) -> None:
    await supervisors.until(72)
    await supervisors.see(backlog(runs("q:1")))
    assert await supervisors.replicas[1].sessions.run_once() == pytest.approx(3.0)
    await supervisors.until(78)
    assert await supervisors.replicas[1].sessions.run_once() == 5.0, "as its settings say"
