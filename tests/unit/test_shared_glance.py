"""A request is read at a glance only where the walk reads the same; what could mean two things is walked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.a2a import EnvelopeError, parse, walk
from shared.glance import glance

USUAL = (
    b'{"jsonrpc": "2.0", "id": "r-1", "method": "message/send", "params": {"message": {"kind": "message", "role":'
    b' "user", "messageId": "m", "contextId": "c", "parts": [{"kind": "text", "text": "say \\"hi\\"\\n"}]},'
    b' "configuration": {"blocking": true, "historyLength": 3}}}'
)


def test_a_usual_message_is_understood_at_a_glance() -> None:
    seen = glance(USUAL)
    assert seen is not None
    assert parse(USUAL) == walk(USUAL)
    assert (parse(USUAL).request_id, parse(USUAL).blocking) == ('"r-1"', True)


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        (b'"id": "r-1", ', b""),
        (b'"id": "r-1"', b'"id": "r-1", "id": 2'),
        (b'"id": "r-1"', b'"id": 1e3'),
        (b'"id": "r-1"', b'"id": null'),
        (b'"id": "r-1"', b'"id": "r\\u002d1"'),
        (b'"messageId": "m", ', b""),
        (b'"messageId": "m"', b'"messageId": "m", "message_id": "n"'),
        (b'"messageId": "m"', b'"messageId": "m", "taskId": "t"'),
        (b'"messageId": "m"', b'"messageId": "m", "referenceTaskIds": ["t"]'),
        (b'"messageId": "m"', b'"messageId": "m", "metadata": {"urn:bide:queue:1": {"ttl_s": 1e1}}'),
        (b'"params": {', b'"params": {"id": "t", '),
        (b'"params": {', b'"params": {"id": "t"}, "params": {'),
        (b'"params": {', b'"\\u0070arams": {"id": "t"}, "params": {'),
        (b'"message": {', b'"message": {"taskId": "t"}, "message": {'),
        (b'"message": {', b'"messag\\u0065": {"taskId": "t"}, "message": {'),
        (b'"jsonrpc"', b'".id": 7, "jsonrpc"'),
        (b'"hi', b'"\\ud800'),
        (b"3", b"[" * 450 + b"]" * 450),
        (b"3", b"NaN"),
    ],
)
def test_whatever_could_be_read_in_two_ways_is_walked(usual: bytes, other: bytes) -> None:
    assert usual in USUAL
    body = USUAL.replace(usual, other, 1)
    assert glance(body) is None
    assert _read(parse, body) == _read(walk, body)


def _read(how: object, body: bytes) -> object:
    assert callable(how)
    try:
        return how(body)
    except EnvelopeError as error:
        return error.code, error.request_id, str(error)


_SCALARS = st.sampled_from(
    ['"m"', '"message"', '"params"', '"id"', '"tasks/1"', '"\\u0061"', '"\\u00e9"', '"\\n\\""', '"é"', "true", "null",
     "0", "-1", "1e3", "9" * 30, "[]", '["t"]', "{}", '{"id":"x"}', '{"taskId":"x"}', '{"blocking":true}',
     '{"return_immediately":true,"n":1}', '{"urn:bide:queue:1":{"priority":"INFO"}}', '{"message":{"taskId":"y"}}']
)  # fmt: skip
_SPACES = st.sampled_from(["", "", " ", "\n  "])


@st.composite
def _objects(draw: st.DrawFn, usual: dict[str, str], others: list[str]) -> str:
    """An object with the usual members, most of the time; and with others, twice or in other spellings."""
    pairs = [(name, value) for name, value in usual.items() if draw(st.integers(0, 29))]
    for name in draw(st.just([]) | st.just([]) | st.lists(st.sampled_from([*usual, *others]), max_size=2)):
        pairs.insert(draw(st.integers(0, len(pairs))), (name, draw(_SCALARS)))
    space = draw(_SPACES)
    return "{" + ",".join(f'{space}"{name}"{space}:{space}{value}' for name, value in pairs) + space + "}"


@st.composite
def _bodies(draw: st.DrawFn) -> bytes:
    message = draw(
        _objects(
            {"role": '"user"', "messageId": '"m-1"', "parts": '[{"kind":"text","text":"x"}]', "kind": '"message"'},
            [
                "message_id",
                "contextId",
                "context_id",
                "taskId",
                "task_id",
                "referenceTaskIds",
                "metadata",
                "mess\\u0061ge",
            ],
        )
    )
    params = draw(
        _objects({"message": message, "configuration": '{"blocking":false}'}, ["id", "name", "expiresInSeconds", "x"])
    )
    usual = {"jsonrpc": '"2.0"', "id": draw(st.sampled_from(['"r"', "7", "-1.5", "null"])), "method": '"message/send"'}
    return draw(_objects({**usual, "params": params}, [".id", "params.message", "par\\u0061ms"])).encode()


@given(_bodies())
def test_what_is_read_at_a_glance_is_what_the_walk_finds(body: bytes) -> None:
    assert _read(parse, body) == _read(walk, body)


def test_a_message_that_was_read_at_a_glance_is_changed_by_the_walk() -> None:
    changed = parse(USUAL).with_values({"params.message.contextId": "d"})
    assert changed == USUAL.replace(b'"c"', b'"d"')
