"""What came back from an agent: the rows of policies §2, in their words, and what must not break their reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.facts import EvidenceKind
from shared.outcomes import Answer, Fault, NoAnswer, Outcome, Verdict
from shared.replies import classify, retry_after_s
from shared.results import FINAL_STATES, Kind, Result, read_result

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
ANSWERED, BUSY, SUSPECT = EvidenceKind.ANSWERED, EvidenceKind.BUSY, EvidenceKind.SERVER_ERROR
AGAIN = {"retry-after": "7"}


def rpc(result: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode()


def error(code: Any, data: Any = None) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": "secret", "data": data}}).encode()


def task(state: str, **more: Any) -> dict[str, Any]:
    return {"kind": "task", "id": "t-1", "contextId": "c-1", "status": {"state": state}, **more}


def judge(what: Answer | NoAnswer, *, streamed: bool = False, seen: Result | None = None) -> Verdict:
    verdict = classify(what, now=NOW, streamed=streamed, seen=seen)
    assert verdict.reason
    assert verdict.text.endswith(".")
    assert "secret" not in verdict.text
    return verdict


def answer(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, headers or {}, body)


MESSAGE = {"kind": "message", "role": "agent", "messageId": "m", "parts": [{"kind": "text", "text": "secret"}]}
PREEMPTED = {"metadata": {"urn:bide:queue:1": {"preempted": True}}}


@pytest.mark.parametrize(
    ("what", "outcome", "evidence"),
    [
        pytest.param(answer(200, rpc(MESSAGE)), Outcome.DELIVERED, ANSWERED, id="Message"),
        *(
            pytest.param(answer(200, rpc(task(state))), Outcome.DELIVERED, ANSWERED, id=f"Task in {state}")
            for state in sorted(FINAL_STATES)
        ),
        pytest.param(answer(200, rpc(task("submitted"))), Outcome.ACCEPTED, ANSWERED, id="Task submitted"),
        pytest.param(answer(200, rpc(task("working"))), Outcome.ACCEPTED, ANSWERED, id="Task working"),
        pytest.param(answer(202, rpc(task("submitted"))), Outcome.ACCEPTED, ANSWERED, id="202 of the agent itself"),
        pytest.param(answer(202, rpc(task("completed"))), Outcome.DELIVERED, ANSWERED, id="202 with a terminal Task"),
        pytest.param(answer(429, headers=AGAIN), Outcome.BUSY, BUSY, id="429 with Retry-After"),
        pytest.param(answer(503, headers=AGAIN), Outcome.BUSY, BUSY, id="503 with Retry-After"),
        pytest.param(answer(429), Outcome.BUSY, BUSY, id="429 without it"),
        *(
            pytest.param(answer(status, error(-32000, {"code": "busy"})), Outcome.BUSY, BUSY, id=f"busy, as {status}")
            for status in (200, 400, 401, 409, 500, 503)
        ),
        pytest.param(
            answer(200, error(-32000, [{"x": 1}, {"code": "busy"}])), Outcome.BUSY, BUSY, id="busy, in a 1.0 list"
        ),
        *(
            pytest.param(answer(status), Outcome.BUSY, SUSPECT, id=f"bare {status}")
            for status in (503, 502, 504, 520, 522, 529)
        ),
        *(
            pytest.param(NoAnswer(sent=False, fault=fault), Outcome.NOT_DELIVERED, kind, id=f"not sent: {fault}")
            for fault, kind in [
                (Fault.CONNECTION_REFUSED, EvidenceKind.REFUSED),
                (Fault.UNREACHABLE, EvidenceKind.REFUSED),
                (Fault.DNS, EvidenceKind.REFUSED),
                (Fault.CONNECT_TIMEOUT, EvidenceKind.TIMEOUT),
                (Fault.TLS, EvidenceKind.REFUSED),
                (Fault.ADDRESS_REFUSED, None),
                (Fault.NO_CONNECTION, None),
                (Fault.HUNG_UP, None),
            ]
        ),
        pytest.param(answer(200, rpc({**MESSAGE, **PREEMPTED})), Outcome.PREEMPTED, ANSWERED, id="preempted Message"),
        pytest.param(answer(200, rpc(task("canceled", **PREEMPTED))), Outcome.PREEMPTED, ANSWERED, id="preempted Task"),
        pytest.param(
            answer(500, error(-32000, {"code": "preempted"})), Outcome.PREEMPTED, ANSWERED, id="preempted error"
        ),
        *(
            pytest.param(answer(status), Outcome.FAILED_ATTEMPT, ANSWERED, id=str(status))
            for status in (401, 403, 404, 410, 500, 501, 505, 519, 530, 301, 307)
        ),
        *(
            pytest.param(answer(200, error(code)), Outcome.FAILED_ATTEMPT, ANSWERED, id=f"JSON-RPC {code}")
            for code in (-32603, -32000, -32010, -32099, -32604, 7, None, "-32600", True, 1e400)
        ),
        *(
            pytest.param(answer(200, error(code)), Outcome.REFUSED, ANSWERED, id=f"JSON-RPC {code}")
            for code in (-32700, -32600, -32601, -32602, -32001, -32005, -32009)
        ),
        *(
            pytest.param(answer(status), Outcome.REFUSED, ANSWERED, id=f"other 4xx: {status}")
            for status in (400, 402, 405, 409, 413, 422)
        ),
        pytest.param(answer(400, error(-32602)), Outcome.REFUSED, ANSWERED, id="4xx with a JSON-RPC error"),
        pytest.param(answer(400, error(-32603)), Outcome.FAILED_ATTEMPT, ANSWERED, id="4xx with -32603"),
        pytest.param(answer(500, error(-32602)), Outcome.FAILED_ATTEMPT, ANSWERED, id="5xx with -32602"),
        *(
            pytest.param(NoAnswer(sent=True, fault=fault), Outcome.UNKNOWN, kind, id=f"bytes sent, then {fault}")
            for fault, kind in [
                (Fault.EOF, EvidenceKind.RESET),
                (Fault.RESET, EvidenceKind.RESET),
                (Fault.IDLE_TIMEOUT, EvidenceKind.TIMEOUT),
                (Fault.TOTAL_TIMEOUT, None),
                (Fault.MALFORMED, None),
                (Fault.HUNG_UP, None),
            ]
        ),
        *(
            pytest.param(Answer(200, {}, None, fault), Outcome.ANSWER_LOST, kind, id=f"body lost: {fault}")
            for fault, kind in [
                (Fault.EOF, EvidenceKind.RESET),
                (Fault.RESET, EvidenceKind.RESET),
                (Fault.IDLE_TIMEOUT, EvidenceKind.TIMEOUT),
                (Fault.MALFORMED, ANSWERED),
                (Fault.HUNG_UP, None),
            ]
        ),
        pytest.param(
            Answer(200, {}, None, Fault.TOO_LARGE), Outcome.ANSWER_TOO_LARGE, ANSWERED, id="body over the limit"
        ),
        pytest.param(Answer(400, {}, None, Fault.EOF), Outcome.REFUSED, EvidenceKind.RESET, id="body of a 400 lost"),
        pytest.param(NoAnswer(sent=False, fault=Fault.REQUEST_REFUSED), Outcome.REFUSED, None, id="a forbidden header"),
    ],
)
def test_the_table(what: Answer | NoAnswer, outcome: Outcome, evidence: EvidenceKind | None) -> None:
    """A-Q-09, A-Q-10, A-Q-11, A-P-04: busy says that it lives; after a head nothing is sent twice."""
    verdict = judge(what)
    assert (verdict.outcome, verdict.evidence) == (outcome, evidence)


@pytest.mark.parametrize(
    ("fault", "seen", "outcome"),
    [
        pytest.param(None, task("completed"), Outcome.DELIVERED, id="it ended with a terminal state"),
        pytest.param(Fault.EOF, task("completed"), Outcome.DELIVERED, id="a terminal state, then eof"),
        pytest.param(None, MESSAGE, Outcome.DELIVERED, id="it ended with a message"),
        pytest.param(None, task("working"), Outcome.ACCEPTED, id="it closed without a terminal state"),
        pytest.param(Fault.RESET, task("working"), Outcome.ACCEPTED, id="reset, and the task is known"),
        pytest.param(Fault.TOO_LARGE, task("working"), Outcome.ANSWER_TOO_LARGE, id="over the limit"),
        pytest.param(None, None, Outcome.ANSWER_LOST, id="it closed without an event"),
        pytest.param(Fault.RESET, None, Outcome.ANSWER_LOST, id="reset before an event"),
        pytest.param(None, task("working", id=7), Outcome.ANSWER_LOST, id="a task that cannot be named"),
    ],
)
def test_a_stream(fault: Fault | None, seen: Any, outcome: Outcome) -> None:
    """A-P-04."""
    what = Answer(200, {"content-type": "text/event-stream"}, None, fault)
    assert judge(what, streamed=True, seen=read_result(rpc(seen)) if seen else None).outcome is outcome


def test_a_stream_that_ended_with_an_error_is_judged_by_it() -> None:
    seen = read_result(rpc(task("working"))).then(read_result(error(-32603)))
    verdict = judge(Answer(200, {}, None), streamed=True, seen=seen)
    assert (verdict.outcome, verdict.agent_task_id) == (Outcome.FAILED_ATTEMPT, "t-1")


def test_what_a_stream_said_is_folded_and_nothing_is_forgotten() -> None:
    events = [
        {"task": {"id": "t", "contextId": "c", "status": {"state": "TASK_STATE_SUBMITTED"}}},
        {"artifactUpdate": {"taskId": "t", "artifact": {}}},
        {"statusUpdate": {"taskId": "t", "status": {"state": "TASK_STATE_INPUT_REQUIRED"}}},
        {"artifactUpdate": {"taskId": "t", "artifact": {}}},
        {"somethingNew": {}},
    ]
    seen = Result(Kind.NOTHING)
    for event in events:
        seen = seen.then(read_result(rpc(event)))
    assert seen == Result(Kind.UPDATE, task_id="t", context_id="c", state="input-required")


@pytest.mark.parametrize(
    ("body", "kind", "state"),
    [
        pytest.param(rpc(task("completed")), Kind.TASK, "completed", id="0.3 Task"),
        pytest.param(
            rpc({"kind": "status-update", "taskId": "t-1", "contextId": "c-1", "status": {"state": "working"}}),
            Kind.UPDATE,
            "working",
            id="0.3 status-update",
        ),
        pytest.param(
            rpc({"task": {"id": "t-1", "contextId": "c-1", "status": {"state": "TASK_STATE_AUTH_REQUIRED"}}}),
            Kind.TASK,
            "auth-required",
            id="1.0 Task",
        ),
        pytest.param(
            rpc({"id": "t-1", "contextId": "c-1", "status": {"state": "TASK_STATE_CANCELED"}}),
            Kind.TASK,
            "canceled",
            id="1.0 bare Task",
        ),
        pytest.param(
            rpc({"message": {"taskId": "t-1", "context_id": "c-1", "parts": []}}), Kind.MESSAGE, None, id="1.0 Message"
        ),
        pytest.param(
            rpc({"parts": [], "role": "ROLE_AGENT", "taskId": "t-1", "contextId": "c-1"}),
            Kind.MESSAGE,
            None,
            id="1.0 bare Message",
        ),
        pytest.param(
            json.dumps({"task": {"id": "t-1", "contextId": "c-1", "status": {"state": "TASK_STATE_FAILED"}}}).encode(),
            Kind.TASK,
            "failed",
            id="HTTP+JSON",
        ),
        pytest.param(rpc(task("cancelled")), Kind.TASK, "canceled", id="British spelling"),
        pytest.param(rpc(task("dreaming")), Kind.TASK, "unknown", id="no state of A2A"),
        pytest.param(b" \n " + rpc(task("working")), Kind.TASK, "working", id="spaces before it"),
    ],
)
def test_both_dialects_are_read(body: bytes, kind: Kind, state: str | None) -> None:
    assert read_result(body) == Result(kind, task_id="t-1", context_id="c-1", state=state)


@pytest.mark.parametrize(
    ("body", "outcome", "word"),
    [
        (b"", Outcome.FAILED_ATTEMPT, "empty"),
        (b"<html>", Outcome.FAILED_ATTEMPT, "not JSON"),
        (b"\xff\xfe\x00", Outcome.FAILED_ATTEMPT, "UTF-8"),
        (b"[" * 100_000, Outcome.FAILED_ATTEMPT, "deeply"),
        (b"[]", Outcome.FAILED_ATTEMPT, "no JSON object"),
        (b"{}", Outcome.FAILED_ATTEMPT, "neither"),
        (b'{"queued":true,"queue_id":"7"}', Outcome.FAILED_ATTEMPT, "neither"),
        (b'{"jsonrpc":"2.0","id":1}', Outcome.FAILED_ATTEMPT, "neither"),
        (b'{"error":"no"}', Outcome.FAILED_ATTEMPT, "without a code"),
        (b'{"result":null,"error":{"code":-32600}}', Outcome.REFUSED, "-32600"),
        (b'{"error":null,"result":"done"}', Outcome.DELIVERED, "result"),
        (b'{"result":{"kind":["task"],"status":7}}', Outcome.DELIVERED, "result"),
        (b'{"result":{"kind":"task","id":"\\ud800","status":{"state":"working"}}}', Outcome.ANSWER_LOST, "no task"),
        (b'{"result":{"kind":"task","id":"a\\u0000","status":{"state":"working"}}}', Outcome.ANSWER_LOST, "no task"),
        (b'{"result":{"kind":"task","id":"","status":{"state":[]}}}', Outcome.ANSWER_LOST, "no task"),
        (b'{"error":{"code":' + b"9" * 10_000 + b"}}", Outcome.FAILED_ATTEMPT, "JSON-RPC error 0"),
        (b'{"result":{"kind":"message","kind":"task","id":"t","status":{}}}', Outcome.ACCEPTED, "works"),
        (b'{"error":{"code":-32000,"data":{"code":["busy"]}}}', Outcome.FAILED_ATTEMPT, "-32000"),
    ],
)
def test_an_odd_body_is_survived_and_named(body: bytes, outcome: Outcome, word: str) -> None:
    """A-Q-08."""
    verdict = judge(answer(200, body))
    assert verdict.outcome is outcome
    assert word in verdict.text


WORDS = [
    "result", "error", "code", "data", "kind", "id", "taskId", "contextId", "status", "state", "task", "message",
    "parts", "metadata", "urn:bide:queue:1", "preempted", "jsonrpc", "artifact", "statusUpdate",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(WORDS) | st.text(max_size=3),
            inner | st.sampled_from(["task", "message", "status-update", "working", "busy", "TASK_STATE_FAILED"]),
            max_size=5,
        )
    ),
    max_leaves=25,
)


@given(
    body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
    status=st.integers(100, 999),
    retry=st.text(max_size=30),
    streamed=st.booleans(),
)
def test_no_answer_can_break_the_classification(body: bytes, status: int, retry: str, *, streamed: bool) -> None:
    """A-Q-08."""
    what = Answer(status, {"retry-after": retry, "date": retry}, body)
    verdict = classify(what, now=NOW, streamed=streamed, seen=read_result(body))
    assert verdict.retry_after_s is None or 0 <= verdict.retry_after_s <= 3600
    for said in (verdict.agent_task_id, verdict.context_id, verdict.task_state, verdict.text):
        assert said is None or "\0" not in said.encode().decode()
    if not 200 <= status < 300:
        assert verdict.outcome not in {Outcome.DELIVERED, Outcome.ACCEPTED}


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("sent", [False, True])
def test_every_fault_has_a_class_and_a_sentence(fault: Fault, *, sent: bool) -> None:
    """A-P-08."""
    verdict = judge(NoAnswer(sent=sent, fault=fault))
    assert verdict.text.lower().startswith(verdict.outcome.value.replace("_", " "))
    assert verdict.outcome is not Outcome.BUSY


@pytest.mark.parametrize("status", [200, 202, 302, 400, 401, 404, 429, 500, 503])
def test_every_text_names_class_and_status(status: int) -> None:
    """A-P-08."""
    verdict = judge(answer(status, b"secret"))
    assert verdict.text.lower().startswith(verdict.outcome.value.replace("_", " "))
    assert str(status) in verdict.text
    assert verdict.status == status


def test_that_we_hung_up_is_neither_busy_nor_dead() -> None:
    """A-P-05."""
    verdict = judge(NoAnswer(sent=True, fault=Fault.HUNG_UP))
    assert (verdict.outcome, verdict.evidence) == (Outcome.UNKNOWN, None)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("3599", 3599.0),
        ("3600", 3600.0),
        ("3601", 3600.0),
        ("9" * 5000, 3600.0),
        ("-1", None),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("\u0663", None),
        ("Thu, 01 Jan 2026 12:00:09 GMT", 9.0),
        ("Thu, 01 Jan 2026 11:59:59 GMT", 0.0),
        ("Thu, 01 Jan 2026 12:00:09 -0000", 9.0),
        ("Fri, 02 Jan 2026 12:00:00 GMT", 3600.0),
        ("Thu, 99 Jan 99999 12:00:00 GMT", None),
    ],
)
def test_retry_after(said: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": said}, NOW) == seconds


def test_a_date_is_read_by_the_agents_own_clock() -> None:
    headers = {"retry-after": "Thu, 01 Jan 2026 03:00:09 GMT", "date": "Thu, 01 Jan 2026 03:00:00 GMT"}
    assert retry_after_s(headers, NOW) == 9.0
    assert retry_after_s({}, NOW) is None
