"""What callers and operators do: messages, new, repeated and redelivered, and commands over what was kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from uuid_utils.compat import uuid7

from shared.facts import MessageBusy, Priority, ProxyBeat, QueueQuery
from tests.chaos.kit.model import Item, rank_ms
from tests.chaos.kit.model_base import some
from tests.chaos.kit.model_clock import moment
from tests.chaos.kit.model_rig import Replica
from tests.chaos.kit.model_seat import Seat
from tests.chaos.kit.model_seats import FORWARDS, Said, Seats
from tests.integration.queue_kit import digest

MESSAGE = st.fixed_dictionaries(
    {
        "seat": st.integers(0, 1),
        "caller": st.sampled_from("ab"),
        "key": st.sampled_from(["k", "l", None, None]),
        "explicit": st.booleans(),
        "body": st.sampled_from("xxxy"),
        "priority": st.sampled_from([Priority.TASK, Priority.TASK, Priority.INFO, Priority.CRITICAL]),
        "read_ago_ms": st.sampled_from([0, 0, 5, 500, 9_000, 30_000]),
        "again": st.sampled_from([None, None, None, None, 0, 1, 5]),
        "expires_in_s": st.sampled_from([None, None, 20, 100]),
        "waits_s": st.sampled_from([None, None, None, 5]),
    }
)
ENDED_BADLY = {"failed", "expired", "canceled"}
INFO_TTL_S = 300.0


class Messages(Seats):
    """Callers and operators."""

    @rule(batch=st.lists(MESSAGE, min_size=1, max_size=4), by=some, beat=st.none() | FORWARDS)
    def keep(self, batch: list[dict[str, Any]], by: int, beat: Said | None) -> None:
        self.run(self.kept(self.pick(by), self.messages(batch, beat)))

    def messages(self, batch: list[dict[str, Any]], beat: Said | None = None) -> list[MessageBusy]:
        now = self.clock.now()
        facts: list[MessageBusy] = []
        for spec in batch:
            told = None
            if beat is not None and not facts:
                told = self.proxy_beat(self.names[spec["seat"]], "p", beat, now)
            facts.append(self._message(spec, now, [*self.facts, *facts], told))
        self.facts += facts
        return facts

    def _message(
        self, spec: dict[str, Any], now: float, known: list[MessageBusy], told: ProxyBeat | None
    ) -> MessageBusy:
        queue_id = _id_of(now - spec["read_ago_ms"] / 1000)
        if spec["again"] is not None and known:
            queue_id = known[-1 - spec["again"] % len(known)].queue_id
        key = spec["key"] or str(queue_id)
        return MessageBusy(
            fact_id=_id_of(now),
            workspace_id=self.names[spec["seat"]],
            rev=1,
            queue_id=queue_id,
            caller_id=spec["caller"],
            caller_hash=digest(spec["caller"]),
            key_hash=digest(f"key:{key}" if spec["explicit"] else key),
            body_hash=digest(spec["body"]),
            explicit_key=spec["explicit"],
            reason="backlog",
            priority=spec["priority"],
            method="message/send",
            body=f'{{"jsonrpc":"2.0","id":1,"method":"message/send","params":"{spec["body"]}"}}'.encode(),
            not_before=moment(now + spec["waits_s"]) if spec["waits_s"] else None,
            expires_at=moment(now + spec["expires_in_s"]) if spec["expires_in_s"] else None,
            beat=told,
            reply_to="door",
        )

    @precondition(lambda self: self.facts)
    @rule(by=some, index=some, count=st.integers(1, 3))
    def redeliver(self, by: int, index: int, count: int) -> None:
        """The broker gives a batch again."""
        at = index % len(self.facts)
        self.run(self.kept(self.pick(by), self.facts[at : at + count], again=True))

    async def kept(self, replica: Replica, facts: list[MessageBusy], *, again: bool = False) -> None:
        said = self.rig.broker.kept
        said.clear()
        now = await self.rig.read(MessageBusy, replica.handlers.message_busy, facts)
        expected = []
        for fact in [] if again else sorted(facts, key=lambda fact: (fact.queue_id, fact.fact_id)):
            if fact.beat is not None:
                self.hear_proxy(fact.beat)
            known, refused = self.model.keep(_item(fact, now), explicit=fact.explicit_key)
            expected.append((fact.queue_id, known, refused))
        answered = sorted((each.queue_id, str(each.duplicate_of), each.conflict) for each in said)
        wanted = sorted((queue_id, str(known), refused) for queue_id, known, refused in expected)
        assert answered == wanted, f"I2: told {answered}, the model {wanted}"

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.model.items)
    @rule(
        verb=st.sampled_from(["cancel", "retry", "promote"]),
        by=some, index=some, fitting=st.sampled_from([True, True, False]), right=st.sampled_from([True] * 4 + [False]),
    )  # fmt: skip
    def command(self, verb: str, by: int, index: int, *, fitting: bool, right: bool) -> None:
        """About one item: most often one that it fits, and from whom it belongs to."""
        every = list(self.model.items.values())
        fits: dict[str, Callable[[Item], bool]] = {
            "cancel": lambda item: item.is_active,
            "retry": lambda item: item.status in ENDED_BADLY,
            "promote": lambda item: item.status == "queued" and self.model.is_behind(item),
        }
        items = [item for item in every if not fitting or fits[verb](item)] or every
        step = {"cancel": self._cancel, "retry": self._retry, "promote": self._promote}[verb]
        self.run(step(self.pick(by), items[-1 - index % len(items)], right=right))

    async def _ask(self, replica: Replica, verb: str, name: str = "-", **values: Any) -> tuple[int, dict[str, Any]]:
        query = QueueQuery(
            workspace_id=name, rev=1, query_id=uuid7(), verb=verb, reply_to="door",
            expires_at=moment(time.time() + 60), **values,
        )  # fmt: skip
        await self.rig.read(QueueQuery, replica.answers.query, [query])
        answer = self.rig.broker.answered.pop(query.query_id)
        self.seen[f"{verb} {answer.status}"] += 1
        return answer.status, json.loads(answer.body)

    async def _about(self, replica: Replica, verb: str, item: Item, *, right: bool) -> tuple[int, dict[str, Any]]:
        caller = digest(item.caller if right else "nobody")
        return await self._ask(replica, verb, queue_id=item.queue_id, caller_hash=caller)

    async def _cancel(self, replica: Replica, item: Item, *, right: bool) -> None:
        status, _ = await self._about(replica, "cancel", item, right=right)
        if not right:
            assert status == 404
        elif item.status == "queued":
            self.model.end(item, "canceled", "canceled")
            assert status == 200
        elif item.status == "dispatched":
            item.cancel = True
            assert status == 202
        else:
            assert status == (200 if item.status == "canceled" else 409)

    async def _retry(self, replica: Replica, item: Item, *, right: bool) -> None:
        status, shown = await self._about(replica, "retry", item, right=right)
        if not right:
            assert status == 404
        elif item.retried_by is not None:
            assert (status, shown["queue_id"]) == (200, str(item.retried_by)), "retried twice is retried once"
        elif item.status not in ENDED_BADLY:
            assert status == 409
        elif self.model.seat(item.workspace).removed:
            assert status == 410, "nobody would deliver it"
        else:
            assert (status, shown["retry_of"]) == (201, str(item.queue_id))
            self.model.retry(item, await self._again(item, UUID(shown["queue_id"])))

    async def _again(self, item: Item, queue_id: UUID) -> Item:
        """The item that a retry makes: its id and its TTL are the queue's to choose, by its own clock."""
        assert queue_id not in self.model.items
        expires_at = None
        if item.priority == "INFO":
            row = "SELECT extract(epoch FROM expires_at)::float8 FROM a2a_queue WHERE queue_id = $1"
            expires_at = await self.rig.pool.fetchval(row, queue_id)
            assert abs(expires_at - time.time() - INFO_TTL_S) < 60
        return Item(
            queue_id=queue_id,
            workspace=item.workspace,
            caller=item.caller,
            key=digest(str(queue_id)).hex(),
            body=item.body,
            priority=item.priority,
            rank_ms=rank_ms(queue_id, queue_id, item.priority),
            enqueued_at=self.clock.said,
            expires_at=expires_at,
        )

    async def _promote(self, replica: Replica, item: Item, *, right: bool) -> None:
        status, shown = await self._about(replica, "promote", item, right=right)
        if not right:
            assert status == 404
        elif item.status != "queued":
            assert status == 409
        else:
            self.model.promote(item)
            ahead = [each for each in self.model.of(item.workspace, "queued") if each.place < item.place]
            assert (status, shown["position"]) == (200, len(ahead) + 1), f"I3: {item.queue_id} is promoted"

    @rule(
        by=some, index=some, priority=st.none() | st.sampled_from(Priority), caller=st.none() | st.sampled_from("ab"),
        older_s=st.sampled_from([None, None, 2.0, 60.0]), count_only=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def cancel_many(self, by: int, index: int, **about: Any) -> None:
        self.run(self._cancel_many(self.pick(by), self.seat(index), **about))

    async def _cancel_many(
        self, replica: Replica, seat: Seat, *, priority: Priority | None, caller: str | None, older_s: float | None,
        count_only: bool,
    ) -> None:  # fmt: skip
        status, said = await self._ask(
            replica, "cancel_many", seat.name, priority=priority, caller_hash=digest(caller) if caller else None,
            older_than_s=older_s, count_only=count_only,
        )  # fmt: skip
        before = self.clock.said - older_s if older_s is not None else None
        found = self.model.matching(seat.name, priority.value if priority else None, caller, before)
        ended = [] if count_only else found
        for item in ended:
            self.model.end(item, "canceled", "dropped")
            self.seen["dropped"] += 1
        assert (status, said) == (
            200, {"matched": len(found), "canceled": len(ended), "remaining": len(found) - len(ended)},
        )  # fmt: skip


def _id_of(at: float) -> UUID:
    """An id as it is made at this moment."""
    return UUID(int=(int(at * 1000) << 80) | (uuid7().int & ((1 << 80) - 1)))


def _item(fact: MessageBusy, now: float) -> Item:
    return Item(
        queue_id=fact.queue_id,
        workspace=fact.workspace_id,
        caller=fact.caller_id,
        key=fact.key_hash.hex(),
        body=fact.body_hash.hex(),
        priority=fact.priority.value,
        rank_ms=rank_ms(fact.queue_id, fact.fact_id, fact.priority.value),
        enqueued_at=now,
        not_before=fact.not_before.timestamp() if fact.not_before else None,
        expires_at=fact.expires_at.timestamp() if fact.expires_at else None,
    )
