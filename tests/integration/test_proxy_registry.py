"""The registry on real Postgres and RabbitMQ: tokens, incarnations, settings, removal, cards, and who may do what."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest

from shared.facts import WorkspaceChanged, WorkspaceHeartbeat, WorkspaceRegistered, WorkspaceRemoved
from tests.conftest import Stack, until
from tests.integration.conftest import replica
from tests.integration.proxy_kit import ADMIN, SECRET, Proxy, empty, fresh, proxy


@pytest.fixture
async def front(stack: Stack) -> AsyncIterator[Proxy]:
    await empty(stack)
    async with proxy(stack, token_unknown_s=0.2) as opened:
        yield opened


async def key(front: Proxy, caller_id: str, *rights: str) -> str:
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id, rights) VALUES (sha256($1::bytea), $2, $3)"
    await front.service.pool.execute(query, token.encode(), caller_id, list(rights))
    return token


async def test_an_agent_enrols_and_is_told_its_tokens_once(front: Proxy) -> None:
    name = fresh()
    said = await front.register(name, "http://127.0.0.1:9/", boot_id="b1", max_concurrent_tasks=2)
    assert said["incarnation"] == 1
    assert said["delivery_token"] == hmac.new(SECRET.encode(), name.encode(), hashlib.sha256).hexdigest()
    again = await front.register(name, "http://127.0.0.1:10/", boot_id="b1", token=said["auth_token"])
    assert "auth_token" not in again
    assert again["incarnation"] == 1
    rotated = await front.register(name, "http://127.0.0.1:10/", boot_id="b1")
    assert rotated["auth_token"] != said["auth_token"]
    assert (await front.beat(name, said["auth_token"])).status == 401
    assert (await front.beat(name, rotated["auth_token"])).json() == {"status": "ok", "directives": []}


async def test_no_token_is_stored(front: Proxy) -> None:
    name = fresh()
    said = await front.register(name, "http://127.0.0.1:9/")
    dump = str(await front.service.pool.fetch("SELECT w::text AS row FROM workspaces w"))
    dump += str(await front.service.pool.fetch("SELECT convert_from(fact, 'UTF8') FROM outbox"))
    for secret in (said["auth_token"], said["delivery_token"], ADMIN, SECRET):
        assert secret not in dump


async def test_a_new_boot_id_is_a_new_life_and_an_old_process_changes_nothing(front: Proxy) -> None:
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/", boot_id="b1"))["auth_token"]
    assert (await front.register(name, "http://127.0.0.1:9/", boot_id="b2", token=token))["incarnation"] == 2
    assert (await front.beat(name, token, boot_id="b3")).status == 200
    assert incarnation(front, name) == 3
    stale = await front.beat(name, token, boot_id="b1")
    assert (stale.status, stale.json()["code"]) == (409, "process_replaced")
    late = await front.call("POST", "/registry/register", {"id": name, "boot_id": "b2"}, token=token)
    assert late.status == 409
    assert incarnation(front, name) == 3
    beats = [front.beat(name, token, boot_id="b4") for _ in range(8)]
    assert {reply.status for reply in await asyncio.gather(*beats)} == {200}
    assert incarnation(front, name) == 4


async def test_a_process_that_beats_and_never_registered_does_not_look_well(front: Proxy) -> None:
    """A-L-11: its registration is refused, its beats pass; what is sent to it goes to the url of the one before it."""
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/", boot_id="b1"))["auth_token"]
    assert (await front.beat(name, token, boot_id="b1")).status == 200
    assert (await front.call("GET", f"/workspaces/{name}")).json()["status_reason"] == "it can take a message"
    wrong = await front.call("POST", "/registry/register", {"id": name, "boot_id": "b2"}, token="a rotated one")
    assert wrong.status == 401
    before = await _unregistered(front)
    for _ in range(2):
        assert (await front.beat(name, token, boot_id="b2")).status == 200
    shown = (await front.call("GET", f"/workspaces/{name}")).json()
    assert (shown["status"], "has not registered" in shown["status_reason"]) == ("online", True)
    assert await _unregistered(front) == before + 2
    await front.call("POST", "/registry/register", {"id": name, "boot_id": "b2"}, token=token)
    assert (await front.beat(name, token, boot_id="b2")).status == 200
    assert (await front.call("GET", f"/workspaces/{name}")).json()["status_reason"] == "it can take a message"
    assert await _unregistered(front) == before + 2


async def _unregistered(front: Proxy) -> float:
    text = (await front.call("GET", "/metrics", token=None)).body.decode()
    line = next(each for each in text.splitlines() if each.startswith("bide_proxy_unregistered_heartbeats_total "))
    return float(line.split()[1])


def incarnation(front: Proxy, name: str) -> int:
    found = front.copies.registry.find(name)
    assert found is not None
    return found.incarnation


async def test_a_beat_that_was_overtaken_says_nothing(front: Proxy) -> None:
    """Its client gave up on it, sampled anew and was heard: what came in later would hold the workspace busy."""
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/"))["auth_token"]
    use = front.copies.uses.of(name)
    assert (await front.beat(name, token, 0, boot_id="b1", uptime_seconds=100.1)).status == 200
    late = await front.beat(name, token, 1, boot_id="b1", uptime_seconds=100.0)
    assert (late.status, late.json()["code"]) == (503, "beat_overtaken")
    assert use.in_use(time.time()) == 0
    for uptime_s, active in [(100.1, 1), (100.2, 0)]:
        assert (await front.beat(name, token, active, boot_id="b1", uptime_seconds=uptime_s)).status == 200
        assert use.in_use(time.time()) == active, "said twice, or sampled later: it counts"
    assert (await front.beat(name, token, 1, boot_id="b2", uptime_seconds=0.1)).status == 200, "another life"
    assert use.in_use(time.time()) == 1


async def test_the_age_of_a_beat_counts_from_its_arrival(front: Proxy) -> None:
    """The registry was slow to say who it is: what ended meanwhile is still in the agent's sample."""
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/"))["auth_token"]
    async with front.service.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM workspaces WHERE workspace_id = $1 FOR UPDATE", name)
        beat = asyncio.create_task(front.beat(name, token, 1, boot_id="b1"))
        waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = current_user)"

        async def is_held_up() -> bool:
            return bool(await connection.fetchval(waits))

        await until(is_held_up)
        held_up_at = time.time()
    assert (await beat).status == 200
    said = front.copies.uses.of(name).beat
    assert said is not None
    assert said.at < held_up_at


