"""What a process decides about its broker without one."""

from __future__ import annotations

import asyncio

import pytest
from aio_pika.exceptions import (
    AMQPConnectionError,
    AuthenticationError,
    ChannelInvalidStateError,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ProbableAuthenticationError,
)

from shared.broker import is_lost, reconnect_interval_s


def test_two_hundred_processes_come_back_at_two_hundred_moments() -> None:
    """B-31: the driver's own pause is the same for all, so each process draws one; within 0.5 and 1.5 s."""
    pauses = sorted(reconnect_interval_s() for _ in range(200))
    assert pauses[0] >= 0.5
    assert pauses[-1] <= 1.5
    assert len(set(pauses)) == 200
    # Spread, not bunched: no tenth of the second gets more than three times its share.
    assert max(sum(at <= pause < at + 0.1 for pause in pauses) for at in (0.5 + n / 10 for n in range(10))) <= 60


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (AMQPConnectionError("refused"), True),
        (ConnectionClosed(320, "CONNECTION_FORCED"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ChannelInvalidStateError("closed"), True),
        (StopAsyncIteration(), True),  # closed between two frames of the greeting
        (Exception(), True),  # closed while a channel was opened
        (AuthenticationError(), False),
        (ProbableAuthenticationError("refused"), False),
        (ChannelPreconditionFailed(406, "inequivalent arg"), False),
        (KeyError("a bug"), False),
        (ValueError("a bug"), False),
    ],
    ids=repr,
)
async def test_a_broker_that_went_away_is_told_from_one_that_refuses(error: Exception, *, lost: bool) -> None:
    assert is_lost(error) is lost


async def test_a_cancel_by_the_driver_is_told_from_one_by_us() -> None:
    """The driver cancels what waits on a connection that it loses; a service that is stopped must still stop."""
    assert is_lost(asyncio.CancelledError())
    seen: list[bool] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            seen.append(is_lost(error))
            raise

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [False]
