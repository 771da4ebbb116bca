"""Instruments of queue."""

from __future__ import annotations

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from services.queue.decide import Outcome, Reply
from shared.facts import Priority

ENQUEUED = Counter("bide_queue_enqueued_total", "Messages read from the bus, by what they became", ["outcome"])
DELIVERIES = Counter("bide_queue_deliveries_total", "Deliveries that ended, by what came back", ["outcome"])
ENDED = Counter("bide_queue_ended_total", "Items that ended, by status", ["status"])
TICKS = Counter("bide_queue_ticks_total", "Fires read from the bus (kept) and what they came to", ["outcome"])
WAITED = Histogram(
    "bide_queue_wait_seconds", "From the message's arrival to its first delivery", ["priority"],
    buckets=(0.01, 0.1, 1, 10, 60, 300, 1800, 7200, 86400),
)  # fmt: skip
REQUEUES = Counter("bide_queue_requeues_total", "Items that went back to their place, by why", ["reason"])
STARVATION_TURNS = Counter("bide_queue_starvation_turns_total", "Turns of the rest before CRITICAL that waited")
DEPTH = Gauge("bide_queue_depth", "Items that wait in all workspaces; every replica tells the same", ["priority"])
OLDEST = Gauge("bide_queue_oldest_age_seconds", "How long the longest first in line has waited", ["lane"])
OWNERS_LOST = Counter("bide_queue_owners_lost_total", "Deliveries taken from a silent owner")
RECONCILED = Counter("bide_queue_reconciled_total", "Workspaces whose counters did not match their rows")
DEAD_LETTERS_KEPT = Gauge(
    "bide_queue_dead_letters",
    "Facts set aside and not replayed, up to 10,000; every replica tells the same",
    ["reason"],
)
GATES_CLOSED = Gauge("bide_queue_gates_closed", "Workspaces whose session is being ended; every replica tells the same")
STOPS = Counter("bide_queue_stops_total", "Deliveries that were told to stop, by why", ["reason"])
HANG_UPS = Counter("bide_queue_hang_ups_total", "Deliveries that nothing but our hanging up could end")
OUTLIVED = Counter("bide_queue_outlived_total", "Deliveries whose agent's life was over before they were")
RUNNING = Gauge("bide_queue_running", "Deliveries of this replica under way")
WAIT = Histogram(
    "bide_queue_delivery_seconds", "From the claim to the end of a delivery", buckets=(0.01, 0.1, 1, 10, 60, 600, 3600)
)

for outcome in ("new", "duplicate", "conflict", "repeated", "unreadable"):
    ENQUEUED.labels(outcome)
for fire in ("kept", *get_args(Outcome)):
    TICKS.labels(fire)
for reply in get_args(Reply):
    DELIVERIES.labels(reply)
for reason in ("busy", "not_delivered", "preempted", "written_back", "failed_attempt", "unknown", "owner_died"):
    REQUEUES.labels(reason)
for priority in Priority:
    WAITED.labels(priority.value)
    DEPTH.labels(priority.value)
for reason in ("ceiling", "operator", "other"):
    STOPS.labels(reason)
for lane in ("critical", "rest"):
    OLDEST.labels(lane)
for status in ("completed", "failed", "expired", "canceled", "superseded"):
    ENDED.labels(status)
