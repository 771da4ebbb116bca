"""Wiring of proxy, and nothing else."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

from services.proxy.api.a2a import A2A
from services.proxy.api.asking import Asking
from services.proxy.api.card import Cards
from services.proxy.api.door import Api, Door
from services.proxy.api.evidence import Evidence
from services.proxy.api.finding import Finding
from services.proxy.api.forwarding import Forwarding
from services.proxy.api.identity import Identity
from services.proxy.api.keeping import Keeper
from services.proxy.api.lives import Lives
from services.proxy.api.outgoing import Addresser
from services.proxy.api.owning import Owning
from services.proxy.api.questions import Questions
from services.proxy.api.queue import Queue
from services.proxy.api.registry import Registrar
from services.proxy.api.schedules import Schedules
from services.proxy.api.sessions import Sessions
from services.proxy.api.tasks import Tasks
from services.proxy.api.verbs import Verbs
from services.proxy.api.workspaces import Workspaces
from services.proxy.control import Control
from services.proxy.copies import Copies
from services.proxy.handlers import Handlers
from services.proxy.loops import Beats, Catching, Parting, Reading, Writing
from services.proxy.settings import Settings
from services.proxy.store import Store
from shared.addresses import AddressRules
from shared.agents import Agents
from shared.loops import turning
from shared.service import Service, running, start

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(settings: Settings) -> None:
    door = Door()
    async with running("proxy", settings, MIGRATIONS, app=door.app) as service, AsyncExitStack() as stack:
        await wire(service, settings, door, stack)
        await service.serve()


async def wire(service: Service, settings: Settings, door: Door, stack: AsyncExitStack) -> Copies:
    """Make the parts, join them, open the door; the stack takes them down in the opposite order."""
    copies, store = Copies(settings.replica_id), Store(service.pool)
    rules = AddressRules(allow_loopback=settings.allow_loopback)
    agents = Agents(rules)
    stack.push_async_callback(agents.close)
    beats, reading = Beats(settings, copies, service.publisher), Reading(copies, store, service.publisher)
    writing, catching = Writing(settings, copies, store), Catching(settings, copies, service.publisher)
    addresser = Addresser(settings, copies)
    control = Control(settings, copies, agents, addresser.authorization)
    await reading.load()
    await beats.introduce()
    Handlers(copies, reading.loop.wake, closed=beats.closed, to_call=control.loop.wake).register(service.reader)
    asking = Asking(settings, copies, service.publisher)
    identity, questions = Identity(settings, copies, store), Questions(settings, copies, asking)
    finding, told = Finding(copies, store), service.relay.wake
    sessions = Sessions(settings, identity=identity, finding=finding, store=store, asking=asking)
    lives = Lives(settings, identity=identity, finding=finding, store=store, asking=asking)
    api = Api(
        a2a=A2A(
            settings, copies, identity=identity, finding=finding, keeper=Keeper(settings, copies, service.publisher),
            questions=questions, stopping=door.stopping,
            tasks=Tasks(questions, addresser, agents, Owning(copies, store), settings),
            forwarding=Forwarding(
                settings, copies, agents=agents, addresser=addresser, changed=beats.notify,
                evidence=Evidence(settings, service.publisher),
            ),
        ),
        registrar=Registrar(
            settings, copies, identity=identity, finding=finding, store=store, publisher=service.publisher, told=told,
            rules=rules,
        ),
        workspaces=Workspaces(
            settings, copies, identity=identity, finding=finding, store=store, told=told, sessions=sessions,
            lives=lives,
        ),
        sessions=sessions,
        lives=lives,
        queue=Queue(finding, identity, questions),
        verbs=Verbs(settings, finding=finding, identity=identity, questions=questions, store=store),
        schedules=Schedules(settings, copies, finding=finding, identity=identity, asking=asking),
        cards=Cards(settings, finding, identity),
    )  # fmt: skip
    parting = Parting(settings, copies)
    loops = [beats.loop, reading.loop, writing.loop, catching.loop, parting.loop, control.loop]
    stack.push_async_callback(writing.close)
    stack.push_async_callback(control.close)
    await stack.enter_async_context(turning(loops))
    stack.push_async_callback(door.close, settings.drain_s)
    door.open(api)
    return copies


if __name__ == "__main__":
    sys.exit(start("proxy", Settings, main))
