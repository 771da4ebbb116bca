"""What operators do to messages and workspaces through the proxy: who may, what the queue is asked, what is noted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from services.proxy.api.identity import digest
from services.proxy.api.openapi import DESCRIPTION
from shared.facts import FLEET, Priority, QueueQuery
from tests.conftest import Stack
from tests.integration.proxy_kit import Proxy, Reply, empty, fresh, proxy
from tests.integration.stand_in_kit import UNKNOWN, Said, StandIn, item, stand_in

OLD = UUID("01890000-0000-7000-8000-000000000001")
LETTER = "ab" * 32


@dataclass(frozen=True, slots=True)
class Ring:
    """A proxy, what stands in for the queue, and one item of the caller `lead` in a workspace."""

    front: Proxy
    queue: StandIn
    name: str
    tokens: dict[str, str]

    async def post(self, path: str, body: Any = None, *, by: str = "ops") -> Reply:
        return await self.front.call("POST", path, body, token=self.tokens[by])

    async def recorded(self) -> list[tuple[str, str, str, dict[str, Any]]]:
        """Who did what, where; in order, but for the registration."""
        query = "SELECT caller_id, action, workspace_id, detail FROM audit WHERE action <> 'register' ORDER BY id"
        rows = await self.front.service.pool.fetch(query)
        return [(row["caller_id"], row["action"], row["workspace_id"], json.loads(row["detail"])) for row in rows]


@pytest.fixture
async def ring(stack: Stack, request: pytest.FixtureRequest) -> AsyncIterator[Ring]:
    """`param`: how long a service that is asked may take to answer."""
    await empty(stack)
    async with stand_in(stack) as queue, proxy(stack, query_timeout_s=getattr(request, "param", 20.0)) as front:
        await front.ready()
        name = fresh()
        tokens = {
            "lead": await key(front, "lead"),
            "stranger": await key(front, "stranger"),
            "ops": await key(front, "ops", "operator"),
        }
        await front.register(name, token=tokens["ops"])
        queue.says["item"] = lambda asked: known(asked, name)
        yield Ring(front, queue, name, tokens)


def known(asked: QueueQuery, name: str) -> Said:
    mine = asked.caller_hash in (None, digest("lead"))
    return (200, item(OLD, name, status="failed")) if mine and asked.queue_id == OLD else UNKNOWN


async def key(front: Proxy, caller_id: str, *rights: str) -> str:
    token = fresh("key")
    query = "INSERT INTO callers (key_hash, caller_id, rights) VALUES (sha256($1::bytea), $2, $3)"
    await front.service.pool.execute(query, token.encode(), caller_id, list(rights))
    return token


# ── one item ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_message_is_sent_again_once_however_often_it_is_said(ring: Ring) -> None:
    new = uuid7()
    said = iter([201, 200])
    ring.queue.says["retry"] = lambda _: (next(said), item(new, ring.name, retry_of=str(OLD)))
    for status, body in ((201, {"note": "the disk was full"}), (200, None)):
        reply = await ring.post(f"/queue/{OLD}/retry", body, by="lead")
        assert (reply.status, reply.json()["queue_id"]) == (status, str(new)), reply.body
        assert reply.json()["retry_of"] == str(OLD)
        assert reply.headers["location"] == f"/queue/{new}"
    asked = [query for query in ring.queue.asked if query.verb == "retry"]
    assert {(query.queue_id, query.caller_hash, query.workspace_id) for query in asked} == {
        (OLD, digest("lead"), ring.name)
    }
    assert await ring.recorded() == [
        ("lead", "retry", ring.name, {"queue_id": str(OLD), "note": "the disk was full"}),
        ("lead", "retry", ring.name, {"queue_id": str(OLD), "note": None}),
    ]


@pytest.mark.parametrize("verb", ["retry", "cancel"])
async def test_another_s_item_is_not_there_and_nothing_is_asked_of_it(ring: Ring, verb: str) -> None:
    if verb == "retry":
        reply = await ring.post(f"/queue/{OLD}/retry", by="stranger")
    else:
        reply = await ring.front.call("DELETE", f"/queue/{OLD}", token=ring.tokens["stranger"])
    assert (reply.status, reply.json()["code"]) == (404, "item_unknown")
    assert set(ring.queue.verbs()) == {"item"}
    assert await ring.recorded() == []
    nonsense = await ring.post("/queue/nonsense/retry", by="lead")
    assert (nonsense.status, nonsense.json()["code"]) == (404, "item_unknown")


async def test_what_the_queue_refuses_is_said_with_its_own_words(ring: Ring) -> None:
    """B-17: a verb is never refused in silence."""
    ring.queue.says["retry"] = lambda _: (409, {"code": "not_ended", "detail": "It has not ended. Wait, or cancel it."})
    reply = await ring.post(f"/queue/{OLD}/retry", by="lead")
    assert (reply.status, reply.headers["content-type"]) == (409, "application/problem+json")
    assert (reply.json()["code"], reply.json()["detail"]) == ("not_ended", "It has not ended. Wait, or cancel it.")


async def test_only_an_operator_puts_a_message_before_those_of_others(ring: Ring) -> None:
    ring.queue.says["promote"] = lambda _: (200, item(OLD, ring.name, position=1))
    refused = await ring.post(f"/queue/{OLD}/promote", by="lead")
    assert (refused.status, refused.json()["code"]) == (403, "operator_only")
    assert ring.queue.asked == []
    reply = await ring.post(f"/queue/{OLD}/promote", {"note": "the demo waits"})
    assert (reply.status, reply.json()["position"]) == (200, 1)
    assert ring.queue.asked[-1].caller_hash is None
    assert await ring.recorded() == [
        ("ops", "promote", ring.name, {"queue_id": str(OLD), "note": "the demo waits"}),
    ]


async def test_a_cancel_is_recorded_and_says_whether_its_agent_has_it(ring: Ring) -> None:
    said = iter([(200, "canceled"), (202, "dispatched")])

    def cancel(_asked: QueueQuery) -> Said:
        status, state = next(said)
        return status, item(OLD, ring.name, status=state)

    ring.queue.says["cancel"] = cancel
    for status, state in ((200, "canceled"), (202, "dispatched")):
        reply = await ring.front.call("DELETE", f"/queue/{OLD}", token=ring.tokens["lead"])
        assert (reply.status, reply.json()["status"]) == (status, state)
    assert [row[:2] for row in await ring.recorded()] == [("lead", "cancel")] * 2


@pytest.mark.parametrize("way", ["DELETE", "retry", "promote", "tasks/cancel"])
async def test_a_verb_follows_an_id_that_turned_out_to_be_a_repeat(ring: Ring, way: str) -> None:
    """GET shows the first one's item under it; "it has ended" would be untrue of a message that still waits."""
    first = uuid7()
    ring.queue.says["item"] = lambda asked: (
        (200, item(OLD, ring.name, status="superseded", superseded_by=str(first)))
        if asked.queue_id == OLD
        else (200, item(first, ring.name))
    )
    for verb in ("cancel", "retry", "promote"):
        ring.queue.says[verb] = lambda _: (200, item(first, ring.name, status="canceled"))
    if way == "DELETE":
        reply = await ring.front.call("DELETE", f"/queue/{OLD}", token=ring.tokens["lead"])
    elif way == "tasks/cancel":
        call = {"jsonrpc": "2.0", "id": 1, "method": way, "params": {"id": str(OLD)}}
        reply = await ring.post(f"/workspaces/{ring.name}/a2a", call, by="lead")
        assert reply.json()["result"]["id"] == str(OLD), "he goes on with the id that he was told"
    else:
        reply = await ring.post(f"/queue/{OLD}/{way}")
    assert reply.status == 200, reply.body
    assert ring.queue.asked[-1].queue_id == first


