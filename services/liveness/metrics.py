"""Instruments of liveness."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.liveness.decide.judge import Reason, Verdict
from services.liveness.decide.life import Status
from services.liveness.decide.orders import Ruling
from services.liveness.decide.seen import Seen

PROBES = Counter("bide_liveness_probes_total", "Looks at agents through their driver, by what was seen", ["seen"])
VERDICTS = Counter("bide_liveness_verdicts_total", "Verdicts on what was seen", ["verdict"])
RESTARTS = Counter("bide_liveness_restarts_total", "Restarts that were begun, by why", ["reason"])
RESTARTS_ENDED = Counter("bide_liveness_restarts_ended_total", "Restarts by how they ended", ["result"])
CALLS_FAILED = Counter("bide_liveness_driver_calls_failed_total", "Driver calls that failed and are made again")
ORDERS = Counter("bide_liveness_orders_total", "Orders to kill, by what became of them", ["result"])
HOLDS = Counter("bide_liveness_holds_total", "Verdicts that were held because our own eyes were in doubt")
DETECTED = Histogram(
    "bide_liveness_detection_seconds", "From the first sign of a death to the verdict",
    buckets=(0.1, 0.5, 1, 2, 5, 10, 15, 20, 25, 30, 60, 120),
)  # fmt: skip
STATUSES = Gauge("bide_liveness_agents", "Agents by what is believed; every replica tells the same", ["status"])
BLIND = Gauge("bide_liveness_blind", "Agents whose driver has not been able to look for 120 s")
HEARD_AGE = Gauge("bide_liveness_heard_age_seconds", "The longest silence of an agent that is expected to beat")
WINDOW = Gauge("bide_liveness_window_seconds", "The widest window of silence in force")
EVIDENCE = Counter("bide_liveness_evidence_total", "Evidence of those who talked to agents, by kind", ["kind"])

for seen in Seen:
    PROBES.labels(seen.value)
for verdict in Verdict:
    VERDICTS.labels(verdict.value)
for reason in (
    Reason.FIRST_START, Reason.STOPPED, Reason.NOT_FOUND, Reason.EXITED, Reason.UNHEARD, Reason.WEDGED, Reason.OPERATOR,
    Reason.CEILING,
):  # fmt: skip
    RESTARTS.labels(reason.value)
for result in ("started", "killed", "recovered", "withdrawn", "cannot_run", "replaced", "gave_up"):
    RESTARTS_ENDED.labels(result)
for ruling in (Ruling.APPLIED, Ruling.STALE, Ruling.ALREADY_ENDED, Ruling.NOT_KILLABLE, Ruling.EXPIRED):
    ORDERS.labels(ruling.value)
for status in Status:
    STATUSES.labels(status.value)
