"""How sessions are ended: words about the gate, new and old, stops of deliveries, and hanging up."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule
from uuid_utils.compat import uuid7

from shared.facts import KillDone, SessionGate, SessionStop
from tests.chaos.kit.model_base import some
from tests.chaos.kit.model_clock import moment
from tests.chaos.kit.model_deliveries import Deliveries
from tests.chaos.kit.model_rig import Replica
from tests.chaos.kit.model_seat import Seat


class Endings(Deliveries):
    """The scheduler, and liveness."""

    @rule(
        by=some, index=some, status=st.sampled_from(["offline", "offline", "online"]),
        seconds=st.sampled_from([0.0, 4.9, 5.1, 12.0]), then=st.sampled_from(["registers", "beats", "online", ""]),
    )  # fmt: skip
    def die(self, by: int, index: int, **said: Any) -> None:
        """An agent dies with what it has, noticed by liveness or not, and another life of it is heard, or the same."""
        self.run(self._dies(self.pick(by), self.seat(index), **said))

    async def _dies(self, replica: Replica, seat: Seat, *, status: str, seconds: float, then: str) -> None:
        await self.swept(replica)
        await self.turned(replica, [])
        await self.declared(replica, seat, status)
        self.clock.ahead_s += seconds
        match then:
            case "registers":
                await self.registered(replica, seat, maximum=2, life=1)
            case "beats":
                await self.beaten(replica, seat, active=0, life=1)
            case "online":
                await self.declared(replica, seat, "online")
        for each in self.replicas:
            await self.reread(each)
        await self.turned(replica, [])

    @rule(
        by=some, index=some, session=st.sampled_from("st"), closed=st.sampled_from([True, False, False]),
        for_s=st.sampled_from([-1.0, 5.0, 5.0, 120.0]), old=st.sampled_from([None, None, None, 0, 1]),
    )  # fmt: skip
    def gate(self, by: int, index: int, *, session: str, closed: bool, for_s: float, old: int | None) -> None:
        """A session comes into the gate, is renewed, leaves; or something that was said before comes late."""
        seat = self.seat(index)
        said = self.words.setdefault((seat.name, session), [])
        if old is not None and said:
            word = said[-1 - old % len(said)].model_copy(update={"fact_id": uuid7()})
        else:
            word = SessionGate(
                workspace_id=seat.name, rev=len(said) + 1, session_id=session, incarnation=1, closed=closed,
                gate_until=moment(self.clock.now() + for_s),
            )  # fmt: skip
            said.append(word)
        self.run(self._gated(self.pick(by), seat, word))

    async def _gated(self, replica: Replica, seat: Seat, word: SessionGate) -> None:
        now = await self.rig.read(SessionGate, replica.sessions.gate, [word])
        seat.hear_gate(word.session_id, word.rev, word.gate_until.timestamp(), closed=word.closed, now=now)
        self.seen["gate closed" if seat.gate_until(now) else "gate open"] += 1

    @rule(
        by=some, index=some, reason=st.sampled_from(["ceiling", "ceiling", "operator"]),
        number=st.sampled_from([0, 0, 0, -1]), hopeless=st.sampled_from([False, False, True]), read=st.booleans(),
    )  # fmt: skip
    def stop(self, by: int, index: int, **said: Any) -> None:
        """A delivery is told to stop, or one that is over; or nothing could end it, and its owner hangs up."""
        self.run(self._stopped(self.pick(by), index, **said))

    async def _stopped(
        self, replica: Replica, index: int, *, reason: str, number: int, hopeless: bool, read: bool
    ) -> None:  # fmt: skip
        found = sorted(self.model.items.values(), key=lambda item: (item.status != "dispatched", item.queue_id))
        if not found:
            return
        item = found[index % min(len(found), 4)]
        session = f"{item.queue_id}:{max(0, item.delivery_no + number)}"
        about: dict[str, Any] = {
            "workspace_id": item.workspace, "rev": 1, "session_id": session, "incarnation": 1,
        }  # fmt: skip
        if hopeless:
            done = KillDone(**about, order_id=uuid7(), result="not_killable")
            await self.rig.read(KillDone, replica.sessions.kill_done, [done])
        else:
            await self.rig.read(SessionStop, replica.sessions.stop, [SessionStop(**about, reason=reason)])
        if number or item.status != "dispatched":
            return
        item.stop = item.stop or ("ceiling" if hopeless else reason)
        item.hung_up = item.hung_up or hopeless
        self.seen["hung up" if hopeless else "stopped"] += 1
        for each in self.replicas if read else ():
            await self.reread(each)