async def test_an_item_that_was_promised_a_moment_ago_is_not_denied(ring: Ring) -> None:
    """A-Q-12: the queue has not read it, so nothing can be done to it yet; that is no 404."""
    ring.queue.on_kept = lambda _: None
    kept = (await ring.front.say(ring.name, caller="lead")).json()["queue_id"]
    for verb in ("item", "cancel"):
        ring.queue.says[verb] = lambda _: UNKNOWN
    reply = await ring.front.call("DELETE", f"/queue/{kept}", token=ring.tokens["lead"])
    assert (reply.status, reply.json()["code"]) == (503, "not_yet_visible")
    assert int(reply.headers["retry-after"]) >= 1


# ── a whole line ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_stale_is_counted_first_and_then_canceled(ring: Ring) -> None:
    """Drop-stale: the same filter, once to look and once to do it; only what was done is recorded."""
    ring.queue.says["cancel_many"] = lambda asked: (
        (200, {"matched": 12, "canceled": 0, "remaining": 12})
        if asked.count_only
        else (200, {"matched": 12, "canceled": 12, "remaining": 0})
    )
    path = f"/workspaces/{ring.name}/queue/cancel"
    stale = {"priority": "INFO", "caller": "lead", "older_than_s": 7200}
    counted = await ring.post(path, {**stale, "count_only": True})
    assert counted.json() == {"matched": 12, "canceled": 0, "remaining": 12}
    assert await ring.recorded() == []
    done = await ring.post(path, {**stale, "note": "after the incident"})
    assert (done.status, done.json()) == (200, {"matched": 12, "canceled": 12, "remaining": 0})
    look, do = ring.queue.asked
    for asked in (look, do):
        assert (asked.verb, asked.workspace_id, asked.priority) == ("cancel_many", ring.name, Priority.INFO)
        assert (asked.caller_hash, asked.older_than_s) == (digest("lead"), 7200)
    assert (look.count_only, do.count_only) == (True, False)
    assert await ring.recorded() == [
        ("ops", "cancel_many", ring.name, {**stale, "note": "after the incident"}),
    ]


