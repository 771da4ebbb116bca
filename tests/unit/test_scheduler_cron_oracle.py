"""Cron against cronsim 2.8, which reads the same dialect and was written by others.

It runs in a process with a timeout, for it can loop for ever. Left out is where it does, or is wrong; the loop of
Debian's cron (test_scheduler_cron_debian.py) covers that:
- Pacific/Chatham: `59 */3 * * *` loops for ever at the overlap, and wildcards lose what comes right after a change.
- Australia/Lord_Howe: half an hour is not in its steps, and wildcards lose fires.
- Wildcards where the gap lies at midnight: it takes the day's first minute for 00:00, though the clock shows 01:00.
- A step over a range of one (`5-5/2`), which it reads as `5-59/2`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from random import Random

import pytest

from services.scheduler.cron import Calendar, parse, upcoming, zone
from tests.unit.cron_kit import ZONES, a_taken_expression, changes

ZONES_LEFT_OUT = {"Pacific/Chatham", "Australia/Lord_Howe"}
GAP_AT_MIDNIGHT = {
    *("Africa/Cairo", "America/Asuncion", "America/Havana", "America/Santiago", "America/Scoresbysund"),
    *("Asia/Beirut", "Asia/Gaza", "Atlantic/Azores"),
}
RANGE_OF_ONE = re.compile(r"\b(\d+)-\1/")

CRONSIM = """
import json, sys
from datetime import datetime, timezone
from itertools import islice
from zoneinfo import ZoneInfo
from cronsim import CronSim

answers = []
for text, zone, begin, n in json.load(sys.stdin):
    found = islice(CronSim(text, datetime.fromtimestamp(begin, ZoneInfo(zone))), n)
    answers.append([int(moment.astimezone(timezone.utc).timestamp()) for moment in found])
json.dump(answers, sys.stdout)
"""

Question = tuple[str, str, int, int]


def questions(name: str) -> list[Question]:
    """Ask around the clock changes of two years and anywhere in four: text, zone, after, how many."""
    random = Random(name)
    begin = datetime(2025, 1, 1, tzinfo=UTC)
    near = [change - timedelta(hours=8) for change in changes(zone(name), begin, datetime(2027, 1, 1, tzinfo=UTC))]
    asked = [(a_taken_expression(random, hours=(0, 4), dense=True), at, 60) for at in near for _ in range(10)]
    far = [(a_taken_expression(random), begin + timedelta(minutes=random.randrange(2_000_000)), 8) for _ in range(20)]
    return [
        (expression.text, name, int(at.timestamp()), n)
        for expression, at, n in asked + far
        if not RANGE_OF_ONE.search(expression.text) and not (expression.wildcard and name in GAP_AT_MIDNIGHT)
    ]


def cronsim(asked: list[Question]) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", CRONSIM], input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=True
    )
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def test_cronsim_finds_the_same_moments(capsys: pytest.CaptureFixture[str]) -> None:
    """C-C3."""
    asked = [question for name in ZONES if name not in ZONES_LEFT_OUT for question in questions(name)]
    moments = 0
    for (text, name, after, n), answer in zip(asked, cronsim(asked), strict=True):
        ours = [
            int(at.timestamp())
            for at in upcoming(Calendar(parse(text), zone(name)), datetime.fromtimestamp(after, UTC), n)
        ]
        # What a gap leaves out comes at its end: with cronsim once for each moment of it, here once.
        theirs = sorted(set(answer))
        assert theirs == ours[: len(theirs)], f"{text} in {name} after {after}"
        moments += len(theirs)
    assert len(asked) > 1200
    with capsys.disabled():
        print(f"\ncronsim agrees on {moments} moments of {len(asked)} questions", end=" ")
