"""`python -m bide_agent`: one agent as a process of its own, until SIGTERM (unless it ignores that) or SIGINT.

`python -m bide_agent run` and `check` are `bide-agent`'s (`cli.py`); without them it is the small agent for trials.

Prints one JSON line to stdout when it serves, `{"workspace": …, "url": …, "boot_id": …}`, and speaks on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bide_agent import cli
from bide_agent.agent import Agent, running
from bide_agent.behaviour import Behaviour, BehaviourError, parse
from bide_agent.options import Options


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in cli.COMMANDS:
        return cli.main(words)
    parser = _parser()
    try:
        options = _options(parser.parse_args(arguments))
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        asyncio.run(_run(options))
    except BehaviourError as error:
        parser.error(str(error))
    except OSError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    return 0


async def _run(options: Options) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(options) as agent:
        loop.add_signal_handler(signal.SIGTERM, _terminate, agent, stop)
        sys.stdout.write(
            json.dumps({"workspace": options.workspace, "url": agent.url, "boot_id": agent.boot_id}) + "\n"
        )
        sys.stdout.flush()
        await stop.wait()


def _terminate(agent: Agent, stop: asyncio.Event) -> None:
    if agent.behaviour.sigterm == "obey":
        stop.set()
    else:
        logging.getLogger("bide_agent").warning("sigterm_ignored workspace=%s", agent.workspace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bide_agent", description="An A2A agent that echoes, and misbehaves when asked."
    )
    default = Options(workspace="")
    parser.add_argument("--workspace", required=True, help="the workspace it sits in")
    parser.add_argument("--bide", help="base URL of the proxy; without it, it registers nowhere and sends no heartbeat")
    parser.add_argument("--token", default="", help="enrolment or admin token, for the first registration")
    parser.add_argument("--port", type=int, default=default.port, help="0: any free one between 26000 and 32000")
    parser.add_argument("--max-concurrent", type=int, default=default.max_concurrent, help="slots")
    parser.add_argument("--work-s", type=float, default=default.work_s, help="length of a turn")
    parser.add_argument("--heartbeat-s", type=float, default=default.heartbeat_s, help="cadence, which it declares")
    parser.add_argument("--grace-s", type=float, default=default.grace_s, help="what running turns get at a SIGTERM")
    parser.add_argument("--record", type=Path, help="append every message to this file as JSON lines")
    parser.add_argument("--state-dir", type=Path, help="keep the agent's own token here")
    parser.add_argument(
        "--behaviour",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"any of busy_s, {', '.join(Behaviour.__slots__)}; may stand several times",
    )
    return parser


def _options(given: argparse.Namespace) -> Options:
    return Options(
        workspace=given.workspace,
        bide=given.bide,
        token=given.token,
        port=given.port,
        max_concurrent=given.max_concurrent,
        work_s=given.work_s,
        heartbeat_s=given.heartbeat_s,
        grace_s=given.grace_s,
        record=given.record,
        state_dir=given.state_dir,
        may_die=True,
        behaviour=parse(given.behaviour),
    )


if __name__ == "__main__":
    sys.exit(main())
