"""The policies of ticks: what becomes of a fire (§4, row by row), and what a merged one stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from uuid import UUID

import pytest

from services.queue.decide import (
    Forwards,
    Keep,
    Merge,
    Overlap,
    Schedule,
    Settle,
    Tick,
    Waiting,
    Workspace,
    admit,
    has_room,
    merged,
    outcome,
    why,
    withdrawn,
)
from services.queue.fires import message
from services.queue.store import Prompt
from shared.facts import ItemStatus

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SCHEDULE = UUID(int=7)
NOW = 1000.0
OPEN = Workspace("w", url="http://a")


def tick(number: int, *, rev: int = 1, waits: bool = True, coalesces: bool = True, merged_count: int = 1) -> Tick:
    """The fire of minute `number`."""
    fire_at = NOON + timedelta(minutes=number)
    return Tick(
        queue_id=UUID(int=number), workspace_id="w", schedule_id=SCHEDULE, fire_at=fire_at, last_fire_at=fire_at,
        rev=rev, waits=waits, coalesces=coalesces, context_id=f"c{number}", merged_count=merged_count,
        ceiling_s=float(number),
    )  # fmt: skip


WAITS, RUNS, ALONE = tick(1), tick(1, waits=False), tick(1, coalesces=False)


@pytest.mark.parametrize(
    ("overlap", "others", "has_room", "verdict"),
    [
        pytest.param("queue_one", [], True, Keep(), id="queue_one: nothing there"),
        pytest.param("queue_one", [WAITS], False, Merge(WAITS), id="queue_one: an earlier one waits: coalesce"),
        pytest.param("queue_one", [RUNS], False, Keep(), id="queue_one: one is being delivered: waits as the one"),
        pytest.param("queue_one", [RUNS, WAITS], False, Merge(WAITS), id="queue_one: one runs, one waits"),
        pytest.param("queue_one", [], False, Keep(), id="queue_one: the agent does something else: waits"),
        pytest.param("queue_one", [ALONE], False, Keep(), id="queue_one: its agent may have the one that waits"),
        pytest.param("queue_all", [WAITS], False, Keep(), id="queue_all: waits too"),
        pytest.param("queue_all", [RUNS], False, Keep(), id="queue_all: one is being delivered: waits"),
        pytest.param("queue_all", [], False, Keep(), id="queue_all: the agent does something else: waits"),
        pytest.param("skip", [], True, Keep(), id="skip: nothing there"),
        pytest.param("skip", [WAITS], True, Settle("skipped", "waiting"), id="skip: an earlier one waits"),
        pytest.param("skip", [RUNS], True, Settle("skipped", "running"), id="skip: one is being delivered"),
        pytest.param("skip", [], False, Settle("skipped", "in_use"), id="skip: the agent does something else"),
    ],
)
def test_what_becomes_of_a_fire(
    overlap: Overlap, others: list[Tick], has_room: bool, verdict: Keep | Merge | Settle
) -> None:
    """C-B2."""
    assert admit(tick(2), overlap, schedule=Schedule(SCHEDULE, 1), others=others, has_room=has_room) == verdict


@pytest.mark.parametrize("overlap", ["queue_one", "queue_all", "skip"])
@pytest.mark.parametrize(
    ("schedule", "removed", "reason"),
    [
        pytest.param(Schedule(SCHEDULE, 5), True, "workspace_removed", id="removed workspace"),
        pytest.param(Schedule(SCHEDULE, 5, paused=True), False, "schedule_paused", id="paused at its rev"),
        pytest.param(Schedule(SCHEDULE, 6, paused=True), False, "schedule_paused", id="paused since"),
        pytest.param(Schedule(SCHEDULE, 4, paused=True), False, None, id="paused before, resumed since"),
        pytest.param(Schedule(SCHEDULE, 4, deleted=True), False, "schedule_deleted", id="deleted stays deleted"),
        pytest.param(Schedule(SCHEDULE, 4), False, None, id="its rev has not come yet"),
        pytest.param(None, False, None, id="nothing has come yet"),
    ],
)
def test_a_fire_of_what_runs_no_more_is_canceled(
    overlap: Overlap, schedule: Schedule | None, removed: bool, reason: str | None
) -> None:
    """C-E4."""
    verdict = admit(tick(2, rev=5), overlap, schedule=schedule, others=[], removed=removed)
    assert verdict == (Keep() if reason is None else Settle("canceled", reason))


def test_what_waits_is_withdrawn_by_a_pause_of_its_rev_and_not_by_an_older_one() -> None:
    pause = Schedule(SCHEDULE, 5, paused=True)
    assert [withdrawn(pause, rev) for rev in (4, 5, 6)] == ["schedule_paused", "schedule_paused", None]
    assert withdrawn(Schedule(SCHEDULE, 5), 4) is None


def test_a_merged_tick_stands_for_all_its_fires_whichever_came_first() -> None:
    """Counts add up, the oldest and the newest stay known, and the newest rev says how it is run."""
    fires = [tick(1, rev=3), tick(2, rev=9, merged_count=4), tick(3, rev=3)]
    for first, second, third in permutations(fires):
        both = merged(merged(first, second), third)
        assert (both.queue_id, both.fire_at) == (first.queue_id, first.fire_at), "it stays the item that it is"
        assert (both.merged_count, both.rev, both.context_id, both.ceiling_s) == (6, 9, "c2", 2.0)
        assert (both.first_missed_at, both.last_fire_at) == (tick(1).fire_at, tick(3).fire_at)


def test_what_was_missed_before_stays_the_first() -> None:
    after_outage = replace(tick(5, merged_count=3), first_missed_at=NOON)
    assert merged(after_outage, tick(6)).first_missed_at == NOON


@pytest.mark.parametrize(
    ("status", "reason", "settled"),
    [
        (ItemStatus.COMPLETED, None, ("delivered", None)),
        (ItemStatus.COMPLETED, "answer_lost", ("delivered", "answer_lost")),
        (ItemStatus.FAILED, "ceiling", ("ceiling", None)),
        (ItemStatus.FAILED, "poison", ("failed", "poison")),
        (ItemStatus.EXPIRED, "expired", ("failed", "expired")),
        (ItemStatus.CANCELED, "schedule_paused", ("canceled", "schedule_paused")),
        (ItemStatus.SUPERSEDED, "absorbed", ("coalesced", None)),
    ],
)
def test_what_the_end_of_an_item_is_for_its_fire(
    status: ItemStatus, reason: str | None, settled: tuple[str, str | None]
) -> None:
    assert outcome(status, reason) == settled


@pytest.mark.parametrize("status", [ItemStatus.QUEUED, ItemStatus.DISPATCHED])
def test_a_fire_has_no_outcome_before_its_item_has_ended(status: ItemStatus) -> None:
    with pytest.raises(ValueError, match="has not ended"):
        outcome(status, None)


@pytest.mark.parametrize(
    ("workspace", "room"),
    [
        pytest.param(OPEN, True, id="idle"),
        pytest.param(replace(OPEN, waiting=1), False, id="somebody waits before it"),
        pytest.param(replace(OPEN, running=1), False, id="a delivery runs"),
        pytest.param(replace(OPEN, forwards={"p": Forwards(1, NOW, (("s", "", NOW),))}), False, id="a live forward"),
        pytest.param(replace(OPEN, running=1, max_concurrent=2), True, id="one of two"),
        pytest.param(replace(OPEN, running=1, waiting=1, max_concurrent=2), False, id="the second is spoken for"),
        pytest.param(replace(OPEN, not_before=NOW + 5), False, id="it said that it is busy"),
        pytest.param(replace(OPEN, not_before=NOW), True, id="it said so, and the time is over"),
        pytest.param(replace(OPEN, url=None), True, id="away, not in use"),
    ],
)
def test_whether_a_tick_could_begin(workspace: Workspace, room: bool) -> None:
    assert has_room(workspace, NOW) is room


def test_a_tick_is_a_message_with_the_newest_prompt() -> None:
    both = merged(tick(1, rev=3), tick(2, rev=4))
    body = json.loads(message(Prompt(both, 6, 'Say "hé" \0\n')))
    assert (body["method"], body["id"]) == ("message/send", str(UUID(int=1)))
    said = body["params"]["message"]
    assert (said["messageId"], said["contextId"]) == (str(UUID(int=1)), "c2")
    assert said["parts"] == [{"kind": "text", "text": 'Say "hé" \0\n'}]
    assert said["metadata"] == {
        "urn:bide:queue:1": {
            "kind": "tick", "schedule_id": str(SCHEDULE), "fire_at": "2026-11-21T12:01:00Z",
            "last_fire_at": "2026-11-21T12:02:00Z", "merged_count": 2, "first_missed_at": "2026-11-21T12:01:00Z",
            "rev": 6,
        }
    }  # fmt: skip


def test_why_a_tick_waits_for_its_prompt() -> None:
    sentence, fields = why(OPEN, Waiting(position=1, not_before=float("inf"), awaits_prompt=True), NOW)
    assert "newest prompt of its schedule" in sentence
    assert fields["reason"] == "awaits_prompt"
