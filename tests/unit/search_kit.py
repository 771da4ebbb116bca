"""Exhaustive search, breadth first: everything that can be reached, the shortest way to what breaks, what is a trap."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from time import process_time

from tests.unit.session_model_kit import TIME_PASSES, Step
from tests.unit.session_state_kit import State

Next = Callable[[State], Iterable[Step]]


@dataclass(slots=True)
class Reached:
    """The states in the order in which they were found, by number, and the steps between them."""

    numbers: dict[State, int]
    states: list[State]
    came: list[tuple[int, str]] = field(default_factory=lambda: [(-1, "")])
    """How each was found: from which one, and by what step."""
    froms: array[int] = field(default_factory=lambda: array("L"))
    tos: array[int] = field(default_factory=lambda: array("L"))
    kinds: array[int] = field(default_factory=lambda: array("B"))
    """Of each step: `Step.freely`, with bit 0 where time passes."""
    seconds: float = 0.0
    """Of this processor, that the search took."""
    breaks: str = ""
    trace: tuple[str, ...] = ()
    """The shortest way to what breaks, where something does: the search ends there."""

    def way_to(self, number: int) -> tuple[str, ...]:
        return tuple(reversed(list(self._way_back(number))))

    def _way_back(self, number: int) -> Iterator[str]:
        while number:
            number, does = self.came[number]
            yield does


def search(start: State, following: Next) -> Reached:
    """Search until nothing new is found, or something breaks."""
    begin, found = process_time(), Reached({start: 0}, [start])
    waiting = deque([0])
    while waiting and not found.breaks:
        number = waiting.popleft()
        for step in following(found.states[number]):
            _note(found, number, step, waiting)
            if found.breaks:
                break
    found.seconds = process_time() - begin
    return found


def _note(found: Reached, number: int, step: Step, waiting: deque[int]) -> None:
    if step.breaks:
        found.breaks, found.trace = step.breaks, (*found.way_to(number), told(step))
        return
    to = found.numbers.setdefault(step.after, len(found.states))
    if to == len(found.states):
        found.states.append(step.after)
        found.came.append((number, told(step)))
        waiting.append(to)
    found.froms.append(number)
    found.tos.append(to)
    found.kinds.append(step.freely or step.does == TIME_PASSES)


def traps(found: Reached, *, without: int, goal: Callable[[State], bool]) -> list[int]:
    """Find the states from which the goal cannot be reached by steps that have none of the bits of `without`."""
    before = _steps_to(found, without)
    good = bytearray(goal(state) for state in found.states)
    waiting = deque(number for number, is_good in enumerate(good) if is_good)
    while waiting:
        for number in before(waiting.popleft()):
            if not good[number]:
                good[number] = 1
                waiting.append(number)
    return [number for number, is_good in enumerate(good) if not is_good]


def told(step: Step) -> str:
    return step.does.format(*step.about)


def _steps_to(found: Reached, without: int) -> Callable[[int], array[int]]:
    """Turn the steps round."""
    counts = array("L", [0]) * (len(found.states) + 1)
    taken = [n for n, kind in enumerate(found.kinds) if not kind & without]
    for n in taken:
        counts[found.tos[n] + 1] += 1
    for before, number in pairwise(range(len(counts))):
        counts[number] += counts[before]
    ends, froms = counts[:], array("L", [0]) * len(taken)
    for n in taken:
        to = found.tos[n]
        froms[ends[to]] = found.froms[n]
        ends[to] += 1
    return lambda number: froms[counts[number] : counts[number + 1]]
