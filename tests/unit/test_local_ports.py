"""Ports: remembered first, in the agreed range, and never the same for two stacks."""

from __future__ import annotations

import socket
from itertools import count
from pathlib import Path

import pytest

from deploy.local.errors import StackError
from deploy.local.memory import Memory
from deploy.local.ports import HIGHEST, LOWEST, Ports, first_free, wishes


def folder(tmp_path: Path, name: str) -> Memory:
    (tmp_path / name).mkdir(exist_ok=True)
    return Memory(tmp_path / name)


@pytest.mark.parametrize(
    ("remembered", "prefer", "order"),
    [
        (None, None, [1, 2]),
        (None, 20080, [20080, 1, 2]),
        ("20500", 20080, [20500, 20080, 1, 2]),
        ("20500", None, [20500, 1, 2]),
    ],
)
def test_the_remembered_port_is_tried_first(remembered: str | None, prefer: int | None, order: list[int]) -> None:
    assert list(wishes(remembered=remembered, prefer=prefer, rest=[1, 2])) == order


def test_a_taken_port_is_passed_over() -> None:
    assert first_free([1, 2, 3], lambda port: port > 2) == 3
    assert first_free([1, 2], lambda port: port > 2) is None


def test_a_port_survives_a_restart(tmp_path: Path) -> None:
    with Ports(folder(tmp_path, "one")) as ports:
        port = ports.claim("proxy-1")
        assert LOWEST <= port < HIGHEST
    with Ports(folder(tmp_path, "one")) as ports:
        assert ports.claim("proxy-1") == port


def test_two_stacks_never_get_one_port(tmp_path: Path) -> None:
    with Ports(folder(tmp_path, "one")) as one, Ports(folder(tmp_path, "two")) as two:
        port = one.claim("proxy-1")
        assert two.claim("proxy-1", prefer=port) != port
        with pytest.raises(StackError, match=f"port {port} is taken"):
            two.claim("proxy-2", exactly=port)


def test_a_port_on_which_a_stranger_listens_is_taken(tmp_path: Path) -> None:
    with Ports(folder(tmp_path, "one")) as ports, socket.create_server(("127.0.0.1", 0)) as stranger:
        with pytest.raises(StackError, match="--port"):
            ports.claim("proxy-1", exactly=stranger.getsockname()[1])
        assert ports.claim("proxy-1", prefer=stranger.getsockname()[1]) != stranger.getsockname()[1]


def test_candidates_are_asked_one_by_one() -> None:
    assert first_free(count(5), lambda port: port == 7) == 7