async def test_without_boot_ids_an_uptime_that_goes_back_is_a_new_life(front: Proxy) -> None:
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/"))["auth_token"]
    for uptime_s, expected in [(1000, 1), (1001, 1), (1000.5, 1), (2, 2), (3, 2)]:
        assert (await front.beat(name, token, uptime_seconds=uptime_s)).status == 200
        assert incarnation(front, name) == expected


async def test_the_registry_is_told_to_everyone_by_the_outbox(front: Proxy, stack: Stack) -> None:
    told: asyncio.Queue[object] = asyncio.Queue()

    async def hear(facts: Sequence[object]) -> None:
        for fact in facts:
            told.put_nowait(fact)

    async with replica(stack, "proxy") as other:
        for kind in (WorkspaceRegistered, WorkspaceChanged, WorkspaceRemoved, WorkspaceHeartbeat):
            other.reader.hear(kind, hear)
        await other.reader.start()
        name = fresh()
        token = (await front.register(name, "http://127.0.0.1:9/", boot_id="b1"))["auth_token"]
        first = await asyncio.wait_for(told.get(), 10)
        assert isinstance(first, WorkspaceRegistered)
        assert (first.workspace_id, first.rev, first.url) == (name, 1, "http://127.0.0.1:9/")
        await front.beat(name, token, 1, max_concurrent_tasks=3, progress=0.5)
        beat = await asyncio.wait_for(told.get(), 10)
        assert isinstance(beat, WorkspaceHeartbeat)
        assert (beat.active_tasks, beat.max_concurrent_tasks, beat.incarnation, beat.progress) == (1, 3, 1, 0.5)
        await front.call("PATCH", f"/workspaces/{name}", {"paused": True, "session_ceiling_s": 600})
        changed = await asyncio.wait_for(told.get(), 10)
        assert isinstance(changed, WorkspaceChanged)
        assert (changed.rev, changed.paused, changed.settings) == (2, True, {"session_ceiling_s": 600})
        await front.call("POST", f"/workspaces/{name}/remove")
        assert isinstance(await asyncio.wait_for(told.get(), 10), WorkspaceRemoved)


