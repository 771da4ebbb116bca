"""`make bench`: every figure in one run, in one table; `--json` for machines, `--smoke` for CI."""

from __future__ import annotations

import argparse
import asyncio
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog

from deploy.local.servers import Servers, servers
from tests.bench import claim, compared, figures, freed, ticks, waits
from tests.bench.table import Row, as_json, as_text, write
from tests.conftest import TEMPLATE, Stack, make_template

PARTS = ("forward", "keep", "drain", "freed", "waits", "beats", "claim", "ticks", "idle")
SIZES = (1_000, 100_000, 1_000_000)


async def measure(
    running: Servers,
    folder: Path,
    parts: Sequence[str],
    *,
    seconds: float,
    rounds: int,
    sizes: Sequence[int],
    loads: ticks.Loads,
) -> list[Row]:
    stack = Stack(_database(running, "figures"), running.rabbitmq.vhost("figures"))
    rows: list[Row] = []
    async with figures.bench(stack, folder, seconds=seconds, rounds=rounds) as bench:
        if {"forward", "keep", "drain"} & set(parts):
            rows += await figures.forward(bench)
        if {"keep", "drain"} & set(parts):
            rows += await figures.keep(bench, float(rows[0].note.partition("/")[0].replace(",", "")))
        if "drain" in parts:
            rows += await figures.drain(bench)
            rows += await figures.drain_stubbed(bench)
        if "peers" in parts:
            try:
                rows += await compared.rows(bench, running, folder, rows)
            except (RuntimeError, subprocess.SubprocessError) as error:
                print(f"a peer could not be measured: {error}", file=sys.stderr)  # the other figures stand
        if "beats" in parts:
            rows += await figures.beats(bench, folder)
    return rows + await _measure_queue(running, parts, sizes, loads, seconds=seconds)


async def _measure_queue(
    running: Servers, parts: Sequence[str], sizes: Sequence[int], loads: ticks.Loads, *, seconds: float
) -> list[Row]:
    """What needs no proxy."""
    rows: list[Row] = []
    if "freed" in parts:
        rows += freed.rows(await freed.measure(Stack(_database(running, "freed"), running.rabbitmq.vhost("freed"))))
    if "waits" in parts:
        lines = Stack(_database(running, "waits"), running.rabbitmq.vhost("waits"))
        rows += waits.rows(await waits.measure(lines, tasks=int(50 * seconds)))
    if "claim" in parts:
        claims = Stack(_database(running, "claim"), running.rabbitmq.url)
        rows += claim.rows(await claim.run(claims, list(sizes)))
    if "ticks" in parts:
        calendar = Stack(_database(running, "ticks"), running.rabbitmq.vhost("ticks"))
        rows += ticks.rows(await ticks.run(calendar, loads))
    if "idle" in parts:
        still = Stack(_database(running, "idle"), running.rabbitmq.vhost("idle"))
        rows += await figures.idle(still, for_s=2 * seconds)
    return rows


def _database(running: Servers, name: str) -> str:
    return running.postgres.create_database(f"bench_{name}", TEMPLATE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="one short round: whether it runs, not how fast")
    parser.add_argument("--large", action="store_true", help="the claim among ten million too")
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peers", action="store_true", help="install the peers and measure them in the same run")
    parser.add_argument("--write", type=Path, help="put the table into this Markdown file, between its marks")
    arguments = parser.parse_args()
    parts = [*arguments.parts, *(["peers"] if arguments.peers else [])]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    seconds, rounds, sizes = (1.0, 1, SIZES[:1]) if arguments.smoke else (4.0, 5, SIZES)
    loads = ticks.SMOKE if arguments.smoke else ticks.LOADS
    sizes += (claim.LARGE,) * arguments.large
    with (
        tempfile.TemporaryDirectory(prefix="bide-bench-", ignore_cleanup_errors=True) as folder,
        servers(Path(folder) / "servers", durable=True, report=lambda line: print(line, file=sys.stderr)) as running,
    ):
        make_template(running)
        measured = measure(running, Path(folder), parts, seconds=seconds, rounds=rounds, sizes=sizes, loads=loads)
        rows = asyncio.run(measured)
    if arguments.write:
        write(arguments.write, rows)
    print(as_json(rows) if arguments.json else as_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
