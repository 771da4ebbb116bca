"""How a state machine is run against real tables.

CI runs the same steps each time, so that it speaks of the change and not of the seed; `make test-chaos-long` takes a
new seed. `BIDE_TEST_SEED` repeats a run, `BIDE_TEST_STEPS` makes it longer. Nothing is shrunk: that would take minutes,
and the steps of the example that failed are printed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any

import hypothesis
import structlog
from hypothesis import HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

STEPS_EACH = 50
SEED = 20_261_129


def steps_of(usual: int) -> int:
    """How many steps, if nobody says otherwise."""
    return int(os.environ.get("BIDE_TEST_STEPS", usual))


def run_machine(machine: Any, world: str, opening: AbstractAsyncContextManager[Any], *, steps: int, each: int) -> None:
    """Run `machine`, a class with `loop`, `steps` and `seen`, with what `opening` opens as its `world`.

    `each` is how many of an example's steps really happen, as some examples end early.
    """
    seed = _seed()
    print(f"BIDE_TEST_SEED={seed} BIDE_TEST_STEPS={steps}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with asyncio.Runner() as runner:
        machine.loop = runner.get_loop()
        setattr(machine, world, runner.run(_entered(opening)))
        machine.steps, machine.seen = 0, Counter()
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=_settings(max(1, steps // each)))
        finally:
            runner.run(_left(opening))
            structlog.reset_defaults()
    print(f"{machine.steps} steps: {dict(sorted(machine.seen.items()))}")


def _seed() -> int:
    if said := os.environ.get("BIDE_TEST_SEED"):
        return int(said)
    return secrets.randbelow(2**32) if os.environ.get("BIDE_TEST_LONG") else SEED


def _settings(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=STEPS_EACH,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


async def _entered(opening: AbstractAsyncContextManager[Any]) -> Any:
    return await opening.__aenter__()


async def _left(opening: AbstractAsyncContextManager[Any]) -> None:
    await opening.__aexit__(None, None, None)