async def test_every_replica_knows_what_one_was_told(stack: Stack) -> None:
    """Tokens and cards too, which no fact carries."""
    await empty(stack)
    async with AsyncExitStack() as exits:
        one, two = [await exits.enter_async_context(proxy(stack)) for _ in range(2)]
        name = fresh()
        token = (await one.register(name, "http://127.0.0.1:9/", agent_card={"name": "a"}))["auth_token"]
        assert (await two.call("GET", f"/workspaces/{name}")).status == 200, "at once: an unknown id is looked up"
        name = fresh()
        token = (await one.register(name, "http://127.0.0.1:9/", agent_card={"name": "a"}))["auth_token"]
        assert (await two.beat(name, token)).status == 200, "at once: an unknown token is looked up"
        await one.call("PATCH", f"/workspaces/{name}", {"queue_depth_max": 7})

        async def heard() -> bool:
            found = two.copies.registry.find(name)
            return found is not None and found.settings.get("queue_depth_max") == 7

        await until(heard)
        assert (await two.call("GET", f"/workspaces/{name}/.well-known/agent.json")).json()["name"] == "a"

        async def beaten() -> bool:
            return one.copies.uses.of(name).beat is not None

        await until(beaten)


async def test_a_removed_workspace_is_gone_for_good(front: Proxy) -> None:
    name = fresh()
    token = (await front.register(name, "http://127.0.0.1:9/"))["auth_token"]
    assert (await front.call("POST", f"/workspaces/{name}/remove")).status == 200
    assert (await front.call("POST", f"/workspaces/{name}/remove")).status == 200
    assert (await front.beat(name, token)).status == 401
    again = await front.call("POST", "/registry/register", {"id": name, "url": "http://127.0.0.1:9/"})
    assert (again.status, again.json()["code"]) == (410, "workspace_removed")
    assert (await front.say(name)).status == 410
    assert (await front.call("GET", f"/workspaces/{name}")).status == 410


@pytest.mark.parametrize("prefix", ["system:", "webhook:", "channel:", "test:", "System:"])
async def test_reserved_names_are_refused_on_every_route(front: Proxy, prefix: str) -> None:
    """A-P-06, also with the admin token, and also without any."""
    name = fresh()
    await front.register(name)
    routes = [
        ("POST", "/registry/register", {"id": fresh()}),
        ("POST", "/registry/heartbeat", {"workspace_id": name, "active_tasks": 0}),
        ("POST", "/registry/update-card", {"workspace_id": name, "agent_card": {}}),
        ("POST", f"/workspaces/{name}/a2a", {"method": "message/send", "params": {"message": {}}}),
        ("GET", f"/workspaces/{name}/.well-known/agent-card.json", None),
        ("GET", "/queue/01890000-0000-7000-8000-000000000001", None),
        ("DELETE", "/queue/01890000-0000-7000-8000-000000000001", None),
        ("GET", f"/workspaces/{name}/queue", None),
        ("GET", "/workspaces", None),
        ("GET", f"/workspaces/{name}", None),
        ("PATCH", f"/workspaces/{name}", {}),
        ("POST", f"/workspaces/{name}/remove", None),
        ("POST", f"/workspaces/{name}/pause", None),
        ("POST", f"/workspaces/{name}/resume", None),
        ("POST", f"/workspaces/{name}/queue/cancel", {}),
        ("POST", "/queue/01890000-0000-7000-8000-000000000001/retry", None),
        ("POST", "/queue/01890000-0000-7000-8000-000000000001/promote", None),
        ("GET", "/dead-letters", None),
        ("POST", f"/dead-letters/{'ab' * 32}/replay", None),
    ]
    for method, path, body in routes:
        for token in (ADMIN, None):
            reply = await front.call(method, path, body, token=token, x_workspace_id=f"{prefix}x")
            assert reply.status == 403, (method, path, reply.body)
            assert b"caller_reserved" in reply.body
        assert (await front.call(method, path, body, token=None)).status == 401
        assert (await front.call(method, path, body, token="guess")).status == 401


