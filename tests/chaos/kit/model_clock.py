"""The test's time, for the queue's process and for Postgres alike."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg

from tests.conftest import Stack

# Postgres in the test's time: its clocks, also where the queue's statements read them, stand until the test sets them.
CLOCK_STANDS = """
CREATE SCHEMA IF NOT EXISTS model_time;
GRANT USAGE ON SCHEMA model_time TO bide_queue;
CREATE TABLE IF NOT EXISTS model_time.clock (now timestamptz NOT NULL);
TRUNCATE model_time.clock;
INSERT INTO model_time.clock VALUES (now());
GRANT SELECT, UPDATE ON model_time.clock TO bide_queue;
CREATE OR REPLACE FUNCTION model_time.clock_timestamp() RETURNS timestamptz
  LANGUAGE sql STABLE AS 'SELECT now FROM model_time.clock';
CREATE OR REPLACE FUNCTION model_time.now() RETURNS timestamptz
  LANGUAGE sql STABLE AS 'SELECT now FROM model_time.clock';
ALTER TABLE queue.a2a_queue ALTER enqueued_at SET DEFAULT model_time.now();
ALTER TABLE queue.replicas ALTER beat_at SET DEFAULT model_time.now(),
  ALTER unbroken_since SET DEFAULT model_time.now()"""
CLOCK_RUNS = """
ALTER TABLE queue.a2a_queue ALTER enqueued_at SET DEFAULT pg_catalog.now();
ALTER TABLE queue.replicas ALTER beat_at SET DEFAULT pg_catalog.now(),
  ALTER unbroken_since SET DEFAULT pg_catalog.now();
DROP SCHEMA model_time CASCADE"""
# A schema of functions goes before the one of Postgres itself, and after the queue's own, where it makes its tables.
IN_TEST_TIME = {"search_path": "queue, model_time, pg_catalog"}


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


class Clock:
    """The time that the test says it is: the real one, and what it let pass. Every reading is later than the last."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.said = 0.0
        """What Postgres takes it for."""
        self._last_us = 0

    def now(self) -> float:
        self._last_us = max(self._last_us + 10, int((time.time() + self.ahead_s) * 1e6))
        return self._last_us / 1e6


@asynccontextmanager
async def standing_clock(stack: Stack) -> AsyncIterator[None]:
    """Postgres has the test's time for whoever connects with `IN_TEST_TIME`; new rows of the queue have it for all."""
    administrator = await asyncpg.connect(stack.database_url)
    await administrator.execute(CLOCK_STANDS)
    try:
        yield
    finally:
        await administrator.execute(CLOCK_RUNS)
        await administrator.close()
