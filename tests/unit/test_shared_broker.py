"""What a process decides about its broker without one."""

from __future__ import annotations

from shared.broker import reconnect_interval_s


def test_two_hundred_processes_come_back_at_two_hundred_moments() -> None:
    """B-31: the driver's own pause is the same for all, so each process draws one; within 0.5 and 1.5 s."""
    pauses = sorted(reconnect_interval_s() for _ in range(200))
    assert pauses[0] >= 0.5
    assert pauses[-1] <= 1.5
    assert len(set(pauses)) == 200
    # Spread, not bunched: no tenth of the second gets more than three times its share.
    assert max(sum(at <= pause < at + 0.1 for pause in pauses) for at in (0.5 + n / 10 for n in range(10))) <= 60
