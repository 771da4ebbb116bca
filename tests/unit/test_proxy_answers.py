"""The shapes of answers: a promise that nobody takes for a reply, in both dialects, and ids that stay the caller's."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from services.proxy.api.answers import (
    MESSAGE,
    Dialect,
    Kept,
    agents_ids,
    followed,
    kept_body,
    kept_headers,
    task_of_item,
    with_request_id,
    with_request_id_in_events,
)
from services.proxy.api.card import rewritten
from services.proxy.api.identity import digest, display
from services.proxy.api.openapi import DESCRIPTION, DOCS
from services.proxy.api.owning import UNCHECKED
from services.proxy.api.questions import AWAY, NOBODYS, NOT_YET
from services.proxy.api.tasks import NO_AGENT, NOT_CANCELABLE
from services.proxy.api.wire import own_id, problem, rpc_error
from services.proxy.decide import Refuse
from shared.results import EXTENSION, Kind, read_result

QUEUE_ID = UUID("01890000-0000-7000-8000-000000000001")
KEPT = Kept(QUEUE_ID, "w", depth=3, position=3, priority="TASK", reason="at_capacity", context_id="c-1")


def test_the_202_body_is_a_json_rpc_response_with_the_four_keys_of_the_original() -> None:
    """A-P-09, A-P-11: one envelope, parsed by an SDK as a Task that waits."""
    body = json.loads(kept_body(KEPT, Dialect(modern=False, plain_keys=True), "1"))
    stamp = body["result"]["status"].pop("timestamp")
    assert stamp.endswith("Z")
    assert body == {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {
            "kind": "task",
            "id": str(QUEUE_ID),
            "contextId": "c-1",
            "status": {"state": "submitted"},
            "metadata": {
                EXTENSION: {
                    "queueId": str(QUEUE_ID), "position": 3, "depth": 3, "priority": "TASK", "reason": "at_capacity",
                }
            },
        },
        "queued": True,
        "queue_id": str(QUEUE_ID),
        "queue_depth": 3,
        "message": MESSAGE,
    }  # fmt: skip


def test_the_1_0_body_has_no_other_keys_and_shouts() -> None:
    body = json.loads(kept_body(KEPT, Dialect(modern=True, plain_keys=False), '"a"'))
    assert body.keys() == {"jsonrpc", "id", "result"}
    task = body["result"]["task"]
    assert task["status"]["state"] == "TASK_STATE_SUBMITTED"
    assert "kind" not in task
    assert "message" not in task["status"]


@pytest.mark.parametrize("modern", [False, True])
def test_a_promise_reads_as_a_task_that_goes_on(modern: bool) -> None:
    read = read_result(kept_body(KEPT, Dialect(modern=modern, plain_keys=not modern), "1"))
    assert (read.kind, read.state, read.task_id) == (Kind.TASK, "submitted", str(QUEUE_ID))


def test_the_headers_are_always_there() -> None:
    headers = dict(kept_headers(KEPT))
    assert headers[b"location"] == b"/queue/" + str(QUEUE_ID).encode()
    assert (headers[b"x-queue-id"], headers[b"x-queue-depth"]) == (str(QUEUE_ID).encode(), b"3")
    assert int(headers[b"retry-after"]) > 0


def item(status: str, **more: Any) -> dict[str, Any]:
    return {
        "queue_id": str(QUEUE_ID),
        "workspace_id": "w",
        "status": status,
        "priority": "TASK",
        "answer": None,
        **more,
    }


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("queued", "submitted"), ("dispatched", "working"), ("completed", "completed"), ("canceled", "canceled"),
        ("failed", "failed"), ("expired", "failed"), ("superseded", "submitted"),
    ],
)  # fmt: skip
def test_an_item_is_a_task(status: str, state: str) -> None:
    task = task_of_item(item(status, reason="r"), modern=False)
    assert (task["id"], task["status"]["state"]) == (str(QUEUE_ID), state)
    assert task["metadata"][EXTENSION]["reason"] == "r"
    modern = task_of_item(item(status), modern=True)
    assert modern["status"]["state"] == f"TASK_STATE_{state.upper()}"


def test_a_bare_message_becomes_a_completed_task_with_its_parts() -> None:
    parts = [{"kind": "text", "text": "done"}]
    answer = {"result": {"kind": "message", "messageId": "m", "parts": parts}}
    task = task_of_item(item("completed", answer=answer), modern=False)
    assert task["status"]["state"] == "completed"
    assert task["artifacts"] == [{"artifactId": "m", "parts": parts}]


def test_the_agent_s_task_comes_under_our_id_everywhere_but_in_parts() -> None:
    said = {"kind": "message", "taskId": "theirs", "parts": [{"kind": "text", "text": "taskId theirs"}]}
    theirs = {
        "kind": "task", "id": "theirs", "contextId": "ctx", "status": {"state": "input-required", "message": said},
        "history": [said, {"parts": []}],
    }  # fmt: skip
    answer = {"result": theirs}
    task = task_of_item(item("completed", answer=answer), modern=False)
    assert task["id"] == task["status"]["message"]["taskId"] == task["history"][0]["taskId"] == str(QUEUE_ID)
    assert task["history"][0]["parts"] == said["parts"]
    assert task["contextId"] == "ctx"
    assert agents_ids(item("completed", answer=answer)) == "theirs"
    assert agents_ids(item("completed", answer={"result": {"task": {"id": "t", "status": {}}}})) == "t"
    assert agents_ids(item("queued")) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"jsonrpc":"2.0","id":1,"result":{"id":5}}', '{"jsonrpc":"2.0","id":"x","result":{"id":5}}'),
        ('{ "result":{"id":1e3} , "id" : "a" }', '{ "result":{"id":1e3} , "id" : "x" }'),
        ('{"result":1}', '{"result":1}'),
        ("[]", "[]"),
        ("{", "{"),
        ("", ""),
        ("not json", "not json"),
    ],
)
def test_only_the_id_of_an_answer_is_changed(answer: str, expected: str) -> None:
    assert with_request_id(answer.encode(), '"x"') == expected.encode()


@given(st.binary(max_size=60))
def test_no_answer_of_an_agent_breaks_us(answer: bytes) -> None:
    with_request_id(answer, "1")
    with_request_id_in_events(answer, "1")


def test_the_events_of_a_recorded_stream_get_the_id_too() -> None:
    stream = b': c\n\ndata: {"id":1,"result":{}}\r\n\r\ndata:{"id":1}\n\n'
    assert with_request_id_in_events(stream, "7") == b': c\n\ndata: {"id":7,"result":{}}\n\ndata: {"id":7}\n\n'


@pytest.mark.parametrize(
    ("text", "shown"), [("lead", "lead"), ("a\0b", "a\\u0000b"), ("\ud800", "\\ud800"), ("ümläut 🙂", "ümläut 🙂")]
)
def test_any_caller_can_be_shown_and_hashed(text: str, shown: str) -> None:
    """A-Q-05, A-Q-06."""
    assert display(text) == shown
    display(text).encode()
    assert len(digest(text)) == 32


def test_ids_are_ours_only_if_they_are_uuid7_as_we_write_them() -> None:
    ours = uuid7()
    assert own_id(str(ours)) == ours
    for other in (None, "", "x", "00000000-0000-4000-8000-000000000000", f"{{{ours}}}", ours.hex):
        assert own_id(other) is None


def test_the_card_has_every_interface_at_our_origin_and_both_dialects() -> None:
    card = {
        "name": "worker", "url": "http://10.0.0.5:9000/", "preferredTransport": "GRPC", "protocolVersion": "0.2.9",
        "additionalInterfaces": [{"url": "grpc://10.0.0.5", "transport": "GRPC"}],
        "supportedInterfaces": [{"url": "http://10.0.0.5", "protocolBinding": "GRPC"}],
        "signatures": [{"protected": "x"}], "securitySchemes": {"oauth": {}},
        "capabilities": {"pushNotifications": True}, "skills": [{"id": "s"}], "x-own": 1,
    }  # fmt: skip
    served = rewritten(card, "https://bide/workspaces/w/a2a")
    assert "10.0.0.5" not in json.dumps(served)
    assert served["url"] == "https://bide/workspaces/w/a2a"
    assert {each["protocolVersion"] for each in served["supportedInterfaces"]} == {"1.0", "0.3"}
    assert {each["protocolBinding"] for each in served["supportedInterfaces"]} == {"JSONRPC"}
    assert served["capabilities"] == {"pushNotifications": True, "streaming": False}
    assert "signatures" not in served
    assert (served["skills"], served["x-own"]) == ([{"id": "s"}], 1)


def test_the_description_names_what_it_refers_to_and_the_page_loads_nothing() -> None:
    text = json.dumps(DESCRIPTION)
    schemas = DESCRIPTION["components"]["schemas"]
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    assert b"http" not in DOCS.replace(b"https-equiv", b"")
    assert b"src=" not in DOCS


@pytest.mark.parametrize(
    ("refuse", "status"),
    [(NOBODYS, 200), (NOT_CANCELABLE, 200), (NOT_YET, 503), (AWAY, 503), (NO_AGENT, 503), (UNCHECKED, 503)],
    ids=lambda value: getattr(value, "code", None),
)
def test_a_reply_of_the_protocol_has_status_200_and_trouble_of_ours_has_its_own(refuse: Refuse, status: int) -> None:
    response = rpc_error(refuse, "7")
    assert response.status == status
    said = json.loads(response.body)["error"]
    assert (said["code"], said["data"]["status"]) == (refuse.rpc_code, refuse.status)
    assert problem(refuse).status == refuse.status, "plain routes speak HTTP"


def test_an_accepted_task_is_answered_to_a_modern_sender_in_his_shape_under_our_id() -> None:
    """1.0: SendMessage answers a oneof, GetTask the bare Task. Parts are nobody's business."""
    said = {"messageId": "m", "taskId": "t", "parts": [{"data": {"taskId": "t", "id": "t"}}]}
    task = {
        "id": "t",
        "contextId": "c",
        "status": {"state": "TASK_STATE_COMPLETED", "message": said},
        "history": [said],
    }
    answer = json.dumps({"jsonrpc": "2.0", "id": 1, "result": task}).encode()
    body = followed(answer, QUEUE_ID, "7")
    assert body is not None
    ours = {**said, "taskId": str(QUEUE_ID)}
    expected = {**task, "id": str(QUEUE_ID), "status": {"state": "TASK_STATE_COMPLETED", "message": ours}}
    assert json.loads(body) == {"jsonrpc": "2.0", "id": 7, "result": {"task": {**expected, "history": [ours]}}}


@pytest.mark.parametrize(
    "answer",
    [
        {"result": {"task": {"id": "t", "status": {"state": "TASK_STATE_COMPLETED"}}}},
        {"result": {"message": {"messageId": "m", "parts": []}}},
        {"error": {"code": -32602, "message": "no"}},
        {"result": None},
        [],
    ],
)
def test_what_the_agent_answered_to_the_message_stays_as_it_came(answer: Any) -> None:
    assert followed(json.dumps(answer).encode(), QUEUE_ID, "7") is None
    assert followed(b"{", QUEUE_ID, "7") is None
