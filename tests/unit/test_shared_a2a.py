"""The A2A envelope: read only what is needed, change only what is asked, keep every other byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.a2a import EnvelopeError, Verb, error_body, parse

SEND = b"""{ "jsonrpc" : "2.0", "id": 12345678901234567890, "method":"message/send",
  "params": {"message": {"role":"user", "parts":[{"kind":"text","text":"\\u0000 \\ud800 1e3"}], "n": 1e3,
     "messageId" : "m-1", "contextId":"c-1", "metadata":{"urn:bide:queue:1":{"priority":"INFO"}}},
   "configuration":{"blocking":false}, "expires_in_seconds": 30 }}"""


def test_the_envelope_of_a_send_is_read() -> None:
    envelope = parse(SEND)
    assert (envelope.verb, envelope.message_id, envelope.context_id) == (Verb.SEND, "m-1", "c-1")
    assert envelope.request_id == "12345678901234567890"
    assert envelope.blocking is False
    assert envelope.wishes == {"priority": "INFO"}
    assert envelope.expires_in_s == 30


def test_a_body_that_is_not_changed_stays_byte_exact() -> None:
    """A-Q-06: a NUL escape, a lone surrogate, a 20-digit integer and odd spacing survive."""
    assert parse(SEND).body == SEND
    assert parse(SEND).with_values({}) == SEND


def test_a_changed_value_changes_only_its_own_bytes() -> None:
    changed = parse(SEND).with_values({"params.message.contextId": "agent's"})
    assert changed == SEND.replace(b'"c-1"', b'"agent\'s"')


def test_missing_values_are_added_and_the_rest_stays() -> None:
    body = b'{"method":"message/send","params":{"message":{}}}'
    changed = parse(body).with_values({"jsonrpc": "2.0", "id": "x", "params.message.messageId": "m"})
    assert json.loads(changed) == {
        "jsonrpc": "2.0", "id": "x", "method": "message/send", "params": {"message": {"messageId": "m"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "verb"),
    [
        ("message/send", Verb.SEND),
        ("SendMessage", Verb.SEND),
        ("message/stream", Verb.STREAM),
        ("SendStreamingMessage", Verb.STREAM),
        ("tasks/get", Verb.GET),
        ("CancelTask", Verb.CANCEL),
        ("tasks/resubscribe", Verb.SUBSCRIBE),
        ("agent/somethingNew", Verb.OTHER),
    ],
)
def test_both_dialects_name_the_same_verbs(method: str, verb: Verb) -> None:
    assert parse(json.dumps({"method": method}).encode()).verb is verb


def test_snake_case_is_read_and_replaced_where_it_stands() -> None:
    body = b'{"method":"SendMessage","params":{"message":{"message_id":"m","context_id":"c"}}}'
    envelope = parse(body)
    assert (envelope.message_id, envelope.context_id) == ("m", "c")
    assert envelope.with_values({"params.message.contextId": "d"}) == body.replace(b'"c"', b'"d"')


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        (b"\xff{}", -32700, "UTF-8"),
        (b"", -32700, "JSON"),
        (b'{"a":1', -32700, "JSON"),
        (b'{"a":1,}', -32700, "comma"),
        (b'{"a" 1}', -32700, "expected"),
        (b'{"method":"x"} {}', -32700, "more text"),
        (b'{"a":NaN}', -32700, "NaN"),
        (b'{"params":' + b"[" * 100_000 + b"]" * 100_000 + b"}", -32700, "deep"),
        (b"[]", -32600, "object"),
        (b'{"id":1}', -32600, "method"),
        (b'{"id":1,"method":7}', -32600, "method"),
    ],
)
def test_what_is_no_request_is_refused_with_a_sentence(body: bytes, code: int, word: str) -> None:
    with pytest.raises(EnvelopeError, match=word) as caught:
        parse(body)
    assert caught.value.code == code
    assert caught.value.status == 400


def test_a_number_of_ten_thousand_digits_is_legal() -> None:
    body = b'{"method":"x","params":{"n":' + b"9" * 10_000 + b"}}"
    assert parse(body).body == body


def test_a_key_that_stands_twice_counts_last() -> None:
    body = b'{"method":"x","params":{"message":{"messageId":"a","messageId":"b"}}}'
    envelope = parse(body)
    assert envelope.message_id == "b"
    assert envelope.with_values({"params.message.messageId": "c"}) == body.replace(b'"b"', b'"c"')


def test_an_error_echoes_the_id_as_it_was_written() -> None:
    assert json.loads(error_body(-32603, "no", request_id='"a"', data={"code": "not_kept"})) == {
        "jsonrpc": "2.0", "id": "a", "error": {"code": -32603, "message": "no", "data": {"code": "not_kept"}},
    }  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(
    params=st.dictionaries(st.text(), JSON, max_size=4),
    message=st.dictionaries(st.text(), JSON, max_size=4),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    new=st.text(),
)
def test_any_request_is_kept_but_for_the_value_that_is_changed(
    params: dict[str, Any], message: dict[str, Any], indent: int | None, *, ascii_only: bool, new: str
) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {**params, "message": message}}
    body = json.dumps(request, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    envelope = parse(body)
    assert envelope.body == body
    changed = envelope.with_values({"params.message.messageId": new})
    expected = json.loads(body)
    if "message_id" in message and "messageId" not in message:
        expected["params"]["message"]["message_id"] = new
    else:
        expected["params"]["message"]["messageId"] = new
    assert json.loads(changed) == expected