async def test_a_line_is_emptied_only_by_an_operator_who_means_it(ring: Ring) -> None:
    path = f"/workspaces/{ring.name}/queue/cancel"
    assert (await ring.post(path, {}, by="lead")).status == 403
    assert (await ring.post("/workspaces/nowhere/queue/cancel", {})).json()["code"] == "workspace_unknown"
    assert (await ring.post(path)).json()["code"] == "not_json", "a filter that was lost is no filter"
    assert (await ring.post(path, {"older_then_s": 60})).status == 422
    assert ring.queue.asked == []
    assert await ring.recorded() == []


async def test_the_line_is_listed_by_priority(ring: Ring) -> None:
    ring.queue.says["list"] = lambda _: (200, {"items": [], "next_cursor": None})
    assert (await ring.front.call("GET", f"/workspaces/{ring.name}/queue?priority=CRITICAL")).status == 200
    assert ring.queue.asked[-1].priority is Priority.CRITICAL
    refused = await ring.front.call("GET", f"/workspaces/{ring.name}/queue?priority=urgent")
    assert (refused.status, refused.json()["code"]) == (400, "bad_value")


# ── a workspace ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ring", [0.2], indirect=True, ids=["liveness is away"])
async def test_a_workspace_is_paused_and_goes_on_with_who_and_why_in_the_record(ring: Ring) -> None:
    path = f"/workspaces/{ring.name}"
    paused = await ring.post(f"{path}/pause", {"note": "moving house"})
    assert (paused.status, paused.json()["paused"], paused.json()["pause_note"]) == (200, True, "moving house")
    again = await ring.post(f"{path}/pause")
    assert (again.status, again.json()["pause_note"]) == (200, "moving house"), "it was not taken back"
    kept = await ring.front.say(ring.name)
    assert kept.json()["result"]["metadata"]["urn:bide:queue:1"]["reason"] in {"paused", "backlog"}
    for _ in range(2):
        resumed = await ring.post(f"{path}/resume", {"note": "moved"})
        assert (resumed.status, resumed.json()["paused"], resumed.json()["pause_note"]) == (200, False, None)
    assert (await ring.post(f"{path}/pause")).json()["pause_note"] is None, "an old note does not come back"
    assert [row[1:] for row in await ring.recorded()] == [
        ("pause", ring.name, {"note": "moving house"}),
        ("pause", ring.name, {"note": None}),
        ("resume", ring.name, {"note": "moved"}),
        ("resume", ring.name, {"note": "moved"}),
        ("pause", ring.name, {"note": None}),
    ]


async def test_a_pause_is_its_owner_s_and_an_operator_s(ring: Ring) -> None:
    owner = await key(ring.front, "ops")
    for verb in ("pause", "resume"):
        path = f"/workspaces/{ring.name}/{verb}"
        assert (await ring.front.call("POST", path, token=owner)).status == 200
        assert (await ring.post(path, by="stranger")).status == 404
        assert (await ring.post(path, {"reason": "x"})).status == 422


