"""Instruments of scheduler."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.scheduler.decide import OUTCOMES

FIRES = Counter("bide_scheduler_fires_total", "Fires that ended, by what became of them", ["outcome"])
TICKS = Counter("bide_scheduler_ticks_total", "Fires that were sent to the queue")
LATE = Histogram(
    "bide_scheduler_lateness_seconds", "From the moment at which a fire was due to the turn that sent it",
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 60, 600, 3600, 86400),
)  # fmt: skip
DUE = Gauge("bide_scheduler_due", "Schedules that are due, up to 10,001; every replica tells the same")
FAILED = Gauge(
    "bide_scheduler_paused_by_error",
    "Schedules that were paused because they could not be fired; every replica tells the same",
)
PAUSED_BY_ERROR = Counter("bide_scheduler_failed_schedules_total", "Schedules paused because they could not be fired")
STALE = Counter("bide_scheduler_settled_twice_total", "Words about a fire that had ended already, or that nobody knows")
COMMANDS = Counter("bide_scheduler_commands_total", "Commands about schedules by verb and answer", ["verb", "status"])

for outcome in OUTCOMES:
    FIRES.labels(outcome)
