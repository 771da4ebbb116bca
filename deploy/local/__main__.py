"""`python -m deploy.local`: Bide's whole stack on one machine, real servers included.

Parses the command line and turns errors into one sentence. Refuses systems other than Linux: pidfds, /proc and
sessions are how it knows what it started.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.local.errors import StackError
from deploy.local.services import REPOSITORY, parse_replicas
from deploy.local.stack import Options, up
from deploy.local.teardown import down


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    if sys.platform != "linux":
        print("the local stack runs on Linux only; elsewhere use the compose file or a Linux machine", file=sys.stderr)
        return 1
    given = parser().parse_args(arguments)
    data_dir: Path = given.data_dir.absolute()
    try:
        if given.command == "down":
            down(data_dir, print)
            return 0
        options = Options(
            data_dir=data_dir, replicas=parse_replicas(given.replicas), port=given.port, as_json=given.json
        )
        return up(options, environ=os.environ)
    except (StackError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    root = argparse.ArgumentParser(prog="python -m deploy.local", description="Bide's whole stack on one machine.")
    commands = root.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start everything and stay in the foreground; Ctrl-C stops it")
    stop = commands.add_parser("down", help="stop the stack, or end what a crashed one left running")
    for command in (start, stop):
        command.add_argument(
            "--data-dir",
            type=Path,
            default=REPOSITORY / ".bide",
            help="where data, logs, ports and passwords of this stack are kept (default: %(default)s)",
        )
    start.add_argument("--port", type=int, help="port of the first proxy (default: the last one, else 20080 if free)")
    start.add_argument("--replicas", default="", help="processes per service, as in proxy=2,queue=2 (default: 1 each)")
    start.add_argument("--json", action="store_true", help="one JSON line on stdout when ready; the rest on stderr")
    start.add_argument("--no-demo", action="store_true", help="without demo agents")
    return root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
