"""The table of 3-bus: what each queue promises."""

from __future__ import annotations

import pytest

from shared.facts import (
    DeliveryEvent,
    ItemKept,
    MessageBusy,
    ProxyBeat,
    SessionDirective,
    SessionStop,
    WorkspaceHeartbeat,
)
from shared.topology import REPLIES, ROUTES, Kind, is_durable, route


@pytest.mark.parametrize("kind", [MessageBusy, SessionStop])
def test_what_nobody_says_again_is_durable(kind: type[MessageBusy]) -> None:
    assert is_durable(kind)


@pytest.mark.parametrize("kind", [WorkspaceHeartbeat, ProxyBeat, SessionDirective, DeliveryEvent, ItemKept])
def test_what_is_said_again_is_not(kind: type[ProxyBeat]) -> None:
    assert not is_durable(kind)


def test_quorum_queues_never_lose_what_is_handed_out_often() -> None:
    """RabbitMQ 4's default limit of 20 counts lost connections; -1 on 3.10 dead-letters at the first return."""
    for candidate in ROUTES:
        if candidate.kind is Kind.QUORUM:
            arguments = candidate.arguments()
            assert arguments["x-delivery-limit"] == 1_000_000
            assert arguments["x-dead-letter-strategy"] == "at-least-once"
            assert arguments["x-overflow"] == "reject-publish"


def test_kept_messages_are_refused_before_the_broker_is_full() -> None:
    assert route(MessageBusy, "queue").arguments()["x-max-length-bytes"] == 1 << 30


def test_replicas_compete_unless_each_must_hear() -> None:
    assert route(SessionStop, "queue").queue("r1") == route(SessionStop, "queue").queue("r2") == "queue.session.stop"
    assert route(SessionStop, "proxy").queue("r1") == "proxy.session.stop.r1"


def test_queue_names_are_unique() -> None:
    names = [candidate.queue("r") for candidate in ROUTES]
    assert len(set(names)) == len(names)


def test_a_reader_that_the_table_does_not_know_is_refused() -> None:
    with pytest.raises(LookupError, match="add a Route"):
        route(MessageBusy, "proxy")


def test_a_reply_goes_to_the_asker_alone() -> None:
    for candidate in ROUTES:
        assert candidate.fact not in REPLIES or candidate.kind is Kind.REPLICA
