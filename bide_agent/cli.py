"""`bide-agent run … -- command`: any command as an agent behind Bide. `bide-agent check`: tries an agent of yours."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bide_agent.check.program import NONE_CAME, Wanted
from bide_agent.check.program import run as check
from bide_agent.runner.command import TASK, Command, Limits, Saving
from bide_agent.runner.group import adopt_orphans
from bide_agent.runtime.host import serve
from bide_agent.runtime.options import Options
from bide_agent.runtime.words import ANSWERING

COMMANDS = ("run", "check")
STATES = (*ANSWERING, "failed")


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, command = _split(words)
    parser = argparse.ArgumentParser(prog="bide-agent", description="Puts agents behind Bide.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_run(verbs.add_parser("run", help="run any command as an agent: bide-agent run [options] -- command …"))
    _add_check(verbs.add_parser("check", help="play Bide towards an agent: bide-agent check [URL] [-- command …]"))
    given = parser.parse_args(words)
    return _run(parser, given, command) if given.verb == "run" else _check(given, command)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and the command behind `--`."""
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _add_run(parser: argparse.ArgumentParser) -> None:
    default, limits = Options(workspace=""), Limits()
    say = parser.add_argument
    parser.epilog = "The prompt goes to the command's standard input, or where {prompt} stands in an argument."
    say("--workspace", required=True, help="the workspace it sits in")
    say("--bide", default=os.environ.get("BIDE_URL"), help="base URL of the proxy (BIDE_URL); none: it stands alone")
    say("--token", default=os.environ.get("BIDE_TOKEN", ""), help="enrolment or admin token (BIDE_TOKEN)")
    say("--host", default=default.host, help="address to listen on")
    say("--port", type=int, default=default.port, help="0: any free one between 26000 and 32000")
    say("--url", help="where Bide reaches it, if not at host and port")
    say("--max-concurrent", type=int, default=default.max_concurrent, help="turns at a time")
    say("--heartbeat-s", type=float, default=default.heartbeat_s, help="cadence, which it declares")
    say("--state-dir", type=Path, help="token, answers, working directories (BIDE_AGENT_STATE, else the user's own)")
    say("--description", default=default.description, help="what the agent card says")
    say("--workdir", type=Path, help="one working directory for all turns, instead of one per conversation")
    say("--inactivity-s", type=float, default=limits.inactivity_s, help="stop a command silent for so long; 0: never")
    say("--wall-s", type=float, default=limits.wall_s, help="stop a command that takes so long; 0: never")
    say("--stop-grace-s", type=float, default=limits.stop_grace_s, help="between SIGTERM and SIGKILL")
    say("--grace-s", type=float, default=default.grace_s, help="what running turns get at the agent's own SIGTERM")
    say("--output-chars", type=int, default=limits.output_chars, help="longest answer; the middle is left out")
    say("--checkpoint-signal", type=_signal, metavar="NAME", help="asks it to save and end, as in USR1")
    say(
        "--checkpoint-file",
        metavar="NAME",
        help="written in its working directory for the same; its path is in BIDE_CHECKPOINT_FILE",
    )
    say("--checkpoint-stdin", metavar="LINE", help="written to its standard input for the same")
    say(
        "--exit", action="append", default=[], type=_exit, metavar="CODE=STATE",
        help=f"what an exit code means: {', '.join(STATES)}; 0 is completed, 75 is tried again, others are failed",
    )  # fmt: skip


def _add_check(parser: argparse.ArgumentParser) -> None:
    default, say = Wanted(), parser.add_argument
    say("url", nargs="?", help="where the agent is; without it, where it says that it is when it registers")
    say("--port", type=int, default=default.port, help="of the registry that is started; 0: any free one")
    say("--token", default="", help="what the agent registers with; without it one is made, and printed")
    say("--text", default=default.text, help="a message on which it works for some seconds")
    say("--register-s", type=float, default=default.register_s, help="how long to wait for the agent")


def _check(given: argparse.Namespace, command: Sequence[str]) -> int:
    wanted = Wanted(
        url=given.url, command=command, port=given.port, token=given.token, text=given.text, register_s=given.register_s
    )
    try:
        return check(wanted)
    except OSError as error:
        sys.stderr.write(f"bide-agent: {error}\n")
        return NONE_CAME


def _run(parser: argparse.ArgumentParser, given: argparse.Namespace, command: Sequence[str]) -> int:
    if not command:
        parser.error("no command: write it behind --, as in bide-agent run --workspace w1 -- codex exec -")
    if given.max_concurrent > 1 and TASK not in (given.checkpoint_file or TASK):
        parser.error(f"two turns may share a directory: put {TASK} into --checkpoint-file, as in save-{TASK}.json")
    if shutil.which(command[0]) is None:
        parser.error(f"there is no program {command[0]}")
    # It will run in another directory than this one.
    program = str(Path(command[0]).absolute()) if os.sep in command[0] else command[0]
    handler = Command(
        arguments=[program, *command[1:]],
        limits=Limits(
            inactivity_s=given.inactivity_s,
            wall_s=given.wall_s,
            stop_grace_s=given.stop_grace_s,
            output_chars=given.output_chars,
        ),
        saving=Saving(signal=given.checkpoint_signal, file=given.checkpoint_file, stdin=given.checkpoint_stdin),
        exits=dict(given.exit),
        folder=given.workdir,
    )
    names = ("workspace", "bide", "token", "host", "port", "url", "max_concurrent", "heartbeat_s", "state_dir")
    options: dict[str, Any] = {name: getattr(given, name) for name in (*names, "description", "grace_s")}
    for name in [name for name, said in os.environ.items() if given.token and said == given.token]:
        del os.environ[name]  # whatever it is called: the command's environment is made of this one
    adopt_orphans()
    try:
        # What is canceled may need the whole grace to end its command.
        serve(handler, **options, stop_grace_s=given.stop_grace_s + 5)
    except OSError as error:
        sys.stderr.write(f"bide-agent: {error}\n")
        return 1
    return 0


def _signal(name: str) -> int:
    found = getattr(signal, f"SIG{name.upper().removeprefix('SIG')}", None)
    if not isinstance(found, signal.Signals):
        raise argparse.ArgumentTypeError(f"there is no signal {name}")
    return int(found)


def _exit(pair: str) -> tuple[int, str]:
    code, _, state = pair.partition("=")
    if not code.isdigit() or state not in STATES:
        raise argparse.ArgumentTypeError(f"{pair!r} is no CODE=STATE with one of {', '.join(STATES)}")
    return int(code), state
