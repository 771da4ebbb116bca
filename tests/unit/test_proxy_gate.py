"""The gate as a proxy keeps it: closed until its moment, told at once and again; no forward between route and count."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from uuid_utils.compat import uuid7

from services.proxy.api.a2a import A2A
from services.proxy.api.asking import Asking
from services.proxy.api.evidence import Evidence
from services.proxy.api.finding import Finding
from services.proxy.api.forwarding import Forwarding
from services.proxy.api.identity import Identity
from services.proxy.api.keeping import Keeper
from services.proxy.api.outgoing import Addresser
from services.proxy.api.owning import Owning
from services.proxy.api.questions import Questions
from services.proxy.api.tasks import Tasks
from services.proxy.api.wire import Request
from services.proxy.copies import Backlogs, Copies
from services.proxy.copies.bounds import Bounds
from services.proxy.copies.forwards import LiveForward
from services.proxy.decide import Arrival, Forward, Keep, Reason, Workspace, route
from services.proxy.handlers import Handlers
from services.proxy.loops import Beats
from services.proxy.settings import Settings
from services.proxy.store import Store
from shared.agents import Agents, Unanswered
from shared.broker import Publisher
from shared.facts import FLEET, BacklogSnapshot, Fact, NamedBacklog, ProxyBeat, SessionStop, WorkspaceBacklog
from shared.outcomes import Fault
from shared.settings import STOP_HEARD_S, TURN_SLACK_S

T0 = float(int(time.time()))


SETTINGS = Settings.model_validate(
    {
        "database_url": "postgresql://x", "amqp_url": "amqp://x", "admin_token": "admin", "delivery_secret": "secret",
        "kept_wait_s": 0.0,
    }
)  # fmt: skip


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(T0 + seconds, UTC)


def change(rev: int, generation: int, until: float | None, *, seconds: float = 0, name: str = "w") -> WorkspaceBacklog:
    return WorkspaceBacklog(
        workspace_id=name, rev=rev, occurred_at=at(seconds), waiting=0, in_use=0, gate_generation=generation,
        gate_until=at(until) if until is not None else None,
    )  # fmt: skip


def snapshot(seconds: float, *backlogs: NamedBacklog) -> BacklogSnapshot:
    return BacklogSnapshot(
        rev=1, occurred_at=at(seconds), snapshot_id=uuid7(), part=0, parts=1, backlogs=backlogs
    )  # fmt: skip


@pytest.mark.parametrize(("seconds", "is_shut"), [(119.9, True), (120.0, False), (120.1, False)])
def test_a_gate_that_nobody_renews_opens_by_itself(seconds: float, is_shut: bool) -> None:
    backlogs = Backlogs()
    backlogs.hear(change(1, 1, 120))
    assert backlogs.view("w").is_shut(T0 + seconds) is is_shut


@pytest.mark.parametrize("age_s", [0.0, 20.1, 119.0])
def test_a_closed_gate_holds_also_on_a_copy_that_is_old(age_s: float) -> None:
    """C-K6: who hears nothing more keeps to the last that it heard."""
    arrival = Arrival(copied_at=T0, now=T0 + age_s, gate_closed=True)
    assert route(arrival) == Keep(Reason.GATE_CLOSED)
    assert isinstance(route(Arrival(copied_at=T0, now=T0 + age_s)), Forward)


def test_a_snapshot_that_was_read_before_the_closing_does_not_open_the_gate() -> None:
    """The closing was told to all as seen: what is begun after it would be killed with the rest."""
    backlogs = Backlogs()
    backlogs.hear(change(5, 2, 120, seconds=0))
    backlogs.hear_part(snapshot(1))
    view = backlogs.view("w")
    assert view.is_shut(T0 + 2)
    assert view.gate_generation == 2
    backlogs.hear(change(6, 2, None, seconds=2))
    assert not backlogs.view("w").is_shut(T0 + 3), "the queue's newer word opens it"


def test_a_late_word_from_before_the_closing_does_not_open_it() -> None:
    backlogs = Backlogs()
    backlogs.hear(change(5, 2, 120))
    backlogs.hear(change(4, 1, None, seconds=1))
    assert backlogs.view("w").is_shut(T0 + 2)


# ── beats ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Bus:
    """What was posted."""

    facts: list[Fact] = field(default_factory=list)

    def post(self, fact: Fact) -> None:
        self.facts.append(fact)

    async def publish(self, fact: Fact) -> None:
        await asyncio.sleep(0)
        self.facts.append(fact)

    def beats(self, name: str) -> list[ProxyBeat]:
        return [fact for fact in self.facts if isinstance(fact, ProxyBeat) and fact.workspace_id == name]


@dataclass
class Side:
    copies: Copies
    bus: Bus
    beats: Beats
    handlers: Handlers


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    clock = {"now": T0}
    monkeypatch.setattr("services.proxy.loops.time.time", lambda: clock["now"])
    copies, bus = Copies("me"), Bus()
    values = {"database_url": "postgresql://x", "amqp_url": "amqp://x"}
    beats = Beats(Settings.model_validate(values), copies, cast("Publisher", bus))
    return Side(copies, bus, beats, Handlers(copies, lambda: None, closed=beats.closed))


async def test_a_new_closing_is_told_at_once_with_what_runs_by_then(side: Side) -> None:
    """C-K6."""
    side.copies.uses.begin(LiveForward("w", "s", b"k" * 32, T0 - 1))
    await side.handlers.backlogs([change(1, 1, 120)])
    [beat] = side.bus.beats("w")
    assert (beat.gate_generation, beat.gate_until) == (1, at(120))
    assert [each.session_id for each in beat.forwards] == ["s"]
    await side.handlers.backlogs([change(2, 1, 125)])
    assert len(side.bus.beats("w")) == 1, "a renewal is no new closing; the next beat tells it"
    await side.handlers.backlogs([change(3, 2, 130)])
    assert len(side.bus.beats("w")) == 2


async def test_a_closing_in_a_snapshot_is_told_at_once_too(side: Side) -> None:
    named = NamedBacklog(workspace_id="w", rev=3, waiting=0, in_use=0, gate_generation=4, gate_until=at(60))
    await side.handlers.snapshots([snapshot(0, named)])
    assert [beat.gate_generation for beat in side.bus.beats("w")] == [4]


async def test_a_closed_gate_is_beaten_until_it_is_open_and_once_more(side: Side) -> None:
    await side.handlers.backlogs([change(1, 1, 12)])
    for seconds in (4.9, 5, 10, 15, 20, 25):
        await side.beats.run_once(T0 + seconds)
    said = [(beat.gate_generation, beat.gate_until) for beat in side.bus.beats("w")]
    assert said == [(1, at(12)), (1, at(12)), (1, at(12)), (1, None)]


async def test_every_proxy_says_that_it_lives(side: Side) -> None:
    for seconds in (0, 4.9, 5, 9.9, 10):
        delay_s = await side.beats.run_once(T0 + seconds)
        assert 0 < delay_s <= 5
    fleet = side.bus.beats(FLEET)
    assert len(fleet) == 3
    assert [each.rev for each in fleet] == sorted({each.rev for each in fleet})
    assert all(not each.forwards for each in fleet)


async def test_a_beat_of_the_fleet_says_nothing_of_a_workspace(side: Side) -> None:
    await side.handlers.proxy_beats([ProxyBeat(workspace_id=FLEET, rev=1, proxy_id="other")])
    assert not side.copies.uses.of(FLEET).peers


# ── between the route of a message and its count ─────────────────────────────────────────────────────────────────────


@dataclass
class Agent:
    """The edge: takes the message and gives no answer."""

    sent: list[str] = field(default_factory=list)

    async def send(self, _url: str, _body: bytes, headers: Sequence[tuple[bytes, bytes]], **_: Any) -> Any:
        self.sent.append(dict(headers)[b"x-bide-session"].decode())
        await asyncio.sleep(0)
        raise Unanswered(Fault.EOF, "it hung up", stale=False)


def a2a(side: Side, agent: Agent) -> A2A:
    publisher, agents, store = cast("Publisher", side.bus), cast("Agents", agent), cast("Store", None)
    identity, finding = Identity(SETTINGS, side.copies, store), Finding(side.copies, store)
    questions = Questions(SETTINGS, side.copies, Asking(SETTINGS, side.copies, publisher))
    addresser = Addresser(SETTINGS, side.copies)
    return A2A(
        SETTINGS, side.copies, identity=identity, finding=finding, keeper=Keeper(SETTINGS, side.copies, publisher),
        questions=questions, stopping=asyncio.Event(),
        tasks=Tasks(questions, addresser, agents, Owning(side.copies, store), SETTINGS),
        forwarding=Forwarding(
            SETTINGS, side.copies, agents=agents, addresser=addresser, changed=side.beats.notify,
            evidence=Evidence(SETTINGS, publisher),
        ),
    )  # fmt: skip


def request() -> Request:
    message = {"role": "user", "messageId": "m", "parts": [{"kind": "text", "text": "x"}]}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}).encode()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"body": body}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    headers = [(b"authorization", b"Bearer admin")]
    return Request({"method": "POST", "path": "/workspaces/w/a2a", "headers": headers}, receive, send)


@pytest.mark.parametrize("turns", range(12))
async def test_whatever_the_moment_a_message_is_told_with_the_closing_or_does_not_go(side: Side, turns: int) -> None:
    """C-K6: the beat that says "seen" is what a kill goes by; who is begun after it is innocent."""
    agent = Agent()
    side.copies.registry.put(
        Workspace(workspace_id="w", owner_caller="o", url="http://a", token_hash=b"t", incarnation=1, rev=1)
    )
    await side.handlers.snapshots([snapshot(0)])
    call = asyncio.create_task(a2a(side, agent)(request(), "w"))
    for _ in range(turns):
        await asyncio.sleep(0)
    was_over = call.done()
    await side.handlers.backlogs([change(1, 1, 120)])
    [said] = [beat for beat in side.bus.beats("w") if beat.gate_generation == 1]
    became = await call
    if not was_over:
        assert agent.sent == [each.session_id for each in said.forwards] or said.ended
    assert bool(agent.sent) is (became == "failed"), "else it is kept"


# ── stops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def stop(session_id: str = "s") -> SessionStop:
    return SessionStop(workspace_id="w", rev=1, session_id=session_id, incarnation=1, reason="ceiling")


def live(**more: Any) -> LiveForward:
    return LiveForward("w", "s", b"k" * 32, T0, **more)


async def test_a_stop_of_a_known_task_asks_its_agent_once(side: Side) -> None:
    uses, forward = side.copies.uses, live(task_id="t")
    uses.begin(forward)
    await side.handlers.stops([stop("another")])
    assert forward.stop_reason is None
    await side.handlers.stops([stop(), stop()])
    assert uses.to_cancel == [forward]
    assert uses.stop("w", "s", "operator") is None
    assert forward.stop_reason == "ceiling", "the first reason stays"


async def test_a_stop_asks_as_soon_as_the_task_is_known(side: Side) -> None:
    uses, forward = side.copies.uses, live()
    woken: list[int] = []
    uses.wake = lambda: woken.append(1)
    uses.begin(forward)
    await side.handlers.stops([stop()])
    assert not uses.to_cancel
    uses.name_task(forward, "t")
    assert (uses.to_cancel, len(woken)) == ([forward], 1)


def test_a_forward_takes_over_another_ceiling_as_a_delivery_does() -> None:
    forward = live(bounds=Bounds(100.0, 30.0))
    assert forward.until == forward.begun + 100
    forward.begun -= 50  # it has run for that long
    forward.bound(Bounds(100.0, 30.0))
    assert forward.until == forward.begun + 150, "nothing was changed"
    forward.bound(Bounds(1000.0, 30.0))
    assert forward.until == forward.begun + 1000
    forward.bound(Bounds(70.0, 30.0))
    left_s = forward.until - time.monotonic()
    assert left_s == pytest.approx(30 + TURN_SLACK_S, abs=1), "the time in which a session is ended"


async def test_no_bound_counts_while_a_stop_is_repeated(side: Side) -> None:
    forward = live(bounds=Bounds(1.0, 30.0))
    side.copies.uses.begin(forward)
    for _ in range(2):
        forward.until = 0.0
        await side.handlers.stops([stop()])
        assert forward.until == pytest.approx(time.monotonic() + STOP_HEARD_S, abs=1)
    forward.until = later = time.monotonic() + 1e6
    await side.handlers.stops([stop()])
    assert forward.until == later, "a stop makes no turn shorter"


async def test_a_forward_that_was_not_stopped_is_not_canceled(side: Side) -> None:
    forward = live()
    side.copies.uses.begin(forward)
    side.copies.uses.name_task(forward, "t")
    assert not side.copies.uses.to_cancel
    side.copies.uses.end(forward, "answered", T0 + 1)
    await side.handlers.stops([stop()])
    assert not side.copies.uses.to_cancel