async def test_a_token_speaks_only_for_whom_it_is_bound_to(front: Proxy) -> None:
    one, two = fresh(), fresh()
    token = (await front.register(one, "http://127.0.0.1:9/"))["auth_token"]
    await front.register(two, "http://127.0.0.1:9/")
    assert (await front.beat(two, token)).status == 403
    assert (await front.call("POST", "/registry/register", {"id": two}, token=token)).status == 403
    body = {"method": "message/send", "params": {"message": {"parts": []}}}
    path = f"/workspaces/{two}/a2a"
    assert (await front.call("POST", path, body, token=token, x_workspace_id="somebody")).status == 403
    assert (await front.call("POST", path, body, token=token, x_workspace_id=one)).status in {202, 503}
    assert (await front.call("GET", "/workspaces", token=token)).status == 403
    assert (await front.call("GET", f"/workspaces/{two}", token=token)).status == 404
    operator = await key(front, "ops", "operator")
    assert (await front.call("GET", f"/workspaces/{two}", token=operator)).status == 200
    user = await key(front, "user:42")
    assert (await front.call("GET", f"/workspaces/{two}", token=user)).status == 404
    critical = {**body, "params": {"message": {"metadata": {"urn:bide:queue:1": {"priority": "CRITICAL"}}}}}
    refused = await front.call("POST", path, critical, token=user)
    assert (refused.status, refused.json()["error"]["data"]["code"]) == (403, "priority_not_allowed")


async def test_who_enrolled_owns(front: Proxy) -> None:
    name = fresh()
    operator, user = await key(front, "team-a", "operator"), await key(front, "team-b")
    await front.register(name, token=operator)
    await front.service.pool.execute("UPDATE callers SET rights = '{}' WHERE caller_id = 'team-a'")
    async with asyncio.timeout(30):
        owner = await key(front, "team-a")
    assert (await front.call("PATCH", f"/workspaces/{name}", {"hold_max_s": 10}, token=owner)).status == 200
    assert (await front.call("PATCH", f"/workspaces/{name}", {"hold_max_s": 10}, token=user)).status == 404
    for mine in ({"agent_authorization": "Bearer x"}, {"runtime": {"driver": "docker"}}):
        refused = await front.call("PATCH", f"/workspaces/{name}", mine, token=owner)
        assert (refused.status, refused.json()["code"]) == (403, "operator_only")


@pytest.mark.parametrize(
    ("patch", "status"),
    [
        ({"queue_depth_max": 1}, 200),
        ({"queue_depth_max": 0}, 422),
        ({"queue_depth_max": True}, 422),
        ({"queue_depth_max": "5"}, 422),
        ({"session_ceiling_s": 0}, 200),
        ({"session_ceiling_s": -1}, 422),
        ({"admission": "queue_first"}, 200),
        ({"admission": "first"}, 422),
        ({"delivery": "at_most_once"}, 200),
        ({"heartbeat": "none"}, 200),
        ({"no_such": 1}, 422),
        ({"paused": True, "pause_note": "moving house"}, 200),
        ({"desired": "stopped"}, 200),
        ({"runtime": {"driver": "process"}}, 200),
        ({"agent_authorization": "Bearer x\r\ny"}, 422),
        ([], 422),
        (b"{", 400),
        ({}, 200),
    ],
)
async def test_settings_are_held_to_their_ranges(front: Proxy, patch: object, status: int) -> None:
    name = fresh()
    await front.register(name)
    reply = await front.call("PATCH", f"/workspaces/{name}", patch)
    assert reply.status == status, reply.body
    if status >= 400:
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json()["detail"]


async def test_a_secret_that_was_written_is_never_read(front: Proxy) -> None:
    name = fresh()
    await front.register(name)
    reply = await front.call("PATCH", f"/workspaces/{name}", {"agent_authorization": "Bearer hush"})
    assert b"hush" not in reply.body
    assert reply.json()["has_agent_authorization"] is True
    assert b"hush" not in (await front.call("GET", f"/workspaces/{name}")).body
    audit = await front.service.pool.fetch("SELECT action, detail FROM audit ORDER BY id")
    assert [row["action"] for row in audit] == ["register", "patch"]
    assert "hush" not in str(audit)


