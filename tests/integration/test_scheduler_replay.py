"""The story behind the calendar, on scheduler and queue as they run: a session that outlasts twelve fires."""

from __future__ import annotations

from uuid import uuid4

from tests.conftest import Stack, until
from tests.integration.calendar_kit import free, said
from tests.integration.queue_kit import agent, door, queue_service
from tests.integration.scheduler_kit import Calendar, calendar, scheduler_service, whole
from tests.integration.test_scheduler_service import asker

__all__ = ["calendar"]


async def test_twelve_fires_in_one_session_run_once_with_the_newest_prompt(calendar: Calendar, stack: Stack) -> None:
    """B-33 C-B1 C-V2 A-S-05 A-S-14: twelve bounces are seen, one tick runs, and it stands for all of them."""
    name, schedule_id = f"w-{uuid4().hex[:8]}", uuid4()
    async with (
        door(stack) as front,
        queue_service(stack, sweep_s=0.3),
        scheduler_service(stack),
        asker(stack) as proxy,
        agent(name, work_s=60.0) as worker,
    ):
        await front.register(name, worker.url)
        await front.keep(front.busy(name, "six hours"))
        await worker.until(lambda: worker.active == 1)
        made = await proxy.ask("create", schedule_id, workspace_id=name, body=whole(every_s=1, prompt="before"))
        assert made[0] == 201

        async def bounced() -> bool:
            return int((await calendar.row(schedule_id))["bounces"]) >= 12

        await until(bounced)
        changed = await proxy.ask("patch", schedule_id, workspace_id=name, body={"prompt": "after", "every_s": 3600})
        assert changed[0] == 200

        async def applied() -> bool:
            return any((each.schedule_id, each.rev) == (schedule_id, 2) for each in front.applied)

        await until(applied)
        worker.behave(work_s=0.01)
        free(worker)

        async def ran() -> bool:
            return int((await calendar.row(schedule_id))["run_count"]) == 1

        await until(ran)
        row = await calendar.row(schedule_id)
        assert row["bounces"] == 0
        assert row["fires_total"] == row["delivered"] + row["coalesced"]
        assert [each.text for each in worker.received] == ["six hours", "after"]
        assert said(worker.received[1])["merged_count"] == row["fires_total"]
        print({name: row[name] for name in ("fires_total", "delivered", "coalesced", "bounces", "run_count")})
        paused = await proxy.ask("pause", schedule_id, workspace_id=name)
        assert paused[1]["paused"]
