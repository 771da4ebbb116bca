"""A handler around a command: prompt in, output out as it comes, within limits, and an exit code that says how it went.

A command that is asked to save and end (`Saving`) and does so ends its turn as a checkpoint; whoever runs it again for
the same message finds the same working directory, and `BIDE_RESUMED=1`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bide_agent.runner.environ import MARK, environ
from bide_agent.runner.group import Child, start
from bide_agent.runner.output import Output
from bide_agent.runtime.session import Session
from bide_agent.runtime.words import Answer, Asked, Checkpoint, Failed, Message

PROMPT = "{prompt}"
"""Where this stands in an argument, the prompt is put there; else it goes to standard input."""
TASK = "{task}"
"""In the name of the file that asks a command to save, this is the id of the Task."""
TRY_AGAIN = 75
"""EX_TEMPFAIL: the message is delivered again, as after any error of an agent."""
DRAIN_S = 1.0
STDERR_CHARS = 2000
TOGETHER_S = 0.05
"""Written within so short a time is told in one event."""
_SIGNALS = {one.value: one.name for one in signal.Signals}  # most of the real-time ones have no name


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """How a command is asked to save and end; nothing set: it is not, and goes on until it is stopped."""

    signal: int | None = None
    """Sent to the command alone, not to what it has started."""
    file: str | None = None
    """Relative to the working directory; it gets `{"reason": …, "deadline": …}`. With `{task}`
    in it two turns that share a directory are asked each for itself."""
    stdin: str | None = None
    """A line. Standard input then stays open behind the prompt, which ends with a newline."""

    @property
    def is_possible(self) -> bool:
        return (self.signal, self.file, self.stdin) != (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds; 0 is none."""

    inactivity_s: float = 90.0
    """Without a byte on stdout or stderr."""
    wall_s: float = 0.0
    """Bide's ceiling (1800 s) bounds a turn anyway."""
    stop_grace_s: float = 10.0
    output_chars: int = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`Command(arguments=["codex", "exec", "-"])` is a handler."""

    arguments: Sequence[str]
    limits: Limits = field(default_factory=Limits)
    saving: Saving = field(default_factory=Saving)
    exits: Mapping[int, str] = field(default_factory=dict)
    """States by exit code, besides 0 completed, 75 try again, and failed."""
    folder: Path | None = None
    """One working directory for all; None: one per conversation."""

    async def __call__(self, message: Message, session: Session) -> AsyncIterator[Any]:
        """Run it; the chunks are its output."""
        chunks: asyncio.Queue[str | None] = asyncio.Queue()
        run = _Run(self, message, session, chunks.put_nowait)
        running = asyncio.create_task(run.run())
        running.add_done_callback(lambda _: chunks.put_nowait(None))
        try:
            while (said := await _next(chunks)) is not None:
                yield said
        finally:
            running.cancel()
            await asyncio.wait({running})
        yield running.result()


async def _next(chunks: asyncio.Queue[str | None]) -> str | None:
    """What has been said, a moment's worth at a time; None: there will be no more."""
    said = await chunks.get()
    if said is None:
        return None
    with suppress(TimeoutError):
        async with asyncio.timeout(TOGETHER_S):
            while (more := await chunks.get()) is not None:
                said += more
            chunks.put_nowait(None)
    return said


