"""What a stack remembers between two starts: ports, passwords, tokens, its node's name.

Owns `<data>/state.json` (mode 0600). Refuses to overwrite a file it cannot read.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

from deploy.local.errors import StackError


class Memory:
    """A small dictionary on disk, safe for threads; values are made once and then stay."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "state.json"
        self._lock = threading.Lock()
        try:
            self._values: dict[str, str] = json.loads(self._path.read_text())
        except FileNotFoundError:
            self._values = {}
        except (OSError, ValueError) as error:
            raise StackError(f"cannot read {self._path} ({error}); move it away to begin afresh") from error

    def recall(self, key: str) -> str | None:
        """Return what was kept under this key."""
        with self._lock:
            return self._values.get(key)

    def keep(self, key: str, value: str) -> None:
        """Keep the value from now on."""
        with self._lock:
            if self._values.get(key) != value:
                self._values[key] = value
                write_atomically(self._path, json.dumps(self._values, indent=1, sort_keys=True))

    def recall_or_make(self, key: str, make: Callable[[], str]) -> str:
        """Return what was kept, or keep what `make` gives."""
        value = self.recall(key)
        if value is None:
            value = make()
            self.keep(key, value)
        return value


def write_atomically(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace the file in one step: a reader sees the old text or the new, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)
