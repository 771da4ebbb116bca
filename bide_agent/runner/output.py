"""What a command has written, bounded: its beginning as it comes, its end when it has ended, and how much between."""

from __future__ import annotations

import codecs
from collections import deque

HEAD_SHARE = 4
"""One part in so many is for the beginning."""


class Output:
    """Text of any length in at most `chars_max` characters (and a line that says what was left out)."""

    def __init__(self, chars_max: int) -> None:
        self._head_left = chars_max // HEAD_SHARE
        self._tail_max = chars_max - self._head_left
        self._tail: deque[str] = deque()
        self._tail_chars = 0
        self._left_out = 0
        # A character may come in two reads; what is no UTF-8 is shown as such.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, *, is_last: bool = False) -> str:
        """Take what was written; return what of it may be told at once."""
        text = self._decoder.decode(data, is_last)
        head, tail = text[: self._head_left], text[self._head_left :]
        self._head_left -= len(head)
        if tail:
            self._keep(tail)
        return head

    def rest(self) -> str:
        """What was held back, once there is no more."""
        head = self.feed(b"", is_last=True)
        tail = "".join(self._tail)
        excess = max(0, len(tail) - self._tail_max)
        left_out = self._left_out + excess
        said = f"\n[… {left_out} characters left out …]\n" if left_out else ""
        return f"{head}{said}{tail[excess:]}"

    def _keep(self, text: str) -> None:
        self._tail.append(text)
        self._tail_chars += len(text)
        while self._tail and self._tail_chars - len(self._tail[0]) >= self._tail_max:
            gone = len(self._tail.popleft())
            self._tail_chars -= gone
            self._left_out += gone
