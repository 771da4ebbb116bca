"""The instruments of proxy, all in one place; every label value exists from the start, so that no rate is missing."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.proxy.decide import Reason
from shared.facts import DirectiveKind, EvidenceKind
from shared.replies import Outcome

ROUTES = (
    "a2a", "heartbeat", "register", "update_card", "card", "item", "cancel_item", "queue", "workspaces", "workspace",
    "patch", "pause", "resume", "remove", "retry_item", "promote_item", "cancel_many", "dead_letters", "replay",
    "schedules", "schedule", "stop", "checkpoint", "restart", "life", "openapi", "docs", "none",
)  # fmt: skip
OUTCOMES = ("answered", "kept", "refused", "failed")
REFUSALS = (
    "workspace_unknown", "workspace_removed", "token_missing", "token_unknown", "caller_mismatch", "caller_reserved",
    "token_unchecked", "hops_unreadable", "too_many_hops", "priority_not_allowed", "key_in_flight", "queue_full",
    "share_exceeded", "rate_limited", "critical_quota", "body_too_large", "body_slow", "body_cut", "not_json_rpc",
    "bad_value", "not_kept", "keep_unknown", "key_conflict", "twin_lost", "twin_too_large", "item_unknown",
    "not_yet_visible", "queue_away", "not_cancelable", "no_agent", "owner_unchecked", "answer_unreadable", "starting",
    "stopping", "registry_away", "internal_error",
)  # fmt: skip

REQUESTS = Counter("bide_proxy_requests_total", "Requests by route and what became of them", ["route", "outcome"])
SECONDS = Histogram(
    "bide_proxy_request_seconds", "Time to the end of the answer", ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 300),
)  # fmt: skip
FORWARDS = Counter("bide_proxy_forwards_total", "Live forwards by what came back (policies §2)", ["outcome"])
FORWARDS_RUNNING = Gauge("bide_proxy_forwards_running", "Live forwards under way")
KEEPS = Counter("bide_proxy_keeps_total", "Messages kept, confirmed by the broker, by reason", ["reason"])
REFUSED = Counter("bide_proxy_refused_total", "A2A calls refused, by code", ["code"])
STALE_COPY = Counter(
    "bide_proxy_stale_copy_total", "Messages forwarded on a copy of the backlog older than copy_stale_s"
)
ATTACHED = Counter("bide_proxy_attached_total", "Calls that waited for the answer of the same message")
HEARTBEATS = Counter("bide_proxy_heartbeats_total", "Heartbeats taken")
UNREGISTERED = Counter(
    "bide_proxy_unregistered_heartbeats_total", "Heartbeats of processes that have not registered: their url may be old"
)
TOKEN_LOOKUPS = Counter("bide_proxy_token_lookups_total", "Tokens that this replica's copy did not know", ["found"])
INCARNATIONS = Counter("bide_proxy_incarnations_total", "New lives of agents, by how they were noticed", ["by"])
DIRECTIVES = Counter(
    "bide_proxy_directives_total", "What agents are asked, and what became of it in this replica", ["kind", "outcome"]
)
CONTROL_CALLS = Counter(
    "bide_proxy_control_calls_total", "Directives brought to agents that declare `control`", ["outcome"]
)
SESSION_CANCELS = Counter("bide_proxy_session_cancels_total", "Live forwards stopped: tasks/cancel sent", ["outcome"])
GATE_CLOSINGS = Counter("bide_proxy_gate_closings_total", "Closings of gates that this replica has heard of")
OUTLIVED = Counter("bide_proxy_outlived_total", "Live forwards whose agent's life was over before they were")
EVIDENCE = Counter("bide_proxy_evidence_total", "What live forwards told of agents' lives", ["kind"])

# Bound once: looking a label up costs more than counting.
TAKEN = {_route: SECONDS.labels(_route) for _route in ROUTES}
ANSWERED = {_route: {_outcome: REQUESTS.labels(_route, _outcome) for _outcome in OUTCOMES} for _route in ROUTES}
FORWARDED = {_class: FORWARDS.labels(_class.value) for _class in Outcome}
for _reason in Reason:
    KEEPS.labels(_reason.value)
for _code in REFUSALS:
    REFUSED.labels(_code)
for _found in ("workspace", "key", "nobody", "failed"):
    TOKEN_LOOKUPS.labels(_found)
for _by in ("register", "heartbeat", "uptime"):
    INCARNATIONS.labels(_by)
for _kind in DirectiveKind:
    for _outcome in ("heard", "told", "acknowledged", "replaced", "expired", "void"):
        DIRECTIVES.labels(_kind.value, _outcome)
for _outcome in ("taken", "not_now", "refused", "unreachable", "skipped", "dropped"):
    CONTROL_CALLS.labels(_outcome)
for _outcome in ("answered", "refused", "unreachable"):
    SESSION_CANCELS.labels(_outcome)
EVIDENCED = {_evidence: EVIDENCE.labels(_evidence.value) for _evidence in EvidenceKind}
