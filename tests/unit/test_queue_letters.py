"""The id under which a message that could not be read comes back."""

from __future__ import annotations

from uuid import RFC_4122

from uuid_utils.compat import uuid7

from services.queue.letters import id_after


def test_a_message_comes_back_under_one_new_id_however_often_it_is_asked_for() -> None:
    first, other = uuid7(), uuid7()
    assert id_after(first) == id_after(first)
    assert len({first, id_after(first), id_after(id_after(first)), other, id_after(other)}) == 5


def test_the_new_id_is_a_uuid7_of_the_same_moment() -> None:
    for _ in range(100):
        first = uuid7()
        again = id_after(first)
        assert (again.version, again.variant, again.int >> 80) == (7, RFC_4122, first.int >> 80)
