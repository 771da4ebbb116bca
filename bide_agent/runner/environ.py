"""What a command is told in its environment, and what it is not."""

from __future__ import annotations

import os
from pathlib import Path

from bide_agent.runtime.session import Session

MARK = "BIDE_TASK"
"""The id of the Task. By it is known whose turn a process belongs to (`descent.py`)."""
SECRETS = ("BIDE_TOKEN",)
"""What the runner knows and its command need not."""


def environ(session: Session, *, resumed: bool, checkpoint_file: Path | None) -> dict[str, str]:
    """The runner's own, without secrets, and what there is to know of a turn; any of it may be empty."""
    ours = {
        "BIDE_WORKSPACE": session.workspace,
        MARK: session.task_id,
        "BIDE_SESSION": session.id.encode("ascii", "replace").decode().replace("\0", "?"),
        "BIDE_QUEUE_ID": session.queue_id or "",
        "BIDE_DELIVERY": str(session.delivery),
        "BIDE_RESUMED": "1" if resumed else "0",
        **({"BIDE_CHECKPOINT_FILE": str(checkpoint_file)} if checkpoint_file else {}),
    }
    return {**{name: said for name, said in os.environ.items() if name not in SECRETS}, **ours}
