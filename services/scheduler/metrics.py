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

OPEN = Gauge(
    "bide_scheduler_sessions", "Sessions that are known to run, by state; every replica tells the same", ["state"]
)
STEPS = Counter("bide_scheduler_session_steps_total", "Steps of sessions towards their end", ["step"])
DIRECTIVES = Counter("bide_scheduler_directives_total", "Directives that were said, repeats too", ["kind", "reason"])
KILLS = Counter("bide_scheduler_kills_total", "Orders to kill that were answered", ["result"])
UNENFORCEABLE = Gauge(
    "bide_scheduler_unenforceable",
    "Sessions over their ceiling whose container nobody can end; every replica tells the same",
)

KILLS_WAITING = Gauge(
    "bide_scheduler_kills_waiting",
    "Stopped sessions past their grace whose kill may not be ordered yet; every replica tells the same",
)

for reason in ("ceiling_near", "tick_waiting", "critical_waiting", "ceiling", "operator"):
    DIRECTIVES.labels("checkpoint", reason)
for reason in ("ceiling", "operator"):
    DIRECTIVES.labels("stop", reason)
for step in ("checkpoint_sent", "stop_sent", "kill_ordered", "ended"):
    STEPS.labels(step)
for result in ("applied", "stale", "already_ended", "not_killable"):
    KILLS.labels(result)
