"""The queue against a model, on a real Postgres: any order of messages, turns, endings, deaths, beats and cancels.

After every step each row is what the model says it is. `BIDE_TEST_SEED` repeats a run, `BIDE_TEST_STEPS` makes it
longer. Nothing is shrunk: that would take minutes, and the steps of the example that failed are printed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets

import hypothesis
import pytest
import structlog
from hypothesis import HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

from tests.chaos.kit.model_machine import QueueMachine
from tests.chaos.kit.model_rig import open_rig
from tests.conftest import Stack

STEPS = int(os.environ.get("BIDE_TEST_STEPS", "2500"))
SEED = os.environ.get("BIDE_TEST_SEED")
STEPS_EACH = 50
SETTINGS = hypothesis.settings(
    max_examples=max(1, STEPS // 40),  # some examples end before their fiftieth step
    stateful_step_count=STEPS_EACH,
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(1200)
def test_whatever_happens_in_whatever_order_the_rows_are_what_the_model_says(stack: Stack) -> None:
    """I1 to I4; A-Q-01, A-Q-12, A-Q-22, A-Q-23, B-01, B-02, B-03, B-04, B-05, B-06, B-12, B-13."""
    seed = int(SEED) if SEED else secrets.randbelow(2**32)
    print(f"BIDE_TEST_SEED={seed} BIDE_TEST_STEPS={STEPS}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with asyncio.Runner() as runner:
        QueueMachine.loop = runner.get_loop()
        opening = open_rig(stack)
        QueueMachine.rig = runner.run(opening.__aenter__())
        QueueMachine.steps, QueueMachine.seen = 0, {}
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(QueueMachine), settings=SETTINGS)
        finally:
            runner.run(opening.__aexit__(None, None, None))
            structlog.reset_defaults()
    print(f"{QueueMachine.steps} steps: {dict(sorted(QueueMachine.seen.items()))}")
    assert QueueMachine.steps >= min(STEPS, 2000)
