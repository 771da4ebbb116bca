"""Working directories, one per conversation. The least recently used beyond a number are removed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

KEPT = 100


class Folders:
    """`in_use` names the conversations whose folders must stay, however old."""

    def __init__(self, root: Path, in_use: Callable[[], Collection[str]], kept: int = KEPT) -> None:
        self._root = root
        self._in_use = in_use
        self._kept = kept

    def of(self, context_id: str) -> Path:
        """The folder of a conversation, made if there is none; a use counts as recent."""
        folder = self._root / _name(context_id)
        if folder.is_dir():
            os.utime(folder)
        else:
            folder.mkdir(mode=0o700, parents=True)
            self._trim(folder.name)
        return folder

    def _trim(self, newest: str) -> None:
        busy = {newest, *(_name(context_id) for context_id in self._in_use())}
        oldest_first = sorted(self._root.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in oldest_first[: -self._kept]:
            if folder.name not in busy:
                shutil.rmtree(folder, ignore_errors=True)


def _name(context_id: str) -> str:
    # A contextId is a stranger's word: it names no path.
    return hashlib.sha256(context_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]
