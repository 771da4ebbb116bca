"""The tokens of one agent: the one it shows to Bide, and the one that Bide shows to it.

The agent's own token lives in a file that others may rewrite (a rotation, a restarted twin): after a refusal the file
is read again before anything else is tried.
"""

from __future__ import annotations

import os
from pathlib import Path


class Tokens:
    """`own` is told once, at the first registration; where there is none, the enrolment token is shown."""

    def __init__(self, workspace: str, enrolment: str, state_dir: Path | None) -> None:
        self._enrolment = enrolment
        self._path = state_dir / f"{workspace}.token" if state_dir else None
        self._own = self._read()
        self.delivery: str | None = None
        """What a caller must carry; None: not told yet."""

    @property
    def shown(self) -> str:
        return self._own or self._enrolment

    def keep(self, own: str) -> None:
        """Remember the agent's own token, on disk too: whole or not at all, and for its owner's eyes."""
        self._own = own
        if self._path is None:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._path.with_suffix(f".{os.getpid()}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(own)
        new.replace(self._path)

    def refused(self, shown: str) -> bool:
        """Choose what to show after Bide refused `shown`; say whether the file held another one of our own."""
        stored = self._read()
        self._own = stored if stored != shown else None
        return self._own is not None

    def _read(self) -> str | None:
        """None: there is no file, or what is in it is no token, as after a power cut; then it is enrolled again."""
        try:
            said = self._path.read_text("ascii").strip() if self._path else ""
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return said if said and said.isprintable() else None
