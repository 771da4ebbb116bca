"""A message on the bus is a batch: a JSON array of facts of one type.

Reading is fact by fact: one that is not what its routing key says takes no other along (3-bus rule 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from shared.facts import Fact, FactT

BATCH_FACTS_MAX = 256
BATCH_BYTES_MAX = 1 << 20
"""A fact that is larger than this travels alone."""


def encode(fact: Fact) -> bytes:
    """One fact as JSON.

    Raises:
        PydanticSerializationError: a string holds a lone surrogate; escape what callers chose before it gets here.
    """
    return fact.__pydantic_serializer__.to_json(fact)


def encode_batch(encoded: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(encoded) + b"]"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A fact, or a whole message, that is not what its routing key says; `raw` is kept as it came."""

    raw: bytes
    error: str


def decode_batch(kind: type[FactT], body: bytes) -> tuple[list[FactT], list[Unreadable]]:
    """Validate a batch fact by fact, so that a bad one takes no other along. The common case is one pass in C."""
    try:
        return _adapter(kind).validate_json(body), []
    except ValidationError:
        return _decode_singly(kind, body)


def _decode_singly(kind: type[FactT], body: bytes) -> tuple[list[FactT], list[Unreadable]]:
    facts: list[FactT] = []
    unreadable: list[Unreadable] = []
    try:
        elements = split(body)
    except ValueError as error:
        return [], [Unreadable(raw=body, error=str(error))]
    for raw in elements:
        try:
            facts.append(kind.model_validate_json(raw))
        except ValidationError as error:
            unreadable.append(Unreadable(raw=raw, error=_sentence(error)))
    return facts, unreadable


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def split(body: bytes) -> list[bytes]:
    """The elements of a JSON array, byte for byte.

    By brackets alone: a parser would stop at the first element that it cannot read, however deep or long, and take the
    others along.

    Raises:
        ValueError: the body is no array, or does not end where it should.
    """
    text = body.strip()
    if not (text.startswith(b"[") and text.endswith(b"]")):
        raise ValueError("a batch is a JSON array")
    elements: list[bytes] = []
    depth, start = 0, 1
    for token in _TOKEN.finditer(text):
        match token.group():
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
            case b"," if depth == 1:
                elements.append(text[start : token.start()].strip())
                start = token.end()
        if depth == 0 and token.end() != len(text):
            raise ValueError("a batch is one JSON array, and this has text behind it")
    if depth != 0:
        raise ValueError("a batch is a JSON array, and this one does not end")
    last = text[start:-1].strip()
    return [*elements, last] if last or elements else []


def _sentence(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)[:1000]


_adapters: dict[type[Fact], TypeAdapter[list[Fact]]] = {}


def _adapter(kind: type[FactT]) -> TypeAdapter[list[FactT]]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(list[kind])  # type: ignore[valid-type]
    return _adapters[kind]  # type: ignore[return-value]