async def test_a_workspace_shows_its_line(ring: Ring) -> None:
    """A-Q-24: how many, of which kind, since when, and how long each takes."""
    since = "2026-01-01T00:00:00Z"
    await ring.queue.tell(
        ring.front, ring.name, 3, waiting_by_priority={"CRITICAL": 1, "TASK": 2}, oldest_at=since, turn_s=42.5
    )
    line = (await ring.front.call("GET", f"/workspaces/{ring.name}")).json()["queue"]
    assert line.pop("oldest_age_s") > 0
    assert line == {"depth": 3, "by_priority": {"CRITICAL": 1, "TASK": 2, "INFO": 0}, "turn_s": 42.5}
    await ring.queue.tell(ring.front, ring.name, 0)
    line = (await ring.front.call("GET", f"/workspaces/{ring.name}")).json()["queue"]
    assert line == {
        "depth": 0, "by_priority": {"CRITICAL": 0, "TASK": 0, "INFO": 0}, "oldest_age_s": None, "turn_s": None,
    }  # fmt: skip


# ── the bus ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_set_aside_is_listed_and_published_again(ring: Ring) -> None:
    page = {"items": [{"digest": LETTER}], "next_cursor": "c2"}
    ring.queue.says["dead_letters"] = lambda _: (200, page)
    ring.queue.says["replay"] = lambda _: (200, {"digest": LETTER, "facts": 1})
    listed = await ring.front.call("GET", "/dead-letters?limit=1&cursor=c1", token=ring.tokens["ops"])
    assert listed.json() == page
    assert (ring.queue.asked[-1].limit, ring.queue.asked[-1].cursor) == (1, "c1")
    reply = await ring.post(f"/dead-letters/{LETTER.upper()}/replay", {"note": "mended"})
    assert (reply.status, reply.json()["facts"]) == (200, 1)
    assert ring.queue.asked[-1].dead_letter == bytes.fromhex(LETTER)
    assert await ring.recorded() == [("ops", "replay", FLEET, {"dead_letter": LETTER, "note": "mended"})]


async def test_dead_letters_are_for_operators_and_known_by_their_digest(ring: Ring) -> None:
    assert (await ring.front.call("GET", "/dead-letters", token=ring.tokens["lead"])).status == 403
    assert (await ring.post(f"/dead-letters/{LETTER}/replay", by="lead")).status == 403
    for letter in ("ab", "g" * 64, LETTER + "ab"):
        reply = await ring.post(f"/dead-letters/{letter}/replay")
        assert (reply.status, reply.json()["code"]) == (404, "dead_letter_unknown")
    assert ring.queue.asked == []
    ring.queue.says["replay"] = lambda _: (404, {"code": "none", "detail": "There is none."})
    reply = await ring.post(f"/dead-letters/{LETTER}/replay")
    assert (reply.status, reply.json()["code"]) == (404, "dead_letter_unknown")


async def test_a_verb_that_nobody_answers_may_have_been_done_and_is_in_the_record(stack: Stack) -> None:
    await empty(stack)
    async with stand_in(stack) as queue, proxy(stack, query_timeout_s=1.0) as front:
        await front.ready()
        name = fresh()
        await front.register(name)
        queue.says["item"] = lambda asked: known(asked, name)
        for verb in ("promote", "cancel_many", "replay"):
            queue.says[verb] = lambda _: None
        for path, body in (
            (f"/queue/{OLD}/promote", None),
            (f"/workspaces/{name}/queue/cancel", {"older_than_s": 1}),
            (f"/dead-letters/{LETTER}/replay", None),
        ):
            reply = await front.call("POST", path, body)
            assert (reply.status, reply.json()["code"]) == (503, "queue_away")
            assert int(reply.headers["retry-after"]) >= 1
        actions = await front.service.pool.fetch("SELECT action FROM audit ORDER BY id")
        assert [row["action"] for row in actions] == ["register", "promote", "cancel_many", "replay"]


async def test_every_route_is_described_and_what_is_described_is_a_route(ring: Ring) -> None:
    described = {
        (method.upper(), path.replace("{workspace_id}", "w").replace("{queue_id}", "q").replace("{letter}", "l"))
        for path, methods in DESCRIPTION["paths"].items()
        for method in methods
    }
    hot = {("POST", "/workspaces/w/a2a"), ("POST", "/registry/heartbeat")}
    undescribed = {"openapi", "docs"}
    routes = ring.front.door._routes
    for method, path in described - hot:
        assert any(verb == method and pattern.fullmatch(path) for pattern, verb, _, _ in routes), (method, path)
    for pattern, verb, name, _ in routes:
        if name not in undescribed:
            assert any(verb == method and pattern.fullmatch(path) for method, path in described), pattern.pattern
