"""Agents that die, vanish and hang in the middle of a turn, under a storm: bounded, visible, and nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from bide_agent.record import Received
from tests.chaos.kit.account import Account, Sent
from tests.chaos.kit.agents import AgentProcess, agent_process
from tests.chaos.kit.looking import change, ended
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import storm
from tests.conftest import Stack, until

QUICK_BACKOFF = {"BIDE_QUEUE_BUSY_BASE_S": "1", "BIDE_QUEUE_BUSY_CAP_S": "4"}


async def test_a_message_that_kills_its_agent_is_poison_after_three_deaths(faulty: Stack) -> None:
    """A-Q-13: the agent is a process that really dies and is started again; what waits behind is delivered."""
    async with (
        ring(faulty, **QUICK_BACKOFF) as services,
        storm(services, agents=6) as load,
        agent_process(services, "dies") as victim,
    ):
        load.witnesses.append(victim)
        load.begin(load.agents)
        supervisor = asyncio.create_task(victim.supervise("dies"))
        poison = await load.send(victim, "die", prefer="wait=0")
        behind = [await load.send(victim, f"behind {number}", prefer="wait=0") for number in range(3)]
        assert poison.promised
        account = await load.account()
        await until(lambda: _has_died(victim, 3))
        await _end(supervisor)
        account.check(may_fail=True)
        assert _how(poison) == ("failed", "poison")
        assert [each.outcome for each in account.runs[poison.message_id]] == [None, None, None]
        assert [_how(each) for each in behind] == [("completed", None)] * 3
        _is_one_item(account.runs[poison.message_id])


async def test_a_message_that_waits_out_a_failed_attempt_delays_nobody(faulty: Stack) -> None:
    """A-Q-13: the agents fail the first message that is kept for them; those behind it do not wait."""
    long_backoff = {"BIDE_QUEUE_BUSY_BASE_S": "20", "BIDE_QUEUE_BUSY_CAP_S": "20"}
    async with ring(faulty, **long_backoff) as services, storm(services) as load:
        for agent in load.agents:
            agent.behave(failing=1)
        first = await asyncio.gather(*(load.send(agent, "fails once", prefer="wait=0") for agent in load.agents))
        second = await asyncio.gather(*(load.send(agent, "behind it", prefer="wait=0") for agent in load.agents))
        load.begin(load.agents)
        await load.more(20)
        account = await load.account()
        account.check(may_fail=True)
        assert [_how(each) for each in (*first, *second)] == [("completed", None)] * 16
        assert [(each.item or {}).get("attempts") for each in first] == [1] * 8
        overtaken = [
            _begun(account, late, 1) > _begun(account, soon, 0) for late, soon in zip(first, second, strict=True)
        ]
        # Full jitter: one wait in a hundred is too short to be overtaken.
        assert sum(overtaken) >= 6, overtaken


async def test_an_agent_that_vanishes_in_a_turn_gets_the_same_item_again(faulty: Stack) -> None:
    """Cut connections and a killed process; unless its workspace wants each message at most once."""
    async with (
        ring(faulty, **QUICK_BACKOFF) as services,
        storm(services, agents=6) as load,
        agent_process(services, work_s=600) as killed,
    ):
        load.witnesses.append(killed)
        once = [await load.agent(work_s=0.1, heartbeat_s=5.0) for _ in range(2)]
        for agent in once:
            await change(services, agent, "at_most_once", value=True, delivery="at_most_once")
        for agent in load.agents:
            agent.behave(cut=1)
        cut = [await load.send(agent, "the connection is cut", prefer="wait=0") for agent in load.agents]
        await load.warm()
        load.begin(load.agents)
        vanished = await load.send(killed, "the process is killed", prefer="wait=0")
        await killed.has(vanished.message_id)
        await killed.kill()
        await killed.start()
        await load.more(20)
        account = await load.account()
        account.check(may_fail=True)
        again, lost = [*cut[:6], vanished], cut[6:]
        assert [_how(each) for each in again] == [("completed", None)] * 7
        assert [_how(each) for each in lost] == [("failed", "delivery_unknown")] * 2
        assert [len(account.runs[each.message_id]) for each in again] == [2] * 7
        assert [len(account.runs[each.message_id]) for each in lost] == [1] * 2
        for each in again:
            _is_one_item(account.runs[each.message_id])


async def test_a_hung_agent_that_goes_on_beating_holds_a_message_no_longer_than_a_turn_may_last(faulty: Stack) -> None:
    """A-P-03: its beats keep the turn beyond `forward_idle_s`; `forward_max_s` ends it, for a live forward too."""
    bounds = {
        f"BIDE_{service}_FORWARD_{name}_S": number
        for service in ("QUEUE", "PROXY")
        for name, number in (("IDLE", "3"), ("MAX", "7"))
    }
    async with ring(faulty, **QUICK_BACKOFF, **bounds) as services, storm(services, agents=6) as load:
        hung = [await load.agent(work_s=0.1, heartbeat_s=1.0) for _ in range(2)]
        for agent in hung:
            await change(services, agent, "ceiling_s", 0.0, session_ceiling_s=0)
        await load.warm()
        kept_by, live_at = hung
        for agent in hung:
            agent.behave(silent=1)
        load.begin(load.agents[:6])
        live = asyncio.create_task(load.send(live_at, "hangs live"))
        kept = await load.send(kept_by, "hangs", prefer="wait=0")
        await kept_by.until(lambda: any(each.message_id == kept.message_id for each in kept_by.received), within_s=60)
        beats = kept_by.beats
        await live
        behind = [await load.send(agent, "behind", prefer="wait=0") for agent in hung]
        await ended(load, kept, within_s=120)
        beats = kept_by.beats - beats
        account = await load.account()
        account.check(may_fail=True)
        print(f"hung: {len(account.runs[kept.message_id])} turns, then {_how(kept)}; live: {live.result().fate}")
        assert beats > 3, "it never stopped beating"
        assert not live.result().answered
        assert _how(kept) == ("failed", "ceiling")
        assert "longest time" in (kept.item or {})["last_error"], "its beats count as life, and the bound ends it"
        assert [_how(each) for each in behind] == [("completed", None)] * 2


def _how(sent: Sent) -> tuple[str | None, str | None]:
    item = sent.item or {}
    return item.get("status"), item.get("reason")


def _begun(account: Account, sent: Sent, run: int) -> float:
    return account.runs[sent.message_id][run].started_at or 0.0


def _is_one_item(runs: Sequence[Received]) -> None:
    """The agent can know it by its id, and the later delivery by its number."""
    assert len({(each.queue_id, each.message_id, each.body) for each in runs}) == 1
    assert all((first.delivery or 0) < (second.delivery or 0) for first, second in pairwise(runs)), runs


async def _has_died(agent: AgentProcess, times: int) -> bool:
    return agent.deaths == times


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