async def test_null_takes_a_setting_back(front: Proxy) -> None:
    name = fresh()
    await front.register(name)
    path = f"/workspaces/{name}"
    await front.call("PATCH", path, {"queue_depth_max": 5, "hold_max_s": 1})
    reply = await front.call("PATCH", path, {"queue_depth_max": None})
    assert reply.json()["settings"] == {"hold_max_s": 1}


async def test_the_card_is_served_at_our_origin_with_a_tag(front: Proxy) -> None:
    name = fresh()
    card = {"name": "a", "url": "http://127.0.0.1:9/", "version": "1", "skills": []}
    token = (await front.register(name, "http://127.0.0.1:9/", agent_card=card))["auth_token"]
    path = f"/workspaces/{name}/.well-known/agent-card.json"
    first = await front.call("GET", path, token=token)
    assert first.json()["url"] == f"{front.url}/workspaces/{name}/a2a"
    same = await front.call("GET", path, if_none_match=first.headers["etag"])
    assert (same.status, same.body) == (304, b"")
    body = {"workspace_id": name, "agent_card": {**card, "name": "b"}}
    assert (await front.call("POST", "/registry/update-card", body, token=token)).status == 200
    assert (await front.call("GET", path, if_none_match=first.headers["etag"])).json()["name"] == "b"
    bare = fresh()
    await front.register(bare)
    assert (await front.call("GET", f"/workspaces/{bare}/.well-known/agent.json")).status == 404


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"id": "-"}, 422, "another id"),
        ({"id": "a b"}, 422, "id"),
        ({"id": "x" * 129}, 422, "id"),
        ({"url": "http://127.0.0.1:9/"}, 422, "id"),
        ({"id": "w", "url": "ftp://x/"}, 422, "http"),
        ({"id": "w", "url": "http://169.254.169.254/"}, 422, "metadata"),
        ({"id": "w", "url": "http://10.1.2.3/"}, 422, "private"),
        ({"id": "w", "max_concurrent_tasks": 0}, 422, "max_concurrent_tasks"),
        (b"\xff", 400, "JSON"),
        (b"x" * ((1 << 20) + 1), 413, "bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_registration_is_checked(front: Proxy, body: object, status: int, word: str) -> None:
    reply = await front.call("POST", "/registry/register", body)
    assert reply.status == status
    assert word in reply.json()["detail"]


async def test_many_replicas_of_one_registration_are_one_row(front: Proxy) -> None:
    name = fresh()
    replies = await asyncio.gather(*(front.register(name, boot_id=f"b{n % 2}") for n in range(1)))
    tokens = [reply["auth_token"] for reply in replies]
    results = await asyncio.gather(
        *(front.call("POST", "/registry/register", {"id": name, "boot_id": "b9"}, token=tokens[0]) for _ in range(10))
    )
    assert {reply.status for reply in results} == {200}
    assert incarnation(front, name) == 2


async def test_workspaces_are_shown_page_by_page(front: Proxy) -> None:
    names = sorted(fresh() for _ in range(5))
    for name in names:
        await front.register(name)
    first = (await front.call("GET", "/workspaces?limit=3")).json()
    rest = (await front.call("GET", f"/workspaces?limit=3&cursor={first['next_cursor']}")).json()
    assert [each["workspace_id"] for each in first["items"] + rest["items"]] == names
    assert rest["next_cursor"] is None
    shown = first["items"][0]
    assert (shown["status"], shown["in_use"], shown["queue"]["depth"]) == ("offline", 0, 0)


async def test_what_is_not_there_says_what_is(front: Proxy) -> None:
    missing = await front.call("GET", "/nothing")
    assert (missing.status, missing.headers["content-type"]) == (404, "application/problem+json")
    assert "/openapi.json" in missing.json()["detail"]
    assert (await front.call("PUT", "/workspaces")).status == 405
    assert (await front.call("GET", "/workspaces/x/a2a")).status == 405
    assert (await front.call("GET", "/openapi.json", token=None)).json()["openapi"] == "3.1.0"
    assert (await front.call("GET", "/docs", token=None)).headers["content-type"] == "text/html; charset=utf-8"
    assert (await front.call("GET", "/livez", token=None)).status == 200
    assert b"bide_proxy_forwards_total" in (await front.call("GET", "/metrics", token=None)).body
