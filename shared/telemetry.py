"""Logs, metrics and health: how a service says what it does.

Log events are constant snake_case words with facts as keys; never a prompt, a body or a token. Instruments live in each
service's `metrics.py`; here are only the ones of the shared machinery. `/livez` touches no dependency, so that a broker
outage restarts nobody, and is 503 where a loop hangs; `/readyz` makes a real round trip to each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable

import orjson
import structlog
from prometheus_client import Counter, Gauge, Histogram

from shared.settings import SharedSettings

Probe = Callable[[], Awaitable[None]]
"""A round trip to one dependency; it raises when that one cannot serve."""

PROBE_TIMEOUT_S = 2.0
_PROBE_PAUSE_S = 0.5
"""Probes of one service run at most this often: `/readyz` is open, and must not become a load."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("bide")

FACTS_PUBLISHED = Counter("bide_facts_published_total", "Facts by what became of their publish", ["fact", "outcome"])
BATCH_FACTS = Histogram(
    "bide_batch_facts", "Facts in one published batch", ["fact"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
FACTS_READ = Counter("bide_facts_read_total", "Facts by what the reader did with them", ["fact", "outcome"])
INFRASTRUCTURE_WAITS = Counter("bide_infrastructure_waits_total", "Waits for Postgres inside a handler", ["fact"])
OUTBOX_PUBLISHED = Counter("bide_outbox_published_total", "Outbox rows whose publish was confirmed")
OUTBOX_OLDEST = Gauge("bide_outbox_oldest_age_seconds", "Age of the oldest row that waits in the outbox")
DEAD_LETTERS = Counter("bide_dead_letters_total", "Facts set aside", ["fact", "reason"])
BUS_CONNECTED = Gauge("bide_bus_connected", "1 while the connection to RabbitMQ stands", ["connection"])


def start_logging(service: str, settings: SharedSettings, *, cached: bool = False) -> None:
    """Send structlog and the standard library's loggers to stderr in one form; bind `service` and `replica`.

    `cached`: for a process that is this service alone. Its logger then costs half as much, and keeps this stderr.
    """
    as_json = settings.log_format == "json"
    frame = _Frame(service, settings.replica_id)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars, frame, structlog.processors.format_exc_info,
    ]  # fmt: skip
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, _line if as_json else structlog.dev.ConsoleRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=(
            structlog.BytesLoggerFactory(sys.stderr.buffer) if as_json else structlog.PrintLoggerFactory(sys.stderr)
        ),
        cache_logger_on_first_use=cached,
    )
    handler = logging.StreamHandler(sys.stderr)
    renderer: structlog.typing.Processor = _text_line if as_json else structlog.dev.ConsoleRenderer()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=renderer))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


class _Frame:
    """What stands in every line: service and replica, the level, the time."""

    def __init__(self, service: str, replica_id: str) -> None:
        self._service = service
        self._replica_id = replica_id
        self._second = 0
        self._said = ""

    def __call__(self, _logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # Added here and not through contextvars: those are cleared for every message.
        return {
            "service": self._service,
            "replica": self._replica_id,
            **event,
            "level": _LEVELS.get(method, method),
            "timestamp": self._now(),
        }

    def _now(self) -> str:
        """ISO 8601 in UTC; most lines share their second with the one before."""
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._said = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._said}.{nanoseconds // 1000:06d}Z"


_LEVELS = {"warn": "warning", "exception": "error"}


def _line(_logger: object, _method: str, event: structlog.typing.EventDict) -> bytes:
    """The line as json.dumps lays it out: orjson knows no spaces but those of an indented text, so that is joined."""
    try:
        indented = orjson.dumps(event, default=repr, option=orjson.OPT_INDENT_2)
    except TypeError:  # a lone surrogate, a number beyond 64 bits
        return json.dumps(event, default=repr).encode()
    return b"{%b}" % indented[4:-2].replace(b"\n  ", b" ")


def _text_line(logger: object, method: str, event: structlog.typing.EventDict) -> str:
    return _line(logger, method, event).decode()


class Health:
    """The probes of one service and what they said last. A stuck probe costs its timeout, never the service."""

    def __init__(self) -> None:
        self._probes: dict[str, Probe] = {}
        self._pulses: dict[str, tuple[Callable[[], float], float]] = {}
        self._started = False
        self._lock = asyncio.Lock()
        self._at = float("-inf")
        self._last: dict[str, str] = {}

    def add(self, name: str, probe: Probe) -> None:
        self._probes[name] = probe

    def add_pulse(self, name: str, age_s: Callable[[], float], *, limit_s: float) -> None:
        """Call the process dead when this is older than that: only a restart helps against a loop that hangs."""
        self._pulses[name] = (age_s, limit_s)

    def stuck(self) -> dict[str, str]:
        """Whatever has stood still for too long, with a sentence; it asks nobody."""
        ages = {name: (age_s(), limit_s) for name, (age_s, limit_s) in self._pulses.items()}
        return {name: f"stands still for {age_s:.0f} s" for name, (age_s, limit_s) in ages.items() if age_s > limit_s}

    def started(self) -> None:
        """Say that the service has migrated, declared its topology and begun to read."""
        self._started = True

    async def check(self) -> tuple[bool, dict[str, str]]:
        """Run every probe at once: `(ready, {name: "ok" or what is wrong})`."""
        async with self._lock:
            if time.monotonic() - self._at >= _PROBE_PAUSE_S:
                probes = dict(self._probes)  # a service that is starting adds more meanwhile
                answers = await asyncio.gather(*map(_probed, probes.values()))
                self._last = dict(zip(probes, answers, strict=True))
                self._at = time.monotonic()
        report = {"service": "ok" if self._started else "starting", **self._last}
        return all(answer == "ok" for answer in report.values()), report


async def _probed(probe: Probe) -> str:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await probe()
    except TimeoutError:
        return f"no answer within {PROBE_TIMEOUT_S:g} s"
    except Exception as error:  # noqa: BLE001 - whatever a driver raises is the answer
        return f"{type(error).__name__}: {error}"[:200]
    return "ok"
