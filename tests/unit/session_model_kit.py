"""The protocol that ends sessions, as states and steps for an exhaustive search.

One workspace: sessions in the order in which they begin, the agent's container, the scheduler's rows, the queue's gate,
two proxies, and supervisors that end containers. A step reads nothing but the state, so a service that stops between
two of them, for ever or for a while, is one of the interleavings.

It is finite, and loses no way to break: of two things that differ only in what may follow, the one that allows more
stands for both.
- A message that was sent is on its way for ever, and need not arrive: late, twice, never and in another order are all
  there. What is said again and again (a stop, a word to the gate) may arrive whenever it may have been said. An order
  to kill is at once with every supervisor, and stays there: one that took it and stopped may go on at any time.
- Time is what is left until a moment, at most `LEFT_MAX`; at 0 it has passed and the word has no effect any more.
- A session that nobody stopped while it ran is CHECKPOINT_SENT when it is gone: its row may end, or be stopped late.
- The queue does not remember who has left the gate, and a proxy begins forwards as soon as the queue's gate is open, or
  what it has heard of the present closing has passed.
- Whether siblings are over their ceilings is asked of those that the gate lists; what the scheduler itself knows to run
  would only hold back more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.unit.session_state_kit import (
    CHECKPOINT_SENT,
    CONCURRENT_MAX,
    ENDED,
    KILL_ORDERED,
    LEFT_MAX,
    RUNNING,
    SESSIONS,
    STOP_SENT,
    Order,
    Protocol,
    Proxy,
    State,
    Word,
    bit,
    members,
    put,
    settled,
)

TIME_PASSES = "time passes"


class Step(NamedTuple):
    does: str
    about: tuple[int, ...]
    """What `does` leaves open: the session, and what is left (+) where a moment is told."""
    after: State
    freely: int = 0
    """Sessions that end here because the agent, or its container, does so of its own accord, as bits."""
    breaks: str = ""
    """What must never happen, and happens here."""


def steps(protocol: Protocol, state: State) -> Iterator[Step]:
    """Give every step that can come next."""
    for kind in (
        _time, _sessions_begin, _sessions_end, _stops_arrive, _rows_advance, _kills_are_ordered, _kills_are_answered,
        _gate_hears, _proxies_hear, _containers_are_ended,
    ):  # fmt: skip
        for step in kind(protocol, state):
            yield Step(step.does, step.about, settled(protocol, step.after), step.freely, step.breaks)


# ── time, and the agent ──────────────────────────────────────────────────────────────────────────────────────────────


def _time(protocol: Protocol, state: State) -> Iterator[Step]:
    """Let every moment come nearer. A gate that nobody renews opens by itself."""
    places, until = state.places, max(0, state.until - 1)
    if not protocol.the_gate_is_never_shortened:
        places = tuple(max(0, place - 1) for place in places)
        until = max(places, default=0)
    later = state._replace(
        places=places if until else (0,) * len(places),
        until=until,
        proxies=tuple(_later(proxy) for proxy in state.proxies),
        closings=_one_less(state.closings),
        orders=_one_less(state.orders) if protocol.a_kill_expires else state.orders,
    )
    yield Step(TIME_PASSES, (), later)


def _later(proxy: Proxy) -> Proxy:
    said = tuple(Word(word.left - 1, word.forward) for word in proxy.said if word.left > 1)
    return Proxy(max(0, proxy.left - 1), proxy.forward, said)


def _one_less(orders: tuple[Order, ...]) -> tuple[Order, ...]:
    return tuple(order._replace(left=order.left - 1) for order in orders if order.left > 1)


def _sessions_begin(_: Protocol, state: State) -> Iterator[Step]:
    session = len(state.rows) + 1
    if session > SESSIONS or state.alive.bit_count() >= CONCURRENT_MAX:
        return
    begun = state._replace(rows=(*state.rows, RUNNING), alive=state.alive | bit(session), places=(*state.places, 0))
    if not state.until:
        yield Step("delivery {} begins", (session,), begun)
    for n, proxy in enumerate(state.proxies):
        if not proxy.left and not proxy.forward:
            proxies = put(state.proxies, n, proxy._replace(forward=session))
            yield Step("live forward {} begins", (session,), begun._replace(proxies=proxies))


def _sessions_end(_: Protocol, state: State) -> Iterator[Step]:
    """The agent answers, whatever it was asked; or its container dies, and is started again."""
    for session in members(state.alive):
        yield Step("the agent answers {}", (session,), _gone(state, bit(session)), freely=bit(session))
    if state.alive:
        yield Step("the container dies", (), _next_life(state), freely=state.alive)


def _stops_arrive(protocol: Protocol, state: State) -> Iterator[Step]:
    """At whoever holds the session, and at an agent that obeys; also when the session is long gone."""
    for session, row in enumerate(state.rows, 1):
        if row < STOP_SENT:
            continue
        if state.alive & bit(session):
            yield Step("the stop ends {}", (session,), _gone(state, bit(session)), freely=bit(session))
        elif state.alive and not protocol.a_stop_names_its_session:
            yield Step("the agent obeys the stop of {}", (session,), state, breaks="a stop ended another session")


def _gone(state: State, sessions: int) -> State:
    proxies = tuple(proxy._replace(forward=0) if sessions & bit(proxy.forward) else proxy for proxy in state.proxies)
    rows = tuple(
        CHECKPOINT_SENT if row == RUNNING and sessions & bit(session) else row
        for session, row in enumerate(state.rows, 1)
    )
    return state._replace(rows=rows, alive=state.alive & ~sessions, proxies=proxies)


def _next_life(state: State) -> State:
    return _gone(state, state.alive)._replace(earlier=len(state.rows))


# ── the scheduler ────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows_advance(_: Protocol, state: State) -> Iterator[Step]:
    """Compare and set, from one state to a later one: who reads it, and who writes, is any of several."""
    for session, row in enumerate(state.rows, 1):
        if row == RUNNING:
            yield Step("{} is over its ceiling, checkpoint sent", (session,), _set_row(state, session, CHECKPOINT_SENT))
        if row < STOP_SENT:
            yield Step("stop {} sent", (session,), _set_row(state, session, STOP_SENT))
        elif row < ENDED and not state.alive & bit(session):
            yield Step("row {} ends by its owner's word", (session,), _set_row(state, session, ENDED))


def _kills_are_ordered(protocol: Protocol, state: State) -> Iterator[Step]:
    for session, row in enumerate(state.rows, 1):
        if not _may_be_ordered(protocol, state, session, row):
            continue
        for licence in _licences(protocol, state, session):
            if protocol.siblings_are_asked and any(state.rows[s - 1] == RUNNING for s in members(licence.listed)):
                continue
            orders = (*state.orders, licence._replace(session=session))
            after = _set_row(state, session, KILL_ORDERED)._replace(orders=orders)
            yield Step("kill {} ordered, +{}", (session, licence.left), after)


def _may_be_ordered(protocol: Protocol, state: State, session: int, row: int) -> bool:
    if row == KILL_ORDERED:
        return protocol.a_void_order_is_renewed and not _is_under_order(state, session)
    # Without compare-and-set whoever read the row before it ended may write now.
    return row == STOP_SENT or (row == ENDED and not protocol.rows_compare_and_set)


def _licences(protocol: Protocol, state: State, session: int) -> Iterator[Order]:
    if not protocol.the_gate_closes:
        yield Order(session, LEFT_MAX, state.alive)
    for closing in state.closings:
        if closing.session == session or not protocol.a_gates_word_names_its_session:
            yield closing


def _kills_are_answered(protocol: Protocol, state: State) -> Iterator[Step]:
    """KillDone, applied or stale: the life that the order names is over, whoever ended it."""
    for session, row in enumerate(state.rows, 1):
        void = not protocol.a_void_order_ends_nothing and not _is_under_order(state, session)
        if row == KILL_ORDERED and (session <= state.earlier or void):
            yield Step("row {} ends by the kill's answer", (session,), _set_row(state, session, ENDED))


def _is_under_order(state: State, session: int) -> bool:
    return any(order.session == session for order in state.orders)


def _set_row(state: State, session: int, row: int) -> State:
    return state._replace(rows=put(state.rows, session - 1, row))


# ── the gate, the proxies, the supervisors ───────────────────────────────────────────────────────────────────────────


def _gate_hears(protocol: Protocol, state: State) -> Iterator[Step]:
    """SessionGate: a session that was stopped asks for it, with words old and new; when it has ended it leaves."""
    if not protocol.the_gate_closes:
        return
    for session, row in enumerate(state.rows, 1):
        place = state.places[session - 1]
        if row < STOP_SENT:
            continue
        for left in range(1, LEFT_MAX + 1):
            if not place or left > (state.until if protocol.the_gate_is_never_shortened else place):
                places = put(state.places, session - 1, 1 if protocol.the_gate_is_never_shortened else left)
                after = state._replace(places=places, until=max(state.until, left))
                yield Step("gate closed for {}, +{}", (session, left), after)
        held = protocol.the_gate_outlasts_the_order and _is_under_order(state, session)
        if place and row == ENDED and not held:
            yield Step("{} leaves the gate", (session,), _left(protocol, state, session))


def _left(protocol: Protocol, state: State, session: int) -> State:
    places = put(state.places, session - 1, 0)
    until = max(places)
    return state._replace(places=places, until=state.until if until and protocol.the_gate_is_never_shortened else until)


def _proxies_hear(protocol: Protocol, state: State) -> Iterator[Step]:
    """WorkspaceBacklog: until when the gate is closed, also by a word that a later one has overtaken."""
    for n, proxy in enumerate(state.proxies):
        for left in range(1, state.until + 1):
            shorter = left == state.until and not protocol.the_gate_is_never_shortened
            if left > proxy.left or (shorter and left < proxy.left):
                after = state._replace(proxies=put(state.proxies, n, proxy._replace(left=left)))
                yield Step("a proxy hears +{}", (left,), after)


def _containers_are_ended(_: Protocol, state: State) -> Iterator[Step]:
    """By one of those who have the order; it stays with the others."""
    for order in state.orders:
        yield Step("the container is ended for {}", (order.session,), _next_life(state), breaks=_wrong(state, order))


def _wrong(state: State, order: Order) -> str:
    """Name what is wrong with a kill that hits now."""
    others = state.alive & ~bit(order.session)
    if order.session <= state.earlier:
        return "a second life was ended for one session"
    if others & ~order.listed:
        return "a kill hit a session that the gate did not know of"
    if any(state.rows[session - 1] == RUNNING for session in members(others)):
        return "a kill hit a session below its ceiling"
    return ""
