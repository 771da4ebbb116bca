"""A message on the bus is a batch: a JSON array of facts of one type.

Reading is fact by fact: one that is not what its routing key says takes no other along (3-bus rule 3).
"""

from __future__ import annotations

import json
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
    try:
        # Not pydantic's parser: it refuses the whole batch for one lone surrogate.
        elements = json.loads(body)
    except (ValueError, RecursionError) as error:
        return [], [Unreadable(raw=body, error=f"not JSON: {error}")]
    if not isinstance(elements, list):
        return [], [Unreadable(raw=body, error=f"a batch is a JSON array, this is {type(elements).__name__}")]
    facts: list[FactT] = []
    unreadable: list[Unreadable] = []
    for element in elements:
        raw = json.dumps(element).encode()
        try:
            facts.append(kind.model_validate_json(raw))
        except ValidationError as error:
            unreadable.append(Unreadable(raw=raw, error=_sentence(error)))
    return facts, unreadable


def _sentence(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)[:1000]


_adapters: dict[type[Fact], TypeAdapter[list[Fact]]] = {}


def _adapter(kind: type[FactT]) -> TypeAdapter[list[FactT]]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(list[kind])  # type: ignore[valid-type]
    return _adapters[kind]  # type: ignore[return-value]
