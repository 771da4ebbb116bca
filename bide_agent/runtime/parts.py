"""Parts of messages and artifacts, in the words of A2A 1.0, and how each dialect writes them.

    {"text": …}   {"data": …}   {"raw": base64, "mediaType": …, "filename": …}   {"url": …, …}

All may carry `metadata`. 0.3 says the same with `kind` and puts bytes and addresses under `file`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from bide_agent.calls import Dialect

Part = dict[str, Any]
_Given = TypeVar("_Given")
_OF_FILE = {"raw": "bytes", "url": "uri", "mediaType": "mimeType", "filename": "name"}
_CONTENTS = ("text", "data", "raw", "url")


def heard(raw: Any) -> Part | None:
    """Read a part of either dialect; None: it is none that is known."""
    if not isinstance(raw, Mapping):
        return None
    file = raw.get("file")
    if isinstance(file, Mapping):
        part = {ours: file[theirs] for ours, theirs in _OF_FILE.items() if theirs in file}
    else:
        part = {name: raw[name] for name in (*_CONTENTS, "mediaType", "filename") if name in raw}
    if not any(name in part for name in _CONTENTS) or not isinstance(part.get("text", ""), str):
        return None
    return {**part, **({"metadata": raw["metadata"]} if raw.get("metadata") else {})}


def said(dialect: Dialect, part: Part) -> Part:
    if dialect is Dialect.V10:
        return part
    more = {"metadata": part["metadata"]} if "metadata" in part else {}
    if "text" in part:
        return {"kind": "text", "text": part["text"], **more}
    if "data" in part:
        data = part["data"] if isinstance(part["data"], dict) else {"value": part["data"]}  # 0.3 knows objects only
        return {"kind": "data", "data": data, **more}
    return {"kind": "file", "file": {theirs: part[ours] for ours, theirs in _OF_FILE.items() if ours in part}, **more}


def made(given: Any) -> list[Part]:
    """What a handler gave: a text, a part of either dialect, several of those, or nothing.

    Raises:
        TypeError: it is something else, or holds what is no JSON.
    """
    if given is None:
        return []
    if isinstance(given, str):
        return [{"text": given}]
    if isinstance(given, Mapping):
        part = heard(given)
        if part is None:
            raise TypeError("a part has text, data, raw or url; for an object of your own write {'data': …}")
        return [jsonable(part)]
    if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray):
        return [part for one in given for part in made(one)]
    raise TypeError(f"a handler answers with text or parts, not with {type(given).__name__}")


def jsonable(given: _Given) -> _Given:
    """The same, if it can be written as JSON: said while the handler runs, and not when its answer is due.

    Raises:
        TypeError: it cannot.
    """
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"what a handler answers is written as JSON: {error}") from None
    return given


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbouring plain texts made one: chunks of a stream are no paragraphs."""
    whole: list[Part] = []
    for is_plain, some in groupby(parts, lambda part: part.keys() == {"text"}):
        alike = list(some)
        whole += [{"text": "".join(part["text"] for part in alike)}] if is_plain else alike
    return whole


def text_of(parts: Iterable[Part]) -> str:
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))
