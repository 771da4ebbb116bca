"""A service on a machine whose clock is wrong: `python -m tests.integration.skewed SERVICE SECONDS`.

What Python calls the time is that much later or earlier; timers, which are monotonic, are left alone.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from datetime import datetime
from typing import Any

SKEW_S = float(sys.argv[2])
_time, _time_ns = time.time, time.time_ns
_datetime: Any = datetime


def _now(kind: type[datetime], tz: Any = None) -> datetime:
    return kind.fromtimestamp(time.time(), tz)


def skew() -> None:
    """Before anything of ours is imported: who took `time.time` already keeps the right one."""
    time.time = lambda: _time() + SKEW_S
    time.time_ns = lambda: _time_ns() + int(SKEW_S * 1e9)
    # datetime is written in C and shared by all that imported it, so its own namespace is changed.
    gc.get_referents(_datetime.__dict__)[0]["now"] = classmethod(_now)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(_datetime))


if __name__ == "__main__":
    skew()
    from importlib import import_module

    from shared.service import start

    name = sys.argv[1]
    settings = import_module(f"services.{name}.settings").Settings
    sys.exit(start(name, settings, import_module(f"services.{name}.__main__").main))
