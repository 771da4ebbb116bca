"""A live forward: the message goes straight to its agent, and what comes back straight to the caller.

Nothing is passed on before it is known not to be busy: an answer that is no stream and no success is read whole first.
From the first byte that the caller gets, everything is the caller's. Its leaving changes nothing here (A-P-05).
"""

from services.proxy.forward.ending import (
    Back,
    Broken,
    Ending,
    Headers,
    LiveSink,
    Outgoing,
    Passed,
    Sink,
    TaskKnown,
)
from services.proxy.forward.passing import as_stopped, forward, forward_within
from services.proxy.forward.watching import RECORDED_BYTES_MAX

__all__ = [
    "RECORDED_BYTES_MAX", "Back", "Broken", "Ending", "Headers", "LiveSink", "Outgoing", "Passed", "Sink", "TaskKnown",
    "as_stopped", "forward", "forward_within",
]  # fmt: skip