class _Run:
    """One run of a command."""

    def __init__(self, command: Command, message: Message, session: Session, tell: Callable[[str], None]) -> None:
        self._command = command
        self._message = message
        self._session = session
        self._tell = tell
        self._output = Output(command.limits.output_chars)
        self._errors: deque[str] = deque(maxlen=64)
        self._asked: Asked | None = None
        self._asking: Path | None = None
        """The file that asks it to save, once there is a reason to."""

    async def run(self) -> Answer:
        """Start it, watch it, end what is left of it.

        Raises:
            Failed, Checkpoint: how it ended, if not well.
            TryAgain: it says that it may go better another time.
        """
        limits, session = self._command.limits, self._session
        child = await self._start()
        session.stop_with(child.kill)
        saving = asyncio.create_task(self._save_when_asked(child))
        end = child.stop
        try:
            over = await self._watch(child)
            if over is None:
                end = child.end  # by itself: what it has put into a session of its own, as servers, is to stay
                await child.until_drained(DRAIN_S)
        finally:
            saving.cancel()
            try:
                await end(limits.stop_grace_s)
                await child.until_drained(DRAIN_S)
            finally:
                child.close()
        self._tell(self._output.rest())
        if over is not None:
            raise Failed(over)
        return self._verdict(child.code or 0)

    async def _start(self) -> Child:
        prompt = self._message.text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
        command, session = self._command, self._session
        by_argument = any(PROMPT in one for one in command.arguments)
        folder, resumed = self._folder()
        if command.saving.file:
            self._asking = folder / command.saving.file.replace(TASK, session.task_id)
            self._asking.unlink(missing_ok=True)  # an earlier turn's, which this one was not asked
        try:
            child = await start(
                [one.replace(PROMPT, prompt) for one in command.arguments],
                folder=folder,
                environ=environ(session, resumed=resumed, checkpoint_file=self._asking),
                stdin=not by_argument or command.saving.stdin is not None,
                on_output=self._hear,
                on_error=self._hear_error,
                mark=MARK,
            )
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise Failed("The prompt is too long for an argument; this agent should take it by stdin.") from None
            raise
        if not by_argument:
            keep_open = command.saving.stdin is not None
            child.write(prompt.encode() + (b"\n" if keep_open else b""), and_close=not keep_open)
        return child

    def _folder(self) -> tuple[Path, bool]:
        """Where to work, and whether an earlier delivery of the same message did so before."""
        saved = self._session.saved
        resumed = isinstance(saved, dict) and "folder" in saved and Path(saved["folder"]).is_dir()  # it may be removed
        folder = self._command.folder or (Path(saved["folder"]) if resumed else self._session.folder)
        (folder := folder.absolute()).mkdir(parents=True, exist_ok=True)  # the command, in it, is told of it
        with suppress(sqlite3.Error):  # a full disk; then the next delivery begins anew
            self._session.save({"folder": str(folder)})
        return folder, resumed

    def _hear(self, data: bytes) -> None:
        head = self._output.feed(data)
        self._session.progress()
        if head:
            self._tell(head)

    def _hear_error(self, data: bytes) -> None:
        self._session.progress()
        self._errors.append(data[-STDERR_CHARS:].decode(errors="replace"))

    async def _watch(self, child: Child) -> str | None:
        """Wait until it ends; or say why it must."""
        limits, loop = self._command.limits, asyncio.get_running_loop()
        began_at = loop.time()
        while True:
            inactive_at = child.heard_at + limits.inactivity_s if limits.inactivity_s else float("inf")
            over_at = began_at + limits.wall_s if limits.wall_s else float("inf")
            due = min(inactive_at, over_at)
            try:
                async with asyncio.timeout_at(None if due == float("inf") else due):
                    await child.exited.wait()
            except TimeoutError:
                if loop.time() >= over_at:
                    return f"Stopped after {limits.wall_s:g} s, the longest that a turn may take here."
                if loop.time() >= child.heard_at + limits.inactivity_s:
                    return f"Stopped: the command wrote nothing for {limits.inactivity_s:g} s."
            else:
                return None

    async def _save_when_asked(self, child: Child) -> None:
        asked, saving = await self._session.until_asked(), self._command.saving
        if not saving.is_possible:
            return
        self._asked = asked
        if self._asking:
            deadline = asked.deadline.isoformat() if asked.deadline else None
            whole = self._asking.with_name(self._asking.name + ".new")
            whole.write_text(json.dumps({"reason": asked.reason, "deadline": deadline}))
            whole.replace(self._asking)
        if saving.stdin is not None:
            child.write(saving.stdin.encode() + b"\n", and_close=False)
        if saving.signal is not None:
            child.ask(saving.signal)

    def _verdict(self, code: int) -> Answer:
        if self._asked is not None and code in {0, -(self._command.saving.signal or 0)}:
            raise Checkpoint(self._asked)
        state = {0: "completed", **self._command.exits}.get(code)
        if state is not None and state != "failed":
            return Answer(None, state)
        how = f"exit code {code}" if code >= 0 else f"signal {_SIGNALS.get(-code, -code)}"
        errors = "".join(self._errors)[-STDERR_CHARS:].strip()
        sentence = f"The command ended with {how}." + (f"\n{errors}" if errors else "")
        if code == TRY_AGAIN and state is None:
            raise TryAgain(sentence)
        raise Failed(sentence)


class TryAgain(Exception):  # noqa: N818 - said by the command, and meant
    """The command ended with EX_TEMPFAIL."""
