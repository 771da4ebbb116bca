"""A proxy that dies between bringing a directive and passing on that it was taken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from uuid_utils.compat import uuid7

from bide_agent.agent import running
from bide_agent.options import Options
from shared.facts import SessionDirective, WorkspaceHeartbeat
from tests.chaos.kit.processes import ring
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.listening import listening


async def test_what_a_proxy_took_with_it_is_told_again_and_obeyed_once(faulty: Stack) -> None:
    """The call reached the agent; that it was acknowledged never left the proxy, which was cut off from the broker.

    The scheduler says it again, under the same id, and the next proxy tells it in the reply to a heartbeat.
    """
    async with (
        ring(faulty, "proxy-1") as services,
        replica(faulty, "scheduler") as scheduler,
        listening(faulty, WorkspaceHeartbeat, "liveness") as beats,
        running(
            Options(
                workspace=f"w-{uuid4().hex[:8]}",
                bide=services.ready.proxy,
                token=services.ready.admin_token,
                heartbeat_s=1.0,
            )
        ) as worker,
    ):
        (proxy,) = services.of("proxy")
        await worker.until(lambda: worker.beats > 0, within_s=30)
        worker.busy_for(120.0)
        asked = SessionDirective(
            workspace_id=worker.workspace, rev=1, directive_id=uuid7(), session_id=f"foreign:{worker.workspace}:1:1",
            incarnation=1, kind="checkpoint", reason="ceiling", deadline=datetime.now(UTC) + timedelta(minutes=5),
        )  # fmt: skip

        def acknowledged() -> list[WorkspaceHeartbeat]:
            return [
                fact for fact in beats if any(each.directive_id == asked.directive_id for each in fact.acknowledged)
            ]

        proxy.rabbitmq.hold("up")
        await scheduler.publisher.publish(asked)
        await worker.until(lambda: worker.active == 0, within_s=30)
        told_at = worker.beats
        await worker.until(lambda: worker.beats >= told_at + 2, within_s=30)  # it was acknowledged, and that was taken
        await proxy.kill()
        proxy.rabbitmq.reset()
        proxy.rabbitmq.release()
        assert acknowledged() == []

        worker.behave(control=False)
        worker.busy_for(120.0)  # work that another obedience would end
        await proxy.start()
        await proxy.ready()
        await scheduler.publisher.publish(asked.model_copy(update={"fact_id": uuid7()}))

        async def is_acknowledged() -> bool:
            return bool(acknowledged())

        await until(is_acknowledged, 30)
        assert [each["id"] for each in worker.directives] == [str(asked.directive_id)]
        assert worker.active == 1
