"""Postgres slow, locked, or gone at the moment of a commit: nothing is lost, set aside, or delivered twice.

As with an outage, no fault is noted in the books: a slow database and an unconfirmed commit explain no duplicate.
"""

from __future__ import annotations

import asyncio
import random
import urllib.request

import pytest

from tests.chaos.conftest import LONG, away_s
from tests.chaos.kit import database
from tests.chaos.kit.broker import more_runs
from tests.chaos.kit.database import close_books
from tests.chaos.kit.processes import ring
from tests.chaos.kit.storm import storm
from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)
QUICK = {"BIDE_QUEUE_OWNER_SILENT_S": "8", "BIDE_QUEUE_OWNER_BEAT_S": "1"}
RING = ("proxy-1", "queue-1", "queue-2")
_CUTS_MAX = 60


async def test_at_200_ms_a_query_the_storm_goes_on_and_nothing_is_delivered_twice(faulty: Stack) -> None:
    """B-22: then it is fast again, and what has gathered is delivered."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        await load.more(20)
        for link in services.links("postgres"):
            link.delay_s = 0.1  # each way
        promised, delivered = load.promised(), load.runs()
        # The length of the fault.
        await asyncio.gather(asyncio.sleep(away_s(20.0)), load.more(20), more_runs(load, 1))
        print(f"while slow: promised {load.promised() - promised}, delivered {load.runs() - delivered}")
        for link in services.links("postgres"):
            link.delay_s = 0.0
        await load.more(20)
        await close_books(faulty, services, load)


async def test_a_pool_that_waits_for_locks_waits_and_nobody_is_taken_for_dead(faulty: Stack) -> None:
    """B-22: two connections a process, and an outside transaction that sits on every workspace for 12 s."""
    async with ring(faulty, *RING, BIDE_DATABASE_POOL_MAX="2", **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        await load.more(20)
        async with database.locked(faulty):
            over = asyncio.create_task(asyncio.sleep(away_s(12.0, 40.0)))
            promises = asyncio.create_task(load.more(20))
            while not over.done():
                for process in services.processes.values():
                    await asyncio.to_thread(urllib.request.urlopen, f"{process.url}/livez", timeout=30)
                await asyncio.wait([over], timeout=1)
            await promises
        await load.more(20)
        await close_books(faulty, services, load)


async def test_a_commit_that_was_never_confirmed_has_its_effect_once(faulty: Stack) -> None:
    """A-Q-18: claims, endings and new items, each cut after Postgres had the COMMIT and before it could say so."""
    async with ring(faulty, *RING, **QUICK) as services, storm(services) as load:
        load.begin(load.agents)
        await load.more(20)

        def adopted() -> int:
            return sum(process.logged("delivery_adopted") for process in services.of("queue"))

        cuts = 0
        while cuts < (30 if LONG else 10) or not adopted():
            assert cuts < _CUTS_MAX, "no claim was ever cut: the test shows less than it says"
            await asyncio.sleep(random.uniform(0.0, 0.5))
            cut = services[f"queue-{1 + cuts % 2}"].postgres.cut_after(b"COMMIT")
            await asyncio.wait_for(cut.wait(), 30)
            cuts += 1
        await load.more(20)
        account = await close_books(faulty, services, load)
        print(f"{cuts} cuts, adopted {adopted()} of {len(account.delivered)}")
