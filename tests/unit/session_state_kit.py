"""The states of the model in session_model_kit.py, and what follows in each by itself: what is said, and forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SESSIONS = 3
CONCURRENT_MAX = 2
LEFT_MAX = 2

RUNNING, CHECKPOINT_SENT, STOP_SENT, KILL_ORDERED, ENDED = range(5)
"""States of a session's row. Whatever is not RUNNING is over its ceiling, or was stopped by an operator."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What protects. All of it together is the protocol; take one away, and it is a variant that breaks."""

    a_stop_names_its_session: bool = True
    a_kill_names_its_life: bool = True
    """Of the container."""
    a_kill_expires: bool = True
    """By a look at the clock right before: where it is taken no look helps, for who took it may stop there."""
    rows_compare_and_set: bool = True
    siblings_are_asked: bool = True
    """Whether they are over their ceilings."""
    the_gate_closes: bool = True
    the_gate_waits_for_proxies: bool = True
    every_proxy_is_counted: bool = True
    """Also one that has only begun, and one that was not heard from for a while."""
    live_forwards_are_listed: bool = True
    """Also those of a proxy that has spoken of this closing, and not since."""
    a_proxys_word_names_its_closing: bool = True
    a_gates_word_names_its_session: bool = True
    """What was said about another one, in a closing before, licenses nothing."""
    the_gate_outlasts_the_order: bool = True
    """A session under an order to kill leaves the gate once that is answered or void, not when it ends."""
    the_gate_is_never_shortened: bool = True
    """Who leaves it takes nothing from the moment until which it stays closed; the last one opens it."""
    a_void_order_is_renewed: bool = True
    a_void_order_ends_nothing: bool = True
    """Liveness does not call it stale."""


class Word(NamedTuple):
    """What a proxy says of the present closing (ProxyBeat)."""

    left: int
    forward: int
    """Its live forward; 0: none."""


class Proxy(NamedTuple):
    left: int = 0
    """Until it begins forwards again, by what it has heard of the present closing; 0: it may begin one."""
    forward: int = 0
    said: tuple[Word, ...] = ()


class Order(NamedTuple):
    """A word of the gate that licenses a kill (GateClosed), and the order that is made of it (SessionKill)."""

    session: int
    left: int
    listed: int
    """Of the sessions that still run those in flight that it knows of, as bits."""


class State(NamedTuple):
    rows: tuple[int, ...] = ()
    """The scheduler's, one for each session that has begun."""
    alive: int = 0
    """Sessions that run, as bits."""
    earlier: int = 0
    """How many sessions began in earlier lives of the container."""
    places: tuple[int, ...] = ()
    """Of the sessions in the queue's gate; 0: not in it."""
    until: int = 0
    """What is left until the queue's gate opens by itself; 0: it is open."""
    proxies: tuple[Proxy, ...] = (Proxy(), Proxy())
    closings: tuple[Order, ...] = ()
    orders: tuple[Order, ...] = ()


TWO_STOPPED = State(rows=(STOP_SENT, STOP_SENT), alive=0b110, places=(0, 0))
"""Two deliveries that were both told to stop. Four steps lead there."""
LAST_STOPPED = State(rows=(ENDED, ENDED, STOP_SENT), alive=0b1000, places=(0, 0, 0))
"""A delivery that was told to stop, and after which nothing begins any more."""


def bit(session: int) -> int:
    return 1 << session


def members(sessions: int) -> Iterator[int]:
    return (session for session in range(1, SESSIONS + 1) if sessions & bit(session))


def put(values: tuple[T, ...], n: int, value: T) -> tuple[T, ...]:
    return (*values[:n], value, *values[n + 1 :])


# ── what follows by itself ───────────────────────────────────────────────────────────────────────────────────────────


def settled(protocol: Protocol, state: State) -> State:
    """Say what is to be said, forget what has no effect any more, and tell nothing apart that is alike."""
    one, other = (_says(protocol, each, state.until) for each in state.proxies)
    proxies = (one, other) if one <= other else (other, one)
    closings = [*state.closings, *_gate_says(protocol, state, proxies)] if state.until else state.closings
    return State(
        state.rows,
        state.alive,
        state.earlier,
        state.places,
        state.until,
        proxies,
        _strongest([each for each in closings if _is_of_use(protocol, state, each)], state.alive),
        _strongest([each for each in state.orders if _can_hit(protocol, state, each)], state.alive),
    )


def _says(protocol: Protocol, proxy: Proxy, until: int) -> Proxy:
    """ProxyBeat, in a closing; one that is over has no more to be said of."""
    if not until:
        return Proxy(0, proxy.forward, () if protocol.a_proxys_word_names_its_closing else proxy.said)
    word = Word(proxy.left, proxy.forward)
    if not proxy.left or proxy.said == (word,):
        return proxy
    said = {*proxy.said, word}
    strongest = (word for word in said if not any(_is_stronger(each, word) for each in said))
    return Proxy(proxy.left, proxy.forward, tuple(sorted(strongest)))


def _is_stronger(one: Word, other: Word) -> bool:
    return one != other and one.left >= other.left and one.forward in {0, other.forward}


def _gate_says(protocol: Protocol, state: State, proxies: tuple[Proxy, ...]) -> Iterator[Order]:
    """GateClosed, about each session in the gate: until when no session begins, and all that are in flight."""
    for words in _words(protocol, state.until, proxies):
        left, listed = state.until, state.alive
        for proxy in proxies:
            listed &= ~bit(proxy.forward)
        for word in words:
            left = min(left, word.left)
            if protocol.live_forwards_are_listed:
                listed |= bit(word.forward)
        for session, place in enumerate(state.places, 1):
            if place:
                yield Order(session, left, listed)


def _words(protocol: Protocol, until: int, proxies: tuple[Proxy, ...]) -> Iterable[tuple[Word, ...]]:
    """What each of the proxies that count may have said last."""
    if not protocol.the_gate_waits_for_proxies:
        return [tuple(Word(until, proxy.forward) for proxy in proxies)]
    if not protocol.every_proxy_is_counted:
        return [(word,) for proxy in proxies for word in proxy.said]
    return product(*(proxy.said for proxy in proxies))


def _is_of_use(protocol: Protocol, state: State, closing: Order) -> bool:
    if not protocol.a_gates_word_names_its_session:
        return True
    has_ended = state.rows[closing.session - 1] == ENDED and protocol.rows_compare_and_set
    return _can_hit(protocol, state, closing) and not has_ended


def _can_hit(protocol: Protocol, state: State, order: Order) -> bool:
    return order.session > state.earlier or not protocol.a_kill_names_its_life


def _strongest(orders: Sequence[Order], alive: int) -> tuple[Order, ...]:
    """Leave out those of which another one says the same for longer, or with less in flight that can still be hit."""
    if not orders:
        return ()
    listing = {Order(order.session, order.left, order.listed & alive) for order in orders}
    if len(listing) == 1:
        return tuple(listing)
    return tuple(sorted(order for order in listing if not any(_allows_more(other, order) for other in listing)))


def _allows_more(one: Order, other: Order) -> bool:
    alike = one != other and one.session == other.session
    return alike and one.left >= other.left and one.listed | other.listed == other.listed
