"""An agent around a handler of yours: it may be asked to stop between two steps, and goes on where it was.

export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
PYTHONPATH=. .venv/bin/python examples/agents/handler.py <workspace> [seconds per word]
"""

from __future__ import annotations

import asyncio
import os
import sys

from bide_agent import Message, Session, serve


def main(workspace: str, work_s: str = "0.3") -> None:
    async def handle(message: Message, session: Session) -> str:
        words: list[str] = session.saved or []  # what this message's last delivery had done, if it was cut short
        for word in message.text.split()[len(words) :]:
            await asyncio.sleep(float(work_s))  # the tool call
            words.append(word.upper())
            session.save(words)
            await session.checkpoint(" ".join(words))  # ends the turn here, if Bide asks for that
        return " ".join(words)

    serve(handle, workspace=workspace, bide=os.environ["BIDE"], token=os.environ["TOKEN"], heartbeat_s=2.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
