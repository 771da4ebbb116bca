"""Services that are killed, frozen and replaced under a storm: what was promised is delivered or visibly ended."""

from __future__ import annotations

from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import storm
from tests.conftest import Stack

QUICK = {"BIDE_QUEUE_OWNER_SILENT_S": "6", "BIDE_QUEUE_OWNER_BEAT_S": "1"}
"""A dead owner is noticed after 6 s instead of 20: the same rule on a shorter clock."""


async def test_a_queue_service_killed_three_times_loses_nothing_and_poisons_nothing(faulty: Stack) -> None:
    """A-Q-12, A-Q-18: with a message that is under way through all three deaths."""
    async with ring(faulty, **QUICK) as services, storm(services) as load:
        long = await load.agent(work_s=10.0)
        load.begin(load.agents[:-1])
        first = await load.send(long, "under way", prefer="wait=0")
        assert first.promised
        for death in range(1, 4):
            await long.until(lambda death=death: len(long.received) >= death, within_s=60)  # type: ignore[misc]
            await load.more(20)
            await services["queue-1"].kill()
            await load.more(20)
            await services["queue-1"].start()
        long.behave(work_s=0.1)
        account = await load.account(within_s=150)
        account.check()
        assert first.item is not None
        assert first.item["status"] == "completed", first.item
        assert account.out_of_order() == []
