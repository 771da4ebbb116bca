"""Two replicas of each service: order and capacity hold as with one."""

from __future__ import annotations

import asyncio

from tests.chaos.conftest import LONG
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import Storm, storm
from tests.conftest import Stack

EACH = 500 if LONG else 100
PAIRS = ("proxy-1", "proxy-2", "queue-1", "queue-2")


async def test_two_replicas_of_each_keep_order_and_capacity_exactly(faulty: Stack) -> None:
    """I3, I4, B-01: 20 workspaces with `admission = queue_first`, 2,000 messages over both proxies, no live forward."""
    async with ring(faulty, *PAIRS) as services, storm(services, agents=20, work_s=0.02) as load:
        settings = {"admission": "queue_first"}
        for agent in load.agents:
            reply = await load.caller("operator").call("PATCH", f"/workspaces/{agent.workspace}", settings)
            assert reply.status == 200, reply.body
        already = load.runs()
        await asyncio.gather(*(_in_turn(load, number) for number in range(len(load.agents))))
        account = await load.account()
        account.check()
        kept = [each for each in account.promised if each.caller != "warm"]
        assert len(kept) == len(load.agents) * EACH
        assert load.runs() - already == len(kept)
        assert account.duplicates == []
        assert account.out_of_order() == []
        assert account.overlaps() == 0


async def test_with_live_forwards_each_proxy_is_exact(faulty: Stack) -> None:
    """I4: what one proxy forwards and what the queue delivers never overlap; two proxies know by beats."""
    async with ring(faulty, "proxy-1", "queue-1", "queue-2") as services, storm(services, work_s=0.02) as load:
        load.begin(load.agents)
        await load.more(500 if LONG else 150)
        account = await load.account()
        account.check()
        assert any(each.answered and each.caller != "warm" for each in load.sent), "nothing was forwarded live"
        assert account.duplicates == []
        assert account.out_of_order() == []
        assert account.overlaps() == 0


async def _in_turn(load: Storm, number: int) -> None:
    """One caller's messages to one workspace, in bursts, each sent when the last one was taken."""
    agent = load.agents[number]
    for each in range(EACH):
        burst = 5 + number % 3
        if each % burst == 0:
            await agent.until(lambda: agent.active == 0, within_s=60)
        sent = await load.send(agent, f"{each:05}", proxy=each % len(load.ring.ready.proxies))
        assert sent.promised or sent.answered
