"""When a schedule fires: five fields of cron in an IANA zone, an interval, or one moment. Pure; no clock, no I/O.

The dialect is that of Debian's cron, also where the clocks change, with `L` and `#`. What is refused is refused when
the rule is made, with a sentence for the person who wrote it. Nothing here knows of schedules, jitter or catching up.
"""

from services.scheduler.cron.parse import parse
from services.scheduler.cron.refusals import CronError
from services.scheduler.cron.rules import At, Calendar, Every, Rule, first, rule, upcoming
from services.scheduler.cron.times import Cron
from services.scheduler.cron.words import describe
from services.scheduler.cron.zones import zone

__all__ = [
    "At",
    "Calendar",
    "Cron",
    "CronError",
    "Every",
    "Rule",
    "describe",
    "first",
    "parse",
    "rule",
    "upcoming",
    "zone",
]
