"""`bide-agent check`: runs every check against one agent and prints a line for each."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from bide_agent.check.checks import CHECKS
from bide_agent.check.registry import Registry, registry
from bide_agent.check.trial import Finding, Trial, Verdict

TEXT = "Work for about five seconds and then say what you did."
NONE_CAME = 2
"""Exit code where there was no agent to check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to check, and how."""

    url: str | None = None
    """None: where the agent says that it is."""
    command: Sequence[str] = ()
    """Started with BIDE_URL and BIDE_TOKEN (also as BIDE and TOKEN); (): somebody starts the agent."""
    port: int = 0
    token: str = ""
    """What the agent registers with; "": one is made."""
    text: str = TEXT
    register_s: float = 60.0


async def check(wanted: Wanted, say: Callable[[str], None]) -> list[Finding]:
    """Check an agent; [] means that none registered.

    Raises:
        OSError: the port is taken, or the command cannot be started.
    """
    token = wanted.token or secrets.token_hex(8)
    async with registry(wanted.port, token) as bide, _started(wanted.command, bide, token):
        if not wanted.command:
            say(f"start the agent now: BIDE_URL={bide.url} BIDE_TOKEN={token}")
        if not await bide.until(lambda: bool(bide.registrations), wanted.register_s):
            say(f"no agent registered at {bide.url} within {wanted.register_s:g} s; {bide.refused} had another token")
            return []
        trial = Trial(wanted.url or str(bide.registration.get("url", "")), bide, wanted.text)
        findings = []
        for name, one in CHECKS.items():
            finding = replace(await one(trial), name=name)
            findings.append(finding)
            say(f"{finding.verdict.value}  {name:18} {finding.reason}")
        return findings


def run(wanted: Wanted) -> int:
    """Check and print; 0: nothing failed, 1: something did, 2: no agent came."""

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    findings = asyncio.run(check(wanted, say))
    if not findings:
        return NONE_CAME
    counts = [sum(one.verdict is verdict for one in findings) for verdict in Verdict]
    say("{} passed, {} failed, {} skipped".format(*counts))
    return int(any(one.verdict is Verdict.FAIL for one in findings))


@asynccontextmanager
async def _started(command: Sequence[str], bide: Registry, token: str) -> AsyncIterator[None]:
    if not command:
        yield
        return
    told = {"BIDE_URL": bide.url, "BIDE_TOKEN": token, "BIDE": bide.url, "TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **told}, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
